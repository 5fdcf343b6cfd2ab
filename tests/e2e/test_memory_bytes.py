"""Memory rules where the bytes are real: models of 300 MiB of weights, each in a worker of its own, on a
device of 1 GiB.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import tiny
from tests.e2e.rooms import (
    DEVICE,
    EXPLICIT,
    MIB,
    Ground,
    Room,
    add_real,
    ground_in,
    put_weights,
)

pytestmark = pytest.mark.e2e

SIZE = 300 * MIB
FLAGS = (*EXPLICIT, *DEVICE, "--min-residency", "0", "--host-tier", "700MiB")
TEXT = {"prompt": "the quick brown fox", "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    home = tmp_path_factory.mktemp("bytes")
    repo = home / "models"
    for name in "abcd":
        add_real(repo, name, more="evict_to: host")
    for name in ("wide", "checked"):
        add_real(repo, name, 600)
    check = {"inputs": [tensor("x", 0.0)], "outputs": [tensor("y", 1.0)]}
    (repo / "checked" / "checks").mkdir()
    (repo / "checked" / "checks" / "one.json").write_text(json.dumps(check))
    tiny.write_text_model(repo / "words")
    (repo / "words" / "config.yaml").write_text("sleep_s: 0.3\n")
    with ground_in(home, *FLAGS) as found:
        yield found


def tensor(name: str, value: float) -> dict[str, Any]:
    return {"name": name, "datatype": "FP32", "shape": [1, 4], "data": [value] * 4}


async def test_a_model_is_estimated_before_and_measured_after_and_an_unload_returns_it_all(
    ground: Ground,
) -> None:
    async with ground.room() as room:
        memory = (await room.page("a"))["memory"]
        estimated = memory["estimated"]
        assert SIZE < estimated < 1.5 * SIZE
        assert memory["reserved"] == 0 and memory["measured"] == {}
        would = await room.foretold("a")
        assert (would["bytes_needed"], would["source"]) == (estimated, memory["source"])

        await room.load("a")
        page = await room.page("a")
        memory = page["memory"]
        assert memory["measured"]["weights"] == pytest.approx(SIZE, rel=0.01)
        assert memory["reserved"] >= SIZE and (await room.reserved())["cpu"] == memory["reserved"]
        assert memory["devices"]["cpu"]["reserved"] == memory["reserved"]
        assert memory["devices"]["cpu"]["measured"] == memory["measured"]
        (gen,) = page["generations"]
        assert gen["memory"] == memory and gen["devices"] == ["cpu"]

        ended = await room.done("unload", "a")
        assert ended["freed_bytes"] == memory["reserved"]
        assert ended["leaked_bytes"] == 0 and ended["confirmed"]
        assert (await room.reserved())["cpu"] == 0 and (await room.page("a"))["leaked_bytes"] == 0


async def test_what_was_measured_is_the_next_estimate_also_after_a_restart(
    tmp_path: Path,
) -> None:
    add_real(tmp_path / "models", "a")
    with ground_in(tmp_path, *FLAGS) as first:
        async with first.room() as room:
            assert (await room.foretold("a"))["source"] == "estimate"
            await room.load("a")
            measured = sum((await room.page("a"))["memory"]["measured"].values())
            await room.done("unload", "a")
            would = await room.foretold("a")
            assert would["source"] == "measured"
            assert would["bytes_needed"] == pytest.approx(measured, rel=0.1)
        first.server.process.terminate()
        first.server.process.wait()
    with ground_in(tmp_path, *FLAGS) as again:
        async with again.room() as room:
            memory = (await room.page("a"))["memory"]
            assert (memory["source"], memory["estimated"]) == ("measured", would["bytes_needed"])
            await room.load("a")
            page = await room.page("a")
            assert page["generations"][0]["memory"]["source"] == "measured"
            put_weights(again.repo / "a" / "1" / "model.safetensors", SIZE // 4, 2.0)
            await room.told.ready("a", after=page["generations"][0]["serial"])
            assert await room.value("a") == 2.0


async def test_sleep_gives_the_device_back_and_wake_answers_as_before(ground: Ground) -> None:
    async with ground.room() as room:
        await room.load("a")
        before = (await room.page("a"))["memory"]["reserved"]
        worker = room.worker("a")
        assert await room.value("a") == 1.0
        slept = await room.done("sleep", "a")
        after = await room.reserved()
        assert slept["freed"]["cpu"] == before - after["cpu"] > 0.9 * SIZE
        assert after["host"] == slept["host_bytes"] >= 0.99 * SIZE
        memory = (await room.page("a"))["memory"]
        assert sum(memory["devices"]["host"]["measured"].values()) == after["host"]
        woken = await room.done("wake", "a")
        assert woken["woken"] and room.worker("a") == worker
        assert await room.value("a") == 1.0 and (await room.reserved())["host"] == 0


async def test_more_models_than_memory_take_turns_through_the_host_tier(ground: Ground) -> None:
    async with ground.room() as room:
        await room.load("a", "b", "c", "d")
        assert await room.asleep() == {"a"} and await room.loaded() == {"b", "c", "d"}
        for _ in range(2):
            for name in "abcd":
                assert await room.value(name) == 1.0
                held = await room.reserved()
                assert held["cpu"] <= 1024 * MIB and held["host"] <= 700 * MIB
        assert {reason for _, reason in room.evicted()} == {"memory"}
        assert "failed" not in [state for name in "abcd" for state in room.states(name)]


async def test_a_text_model_that_sleeps_is_woken_by_any_of_its_faces(ground: Ground) -> None:
    async with ground.room() as room:
        await room.load("words")
        first = await written(room, stream=False)
        last = await room.step("words", "asleep")
        for stream in (True, False):
            assert await written(room, stream=stream) == first
            last = await room.told.until(lambda e: e.data.get("state") == "asleep", last.id)
        assert len(set(room.told.generations("words"))) == 3


async def written(room: Room, *, stream: bool) -> str:
    body: dict[str, Any] = {"model": "words", **TEXT, "stream": stream}
    got = await room.client.post("/v1/completions", json=body)
    assert got.status_code == 200, got.text
    if not stream:
        text: str = got.json()["choices"][0]["text"]
        return text
    return "".join(pieces(got))


def pieces(got: httpx.Response) -> Iterator[str]:
    for line in got.text.splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                yield choice["text"]


async def test_a_torn_file_is_seen_before_the_old_one_leaves(ground: Ground) -> None:
    async with ground.room() as room:
        await room.load("wide")
        (serves,) = room.told.generations("wide")
        path = ground.repo / "wide" / "1" / "model.safetensors"
        put_weights(path, 150 * MIB, 2.0, missing=MIB)
        await room.told.problem("wide")
        assert room.states("wide", serves)[-1] == "ready" and await room.value("wide") == 1.0
        put_weights(path, 150 * MIB, 2.0)
        await room.told.ready("wide", after=serves)
        assert await room.value("wide") == 2.0


async def test_what_disagrees_with_its_checks_is_rolled_back_to_what_served(ground: Ground) -> None:
    async with ground.room() as room:
        await room.load("checked")
        (serves,) = room.told.generations("checked")
        path = ground.repo / "checked" / "1" / "model.safetensors"
        put_weights(path, 150 * MIB, 5.0)
        failed = await room.told.failed("checked", after=serves)
        back = await room.told.ready("checked", after=failed.generation)
        page = await room.page("checked")
        assert page["rolled_back"] and page["last_error"]["code"] == "check_failed"
        assert await room.value("checked") == 1.0
        put_weights(path, 150 * MIB, 1.0)
        await room.told.ready("checked", after=back.generation)
        assert not (await room.page("checked"))["rolled_back"]
