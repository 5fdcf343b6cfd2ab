"""What /metrics promises to those who scrape it."""

from __future__ import annotations

import asyncio
import re
import shutil
from typing import Any, cast

import pytest
from litestar import Litestar
from litestar.di import Provide
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from repository.lifecycle.states import Event
from repository.repository import DeviceReport
from server.metrics import names, triton_names
from server.metrics.http import build_metrics, router
from server.metrics.meter import UNKNOWN_MODEL
from tests.fakes.heart import at, newborn, resident, spec
from tests.fakes.metrics import RISE, Shown, batcher, fill, walk
from tests.fakes.shown import ShownRepository

LINES_PER_MODEL = {True: 51, False: 39}  # does it batch; without Triton's
TRITONS_LINES = 14
MICROSECONDS = re.compile(r"nv_\w+_us metric names should not contain abbreviated units")


@pytest.fixture
def shown() -> Shown:
    return Shown()


async def test_the_page_parses_in_both_formats_with_the_content_types_of_each(
    shown: Shown,
) -> None:
    shown.models.put(resident("m", 10))
    shown.served(shown.models.generations["m"][0])
    plain, kind = await shown.metrics.render("text/plain")
    assert kind == "text/plain; version=0.0.4; charset=utf-8"
    assert list(parse(plain.decode()))
    rich, kind = await shown.metrics.render("application/openmetrics-text;version=9999.0.0")
    assert kind == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    assert list(parse_openmetrics(rich.decode()))  # type: ignore[no-untyped-call]


async def test_every_name_is_of_the_table_has_our_prefix_and_no_created_series(
    shown: Shown,
) -> None:
    fill(shown)
    table = {f.full for f in names.ALL}
    table |= {f.full for group in triton_names.ALL for f in group}
    for family in parse(await shown.page()):
        if not family.name.startswith("process_"):
            assert family.name in table
    assert all(family.full.startswith("modeldepot_") for family in names.ALL)
    assert "_created" not in await shown.page()


async def test_every_series_of_the_table_can_be_seen(shown: Shown) -> None:
    fill(shown)
    seen = {family.name for family in parse(await shown.page()) if family.samples}
    assert {f.full for f in names.ALL} - seen == set()
    assert {group[0].full for group in triton_names.ALL} - seen == set()


async def test_exactly_one_state_of_a_version_is_1(shown: Shown) -> None:
    shown.models.put(resident("m", 10))
    found = {
        s.labels["state"]: s.value
        for s in await shown.samples()
        if s.name == "modeldepot_model_state"
    }
    expected = dict.fromkeys(("unloaded", "loading", "unloading", "failed"), 0.0)
    assert found == {**expected, "loaded": 1.0}
    assert await shown.value("models", state="loaded") == 1
    assert await shown.value("models", state="failed") == 0


async def test_two_generations_of_one_version_are_one_series_that_names_the_one_that_serves(
    shown: Shown,
) -> None:
    old, new = resident("m", 10, 1), newborn(spec("m", print_="f2"), 2)
    walk(new, Event.ADMIT)
    new.held = {"cpu": 10}
    shown.models.put(old, new)
    assert await shown.value("model_info", model="m", version="1", generation="1") == 1
    assert await shown.value("model_info", model="m", version="1", generation="2") is None
    assert await shown.value("model_memory_reserved_bytes", model="m", version="1") == 20


async def test_a_model_that_never_ran_is_shown_as_unloaded(shown: Shown) -> None:
    gen = resident("m", 10)
    shown.models.put(gen)
    shown.models.generations.clear()
    assert await shown.value("model_state", model="m", version="1", state="unloaded") == 1


async def test_a_histogram_counts_a_value_on_its_edge_and_what_exceeds_them_all(
    shown: Shown,
) -> None:
    shown.models.put(resident("m", 10))
    for duration_s in (0.001, 99.0):
        shown.metrics.meter.done("m", 1, "success", duration_s=duration_s)
    name = "inference_duration_seconds_bucket"
    assert await shown.value(name, model="m", le="0.001") == 1
    assert await shown.value(name, model="m", le="2.5") == 1
    assert await shown.value(name, model="m", le="+Inf") == 2


async def test_a_request_that_failed_is_counted_but_not_timed(shown: Shown) -> None:
    shown.models.put(resident("m", 10))
    shown.metrics.meter.done("m", 1, "rejected", duration_s=0.0, protocol="grpc")
    assert await shown.value("inference_requests_total", outcome="rejected", protocol="grpc") == 1
    assert await shown.value("inference_duration_seconds_count") is None


async def test_clients_cannot_make_up_label_values(shown: Shown) -> None:
    shown.models.put(resident("m", 10))
    before = len(await shown.samples())
    for number in range(100):
        shown.metrics.meter.done(f"made-up-{number}", number, "bad_request", duration_s=0.1)
        shown.metrics.meter.done(UNKNOWN_MODEL, 0, "bad_request", duration_s=0.1)
    assert len(await shown.samples()) == before + 1
    assert await shown.value("inference_requests_total", model=UNKNOWN_MODEL, version="") == 200


@pytest.mark.parametrize("batches", LINES_PER_MODEL)
@pytest.mark.parametrize("triton", [False, True])
async def test_a_model_that_serves_costs_few_lines(batches: bool, triton: bool) -> None:
    shown = Shown(triton=triton)

    def serve(model: str) -> None:
        gen = shown.watched(newborn(spec(model)))
        walk(gen, *RISE)
        gen.measured = {"cpu": {"weights": 1, "workspace": 1}}
        gen.batcher = batcher(1, 1)
        shown.served(gen, batch_size=4 if batches else 0)
        shown.metrics.meter.done(model, 1, "bad_request", duration_s=0.1)

    serve("a")
    before = (await shown.page()).count("\n")
    serve("b")
    most = LINES_PER_MODEL[batches] + (TRITONS_LINES if triton else 0)
    assert (await shown.page()).count("\n") - before <= most


async def test_a_model_that_is_gone_leaves_no_series(shown: Shown) -> None:
    fill(shown)
    assert re.search(r'model="m"', await shown.page())
    shown.models.remove("m")
    shown.metrics.observer.forgotten("m")
    shown.metrics.meter.done("m", 1, "success", duration_s=0.1)  # ended after its model did
    assert not re.search(r'model="m"', await shown.page())
    assert re.search(r'model="bad"', await shown.page())


async def test_a_model_whose_folder_went_after_its_last_generation_leaves_no_series(
    shown: Shown,
) -> None:
    gen = shown.watched(newborn(spec("m")))
    gen.step(Event.RETIRE)
    assert re.search(r'model="m"', await shown.page())
    shown.models.remove("m")  # and `forgotten` is not called
    assert not re.search(r'model="m"', await shown.page())


async def test_a_version_that_is_gone_leaves_no_inference_series(shown: Shown) -> None:
    old, new = resident("m", 10, 1), newborn(spec("m", 2), 2)
    shown.models.put(old, new)
    shown.served(old)
    shown.served(new)
    shown.models.remove("m")
    shown.models.put(new)
    assert await shown.value("inference_requests_total", version="1") is None
    assert await shown.value("inference_requests_total", version="2") == 1


async def test_memory_that_is_nobodys_is_what_the_device_says_less_what_workers_say(
    shown: Shown,
) -> None:
    gen = resident("m", 10)
    at("cuda:1", gen).measured = {"cuda:1": {"weights": 30, "context": 5}}
    shown.models.put(gen)
    shown.models.reports = [DeviceReport("cuda:1", "H", 80, 10, total=100, used=50, uuid="GPU-x")]
    labels = {"gpu": "1", "gpu_uuid": "GPU-x"}
    assert await shown.value("gpu_memory_attributed_bytes", **labels) == 35
    assert await shown.value("gpu_memory_unattributed_bytes", **labels) == 15
    assert await shown.value("gpu_memory_free_bytes", **labels) == 50


async def test_a_gpu_that_does_not_answer_is_said_to_be_down_and_has_no_made_up_numbers(
    shown: Shown,
) -> None:
    shown.models.reports = [DeviceReport("cuda:0", "H", 80, 0)]
    assert await shown.value("gpu_collector_up", gpu="0") == 0
    assert await shown.value("gpu_memory_used_bytes") is None


async def test_a_page_is_kept_for_a_second(shown: Shown) -> None:
    first, _ = await shown.metrics.render()
    shown.models.put(resident("m", 10))
    shown.now += 0.9
    assert (await shown.metrics.render())[0] is first
    shown.now += 0.2
    assert b'model="m"' in (await shown.metrics.render())[0]


async def test_the_page_is_served_over_http(shown: Shown) -> None:
    import httpx

    app = Litestar(
        route_handlers=[router],
        dependencies={"metrics": Provide(lambda: shown.metrics, sync_to_thread=False)},
        logging_config=None,
    )
    transport = httpx.ASGITransport(app=cast("Any", app))
    async with app.lifespan(), httpx.AsyncClient(transport=transport, base_url="http://t") as http:
        answer = await http.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "modeldepot_server_ready 1.0" in answer.text
    assert "process_cpu_seconds_total" in answer.text


def test_metrics_can_be_built_for_a_repository_that_exists() -> None:
    assert build_metrics(ShownRepository()).observer.repository == "models"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not on PATH")
@pytest.mark.parametrize("triton", [False, True])
async def test_promtool_finds_nothing_to_say_but_of_the_units_in_tritons_names(
    triton: bool,
) -> None:
    shown = Shown(triton=triton)
    fill(shown)
    tool = await asyncio.create_subprocess_exec(
        "promtool", "check", "metrics", stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    said, _ = await tool.communicate((await shown.page()).encode())
    unusual = [line for line in said.decode().splitlines() if not MICROSECONDS.fullmatch(line)]
    assert unusual == [] and bool(said) == triton
