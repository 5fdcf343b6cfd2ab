"""The page's text is what prometheus_client would have written, and is kept as long as it is true."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from prometheus_client import exposition
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    UnknownMetricFamily,
)
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse
from prometheus_client.registry import Collector

from repository.errors import NoRoomError
from repository.lifecycle.states import Event
from server.metrics import names, rows
from server.metrics.buckets import Buckets
from server.metrics.lines import Sheet, header
from server.metrics.names import Family
from server.metrics.reading import ModelRow
from server.metrics.traces import Trace
from tests.fakes.heart import at, newborn, resident, spec
from tests.fakes.metrics import RISE, Shown, batcher, fill, walk

OPENMETRICS = "application/openmetrics-text"
TRACE = Trace("trace_id", "0af7651916cd43dd8448eb211c80319c")
KINDS = {
    "gauge": GaugeMetricFamily,
    "counter": CounterMetricFamily,
    "unknown": UnknownMetricFamily,
}


class Given(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families


@pytest.fixture
def shown() -> Shown:
    return Shown()


@pytest.mark.parametrize(
    ("accept", "read", "encode"),
    [
        ("", parse, exposition.generate_latest),
        (OPENMETRICS, parse_openmetrics, openmetrics.generate_latest),
    ],
)
async def test_a_page_that_prometheus_client_reads_and_writes_again_is_the_same_byte_for_byte(
    shown: Shown, accept: str, read: Callable[[str], Iterable[Metric]], encode: Any
) -> None:
    fill(shown)
    page = await shown.page(accept)
    assert encode(Given(read(page))).decode() == page


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0, 1, True, 0.1, 123456.0, 1e6, 123456789, 1.5e300, -3, 2**63])
@pytest.mark.parametrize(
    "label", ["m", 'q"uote', "back\\slash", "new\nline", "ünï", "", "%s", "{x}"]
)
def test_whatever_the_labels_and_values_the_line_is_prometheus_clients(
    kind: Any, value: float, label: str
) -> None:
    family = Family("things", kind, 'It has "quotes" and \\.', ("zone", "model"))
    sheet = Sheet()
    sheet.add(family, value, label, "m")
    theirs = KINDS[kind](family.full, family.help, labels=family.labels)
    theirs.add_metric([label, "m"], value)
    text = sheet.text().plain[family]
    for rich, encode, end in (
        (False, exposition.generate_latest, b""),
        (True, openmetrics.generate_latest, b"# EOF\n"),
    ):
        assert header(family, openmetrics=rich) + text + end == encode(Given([theirs]))


def test_a_histogram_is_written_as_prometheus_client_does() -> None:
    buckets = Buckets(names.LOAD_S)
    for value in (0.001, 0.01, 5.0, 1e9):
        buckets.observe(value)
    sheet = Sheet()
    sheet.add_buckets(names.MODEL_LOAD_DURATION, buckets, "onnx", "read")
    theirs = HistogramMetricFamily(
        names.MODEL_LOAD_DURATION.full, "Loads, by phase.", labels=("backend", "phase")
    )
    edges = [*map(repr, names.LOAD_S), "+Inf"]
    counts = [sum(buckets.counts[: at + 1]) for at in range(len(edges))]
    theirs.add_metric(["onnx", "read"], list(zip(edges, counts, strict=True)), buckets.total)
    family = names.MODEL_LOAD_DURATION
    text = header(family, openmetrics=False) + sheet.text().plain[family]
    assert text == exposition.generate_latest(Given([theirs]))


async def test_a_folder_whose_name_is_no_unicode_has_a_page(shown: Shown) -> None:
    shown.metrics.observer.repository = "caf\udce9"
    shown.metrics.observer.scanned(0.1, 3)
    assert await shown.value("repository_models", repository="caf?") == 3


async def test_a_page_that_broke_in_the_middle_leaves_nothing_out_of_the_next(
    shown: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(shown)
    whole = await shown.page()

    def broken(sheet: Sheet, model: ModelRow) -> None:
        sheet.add(names.MODEL_PINNED, 1, model.name)
        raise RuntimeError("a bug")

    again = Shown()
    fill(again)
    with monkeypatch.context() as patched:
        patched.setattr(rows, "put_model", broken)
        with pytest.raises(RuntimeError):
            await again.page()
    assert series_of(await again.page()) == series_of(whole)


def series_of(page: str) -> list[str]:
    """The beginnings of a page's lines."""
    return [line.rpartition(" ")[0] for line in page.splitlines() if not line.startswith("#")]


async def test_a_page_that_was_written_before_is_what_a_new_one_would_be(shown: Shown) -> None:
    """Step by step, so that each part of a model's text is renewed while others are kept."""
    gen = shown.watched(newborn(spec("m")))
    bad = shown.watched(newborn(spec("bad"), 2))

    def refuse() -> None:
        bad.fault(NoRoomError("no"))

    def reload() -> None:
        walk(shown.watched(newborn(spec("m", print_="f2"), 3)), *RISE)

    steps: list[Callable[[], object]] = [
        lambda: walk(gen, *RISE),
        lambda: setattr(gen, "batcher", batcher(3, 9)),
        lambda: shown.served(gen, batch_size=2),
        lambda: setattr(at("cuda:0", gen), "measured", {"cuda:0": {"weights": 7}}),
        refuse,
        lambda: setattr(gen, "pinned", True),
        reload,
        lambda: shown.metrics.meter.done("nobody", 3, "bad_request", duration_s=0.1),
        lambda: setattr(gen, "pinned", False),
        lambda: shown.models.remove("bad"),
    ]
    for step in steps:
        step()
        for accept in ("", OPENMETRICS):
            kept = (await shown.page(accept)).split("# HELP process_")[0]
            fresh = Shown()
            fresh.metrics.meter, fresh.metrics.observer = (
                shown.metrics.meter,
                shown.metrics.observer,
            )
            fresh.models = shown.models
            fresh.metrics._models = shown.models
            found = (await fresh.page(accept)).split("# HELP process_")[0]
            assert sorted(kept.splitlines()) == sorted(found.splitlines())


async def test_lines_of_one_family_stand_together_below_one_header(shown: Shown) -> None:
    fill(shown)
    cpu = resident("on-the-cpu", 10, 9)  # beside one on a GPU, whose labels are others
    shown.models.put(cpu)
    lines = (await shown.page()).splitlines()
    seen = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(seen) == len(set(seen))


async def test_whoever_leaves_while_a_page_is_made_spoils_it_for_nobody(shown: Shown) -> None:
    fill(shown)
    first = asyncio.ensure_future(shown.metrics.render())
    second = asyncio.ensure_future(shown.metrics.render())
    await asyncio.sleep(0)
    first.cancel()
    page, _ = await second
    assert list(parse(page.decode()))


async def test_both_formats_may_be_asked_for_at_once(shown: Shown) -> None:
    fill(shown)
    (plain, _), (rich, _) = await asyncio.gather(
        shown.metrics.render(), shown.metrics.render(OPENMETRICS)
    )
    assert list(parse(plain.decode())) and rich.endswith(b"# EOF\n")


# exemplars ----------------------------------------------------------------------------------------


async def exemplars(shown: Shown) -> dict[str, Any]:
    """le -> what the bucket of m remembers."""
    return {
        sample.labels["le"]: sample.exemplar
        for family in parse_openmetrics(await shown.page(OPENMETRICS))  # type: ignore[no-untyped-call]
        for sample in family.samples
        if sample.name == "modeldepot_inference_duration_seconds_bucket" and sample.exemplar
    }


async def test_a_bucket_remembers_the_last_request_with_a_trace(shown: Shown) -> None:
    shown.models.put(resident("m", 10))
    done = shown.metrics.meter.done
    done("m", 1, "success", duration_s=0.004, trace=Trace("request_id", "first"))
    done("m", 1, "success", duration_s=0.0045, trace=TRACE)
    done("m", 1, "success", duration_s=0.0046)
    done("m", 1, "success", duration_s=100.0, trace=Trace("request_id", "slow-1"))
    found = await exemplars(shown)
    assert found["0.005"].labels == {"trace_id": TRACE.value}
    assert found["0.005"].value == 0.0045 and found["0.005"].timestamp is not None
    assert found["+Inf"].labels == {"request_id": "slow-1"}
    assert set(found) == {"0.005", "+Inf"}


async def test_the_older_format_has_no_exemplars(shown: Shown) -> None:
    shown.models.put(resident("m", 10))
    shown.metrics.meter.done("m", 1, "success", duration_s=0.004, trace=TRACE)
    assert await exemplars(shown)
    assert TRACE.value not in await shown.page()
    assert list(parse(await shown.page()))


async def test_a_request_that_failed_leaves_no_exemplar(shown: Shown) -> None:
    shown.models.put(resident("m", 10))
    shown.metrics.meter.done("m", 1, "backend_error", duration_s=0.004, trace=TRACE)
    shown.metrics.meter.done("nobody", 1, "success", duration_s=0.004, trace=TRACE)
    assert TRACE.value not in await shown.page(OPENMETRICS)


async def test_exemplars_go_with_their_model(shown: Shown) -> None:
    gen = shown.watched(newborn(spec("m")))
    walk(gen, *RISE)
    shown.metrics.meter.done("m", 1, "success", duration_s=0.004, trace=TRACE)
    assert await exemplars(shown)
    walk(gen, Event.RETIRE, Event.DRAINED, Event.STOPPED)
    shown.models.remove("m")
    assert TRACE.value not in await shown.page(OPENMETRICS)
