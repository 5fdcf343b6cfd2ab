"""Aphrodite's two calls against a real server, row by row of what it documents; errors too."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.e2e.aphrodite import (
    ALPHA_BYTES,
    BETA_BYTES,
    KIB,
    LOAD,
    UNLOAD,
    Depot,
    adding,
    adds_up,
    depot_in,
    form,
    is_aphrodites,
    write,
)
from tests.e2e.processes import inside, workers
from tests.e2e.server import WITHIN_S, open_gate, reached, serving

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

KEYS = {"admin": "key-admin", "inference": "key-inference"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def depot(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Depot]:
    async with depot_in(tmp_path_factory.mktemp("aphrodite")) as found:
        yield found


# load -------------------------------------------------------------------------------------------


async def test_a_load_without_a_body_loads_the_default_model(depot: Depot) -> None:
    await depot.loaded()
    answer = await depot.load()
    found = answer.json()
    took_s = found["load_time_s"]
    assert answer.status_code == 200
    assert found == {
        "status": "success",
        "message": f"Model loaded successfully in {took_s:.2f}s.",
        "load_time_s": took_s,
        "model": "alpha",
    }
    assert 0 < took_s < WITHIN_S and took_s == round(took_s, 2)
    assert await depot.value("alpha") == 0


async def test_a_load_without_a_body_brings_back_what_the_folder_says(depot: Depot) -> None:
    await depot.loaded()
    await depot.load({"model": "alpha", "config": adding(5)})
    assert await depot.value("alpha") == 5
    assert (await depot.load()).json()["status"] == "success"
    assert await depot.value("alpha") == 0


async def test_what_is_loaded_already_is_news_and_no_error(depot: Depot) -> None:
    await depot.loaded("alpha")
    before = await depot.truth()
    info = {"status": "info", "message": "Model 'alpha' is already loaded in the registry."}
    for body in (None, {}, {"model": "alpha"}):
        answer = await depot.load(body)
        assert (answer.status_code, answer.json()) == (200, info)
    assert await depot.truth() == before
    config = {"model": "alpha", "config": adding(6)}
    assert (await depot.load(config)).json()["status"] == "success"
    assert (await depot.load(config)).json() == info


@pytest.mark.parametrize("spelling", ["nested", "flat", "form", "yaml"])
async def test_a_config_comes_in_each_of_four_ways_and_is_told_with_its_sources(
    depot: Depot, spelling: str
) -> None:
    """`yaml`: the model is named in the file too."""
    await depot.loaded()
    config = {"priority": 3, **adding(2)}
    text = "priority: 3\noptions: {parameters: {add: 2}}\n"
    answer = {
        "nested": lambda: depot.load({"model": "alpha", "config": config}),
        "flat": lambda: depot.load({"model": "alpha", **config}),
        "form": lambda: depot.load(**form(text, model="alpha")),
        "yaml": lambda: depot.load(**form("model: alpha\n" + text)),
    }[spelling]
    found = (await answer()).json()
    source = "uploaded" if spelling == "yaml" else "request"
    assert found["model"] == "alpha" and found["status"] == "success", found
    assert next(iter(found["config_applied"])) == "model"
    assert found["config_applied"].pop("model") == {"value": "alpha", "source": source}
    assert found["config_applied"].pop("priority") == {"value": 3, "source": "uploaded"}
    assert found["config_applied"].pop("options")["source"] == "uploaded"
    assert all(v["source"] == "server" for v in found["config_applied"].values())
    assert await depot.value("alpha") == 2


async def test_nested_wins_over_flat(depot: Depot) -> None:
    await depot.loaded()
    answer = await depot.load({"model": "alpha", "config": adding(4), **adding(9)})
    assert answer.status_code == 200 and await depot.value("alpha") == 4


async def test_a_config_without_a_model_is_for_the_default_one(depot: Depot) -> None:
    await depot.loaded()
    applied = (await depot.load({"priority": 1})).json()["config_applied"]
    assert applied["model"] == {"value": "alpha", "source": "server"}
    assert applied["priority"] == {"value": 1, "source": "uploaded"}


async def test_a_dash_in_a_key_is_an_underscore(depot: Depot) -> None:
    await depot.loaded()
    answer = await depot.load(**form("served-model-name: other\ntensor-parallel-size: 1\n"))
    applied = answer.json()["config_applied"]
    assert applied["served_model_name"] == {"value": "other", "source": "uploaded"}
    assert applied["tensor_parallel_size"] == {"value": 1, "source": "uploaded"}
    assert await depot.value("other") == 0


async def test_the_folders_own_config_counts_until_a_request_brings_another(depot: Depot) -> None:
    await depot.loaded()
    own = {"value": "second", "source": "model_dir"}
    assert (await depot.load({"model": "beta"})).json()["config_applied"][
        "served_model_name"
    ] == own
    assert await depot.value("second") == 0

    applied = (await depot.load({"model": "beta", "config": adding(1)})).json()["config_applied"]
    assert "model_dir" not in [v["source"] for v in applied.values()]
    assert await depot.value("beta") == 1
    assert (await depot.infer("second")).status_code == 404

    again = (await depot.load({"model": "beta"})).json()
    assert again["config_applied"]["served_model_name"] == own
    assert await depot.value("second") == 0


async def test_a_model_may_be_a_path_in_an_allowed_folder(depot: Depot) -> None:
    await depot.loaded()
    path = str(depot.root / "far")
    found = (await depot.load({"model": path})).json()
    assert found["status"] == "success" and found["model"] == path
    assert found["config_applied"]["model"] == {"value": path, "source": "request"}
    gone = (await depot.unload({"model": path})).json()
    assert gone["status"] == "success" and len(gone["unloaded_models"]) == 1
    inside_repo = await depot.load({"model": str(depot.repo / "beta")})
    assert inside_repo.status_code == 200 and await depot.value("beta") == 0


# unload -----------------------------------------------------------------------------------------


async def test_an_unload_tells_its_times_and_what_came_back(depot: Depot) -> None:
    await depot.loaded("alpha", "beta")
    answer = await depot.unload({"model": "alpha"})
    found = answer.json()
    assert answer.status_code == 200
    assert found["status"] == "success"
    assert found["message"] == (
        f"Model unloaded successfully in {found['total_time_s']:.2f}s. 1000KiB of memory came back."
    )
    assert found["freed_bytes"] == ALPHA_BYTES and found["unloaded_models"] == ["alpha"]
    adds_up(found)
    assert not workers(depot.server, "alpha") and workers(depot.server, "beta")
    assert await depot.value("beta") == 0


async def test_an_unload_without_a_body_unloads_all(depot: Depot) -> None:
    await depot.loaded("alpha", "beta")
    answer = await depot.client.post(UNLOAD)
    found = answer.json()
    assert answer.status_code == 200 and found["unloaded_models"] == ["alpha", "beta"]
    assert found["freed_bytes"] == ALPHA_BYTES + BETA_BYTES
    adds_up(found)
    assert not workers(depot.server)


async def test_nothing_loaded_is_news_for_all_and_a_404_for_one(depot: Depot) -> None:
    await depot.loaded()
    answer = await depot.unload()
    assert (answer.status_code, answer.json()) == (
        200,
        {"status": "info", "message": "Model is already unloaded."},
    )
    for name in ("alpha", "nobody", "org/nobody"):
        answer = await depot.unload({"model": name})
        assert (answer.status_code, answer.json()) == (
            404,
            {"status": "error", "message": f"Model '{name}' is not loaded."},
        )


async def test_an_unload_fences_the_model_and_lets_running_requests_end(depot: Depot) -> None:
    await depot.loaded()
    answer = await depot.load({"model": "alpha", "config": adding(1, infer="drain")})
    assert answer.status_code == 200, answer.text
    loop = asyncio.get_running_loop()
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(depot.infer("alpha"))
        await reached(depot.gates, "drain")
        await inside(depot.client, "alpha", 1)
        unload = tasks.create_task(depot.unload({"model": "alpha"}))
        await depot.told.until(
            lambda e: e.model == "alpha" and e.data.get("state") == "draining",
            after=depot.told.events[-1].id,
        )
        began = loop.time()
        for _ in range(5):
            fenced = await depot.infer("alpha")
            assert fenced.status_code == 503 and int(fenced.headers["retry-after"]) >= 1
        assert not running.done() and not unload.done()
        drained_s = loop.time() - began
        open_gate(depot.gates, "drain")
    assert running.result().status_code == 200
    found = unload.result().json()
    assert found["status"] == "success" and found["drain_time_s"] >= round(drained_s, 2) - 0.01
    adds_up(found)
    assert (await depot.infer("alpha")).status_code == 404


# what is refused --------------------------------------------------------------------------------

JSON = {"content-type": "application/json"}
MULTI = {"content-type": "multipart/form-data; boundary=b"}
YAML = "Invalid YAML config file: "
REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "broken YAML": (form("a: [1\n", model="beta"), 400, YAML + "config.yaml:2"),
    "YAML that is a list": (form("- a\n", model="beta"), 400, YAML),
    "YAML that is empty": (form("", model="beta"), 400, YAML),
    "YAML with aliases": (form("a: &x 1\nb: *x\n", model="beta"), 400, YAML),
    "deep YAML": (form("options: " + "[" * 40 + "]" * 40, model="beta"), 400, YAML),
    "long YAML": (form("a: '" + "x" * 300_000 + "'", model="beta"), 400, "256 KiB"),
    "YAML with a key twice": (form("priority: 1\npriority: 2\n", model="beta"), 400, YAML),
    "malformed JSON": ({"content": b'{"model": "beta"', "headers": JSON}, 400, "Invalid JSON"),
    "JSON that is a list": ({"json": ["beta"]}, 400, "Invalid JSON"),
    "JSON in a form": ({"content": b'{"model": "beta"}', "headers": MULTI}, 400, "Invalid form"),
    "JSON by curl without a header": (
        {
            "content": b'{"model": "beta"}',
            "headers": {"content-type": "application/x-www-form-urlencoded"},
        },
        400,
        "Content-Type: application/json",
    ),
    "another type": (
        {"content": b"model: beta", "headers": {"content-type": "application/yaml"}},
        400,
        "application/yaml",
    ),
    "an unknown key": ({"json": {"model": "beta", "max_model_length": 8}}, 400, "max_model_len"),
    "an unknown key far from all": ({"json": {"model": "beta", "qqqq": 8}}, 400, "known keys"),
    "an unknown nested key": ({"json": {"model": "beta", "config": {"quux": 8}}}, 400, "'quux'"),
    "an unknown key of a form": (form("quantizatoin: fp8\n", model="beta"), 400, "quantizatoin"),
    "a bad value": ({"json": {"model": "beta", "gpu_memory_utilization": 9}}, 400, "at most 1"),
    "two GPUs": ({"json": {"model": "beta", "tensor_parallel_size": 2}}, 400, "must be 1"),
    "a key that does not fit": ({"json": {"model": "beta", "max_model_len": 8}}, 400, "python"),
    "two models": (form("model: beta\n", model="alpha"), 400, "'beta'"),
    "no name": ({"json": {"model": ""}}, 400, "'model' must be"),
    "a name that none can have": ({"json": {"model": "a b"}}, 400, "invalid model name"),
    "an unknown model": ({"json": {"model": "nobody"}}, 404, "nobody"),
    "a path elsewhere": ({"json": {"model": "/etc"}}, 403, ""),
    "a path that climbs": ({"json": {"model": "./../elsewhere/../gates"}}, 403, ""),
    "a load that fails": ({"json": {"model": "org/broken"}}, 500, "it was told to fail"),
    "too large for the memory": ({"json": {"model": "beta", "memory": 2**40}}, 507, "memory"),
    "a long body": ({"json": {"model": "beta", "x": "y" * 1100 * KIB}}, 413, "1048576"),
}


@pytest.fixture(scope="module")
def alpha_serves() -> list[bool]:
    """Refusals change nothing: one load is enough for all of them."""
    return []


@pytest.mark.parametrize("case", REFUSED)
async def test_what_is_refused_says_why_and_neither_loads_nor_unloads(
    depot: Depot, alpha_serves: list[bool], case: str
) -> None:
    if not alpha_serves:
        await depot.loaded("alpha")
        alpha_serves.append(True)
    before = await depot.truth()
    how, status, text = REFUSED[case]
    message = is_aphrodites(await depot.client.post(LOAD, **how), status)
    assert text in message and str(depot.repo) not in message
    assert await depot.truth() == before
    assert await depot.value("alpha") == 0


@pytest.mark.parametrize("body", [b'{"modle": "alpha"}', b'{"model": null}', b"[]", b"{"])
async def test_an_unload_that_is_not_understood_unloads_nothing(depot: Depot, body: bytes) -> None:
    await depot.load({"model": "beta"})
    before = await depot.truth()
    is_aphrodites(await depot.client.post(UNLOAD, content=body, headers=JSON), 400)
    assert await depot.truth() == before


async def test_an_unload_of_a_path_that_is_out_of_bounds_is_refused(depot: Depot) -> None:
    is_aphrodites(await depot.unload({"model": "/etc"}), 403)


async def test_both_calls_are_an_admins_and_the_only_model_is_the_default_one(
    tmp_path: Path, gates: Path, repo: Path
) -> None:
    digests = {name: hashlib.sha256(key.encode()).hexdigest() for name, key in KEYS.items()}
    rows = [f'  - {{name: {n}, sha256: "{d}", scopes: [{n}]}}\n' for n, d in digests.items()]
    (tmp_path / "keys.yaml").write_text("keys:\n" + "".join(rows))
    write(repo / "only", gates)
    flags = ("--model-control-mode", "explicit", "--api-keys", str(tmp_path / "keys.yaml"))
    async with serving(repo, "--settle", "0.1", *flags) as server, server.client() as client:
        for path in (LOAD, UNLOAD):
            nobody = is_aphrodites(await client.post(path), 401)
            weak = await client.post(path, headers={"x-api-key": KEYS["inference"]})
            assert "API key" in nobody and "admin" in is_aphrodites(weak, 403)
        client.headers["x-api-key"] = KEYS["admin"]
        is_aphrodites(await client.get(LOAD), 405)
        assert (await client.post(LOAD)).json()["model"] == "only"
        assert (await client.post(UNLOAD)).json()["unloaded_models"] == ["only"]
        write(repo / "another", gates)
        assert (await client.post(LOAD, json={"model": "another"})).status_code == 200
        assert "default-model" in is_aphrodites(await client.post(LOAD), 400)


# loads that take their time -----------------------------------------------------------------------


async def test_the_old_model_serves_on_while_a_load_with_a_config_fails(depot: Depot) -> None:
    await depot.loaded("alpha")
    over = asyncio.Event()
    answered = 0

    async def use() -> None:
        nonlocal answered
        while not over.is_set():
            assert await depot.value("alpha") == 0
            answered += 1

    async with asyncio.TaskGroup() as users:
        for _ in range(4):
            users.create_task(use())
        before = await depot.truth()
        for again in range(3):
            body = {"model": "alpha", "config": adding(again, fail=True)}
            assert "told to fail" in is_aphrodites(await depot.load(body), 500)
        assert await depot.truth() == before
        over.set()
    assert answered > 4
    assert (await depot.load({"model": "alpha"})).json()["status"] == "info"


async def test_health_and_the_old_model_answer_while_a_load_takes_its_time(depot: Depot) -> None:
    await depot.loaded("alpha")
    async with asyncio.TaskGroup() as tasks:
        load = tasks.create_task(depot.load({"model": "alpha", "config": adding(7, load="slow")}))
        await reached(depot.gates, "slow")
        for _ in range(20):
            assert (await depot.client.get("/health")).status_code == 200
            assert await depot.value("alpha") == 0
        assert not load.done()
        open_gate(depot.gates, "slow")
    assert load.result().json()["status"] == "success"
    assert await depot.value("alpha") == 7


async def test_a_load_that_an_unload_overtakes_is_told_so(depot: Depot) -> None:
    await depot.loaded()
    load = asyncio.create_task(depot.load({"model": "alpha", "config": adding(7, load="late")}))
    await reached(depot.gates, "late")
    assert (await depot.unload({"model": "alpha"})).json()["unloaded_models"] == ["alpha"]
    assert "overtaken" in is_aphrodites(await load, 409)
    assert (await depot.truth())["alpha"] == []
