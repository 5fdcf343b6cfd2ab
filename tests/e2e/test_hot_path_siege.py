"""A real server on its worst days: large tensors on their way, and something or somebody fails."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from tests.e2e.processes import left_behind, workers
from tests.e2e.server import gone
from tests.e2e.siege import Siege, besieged, until
from tests.models import add_onnx, onnx_model, python_model
from tests.routes import each_route, flags_of
from tests.wire import JSON, Answer, Wire, connected, head, post

pytestmark = pytest.mark.e2e

MIB = 1 << 20
LARGE = 2 * MIB  # numbers: 8 MiB
MIDDLE = 150_000  # numbers: 600 KB
CONFIG = """
backend: python
inputs: [{name: x, datatype: FP32, shape: [-1]}]
outputs: [{name: y, datatype: FP32, shape: [-1]}]
warmup: []
"""
MANNERS = {
    "slow": "import time; time.sleep(0.3); y = x",
    "same": "y = x",
    "cut": "y = x[: int(x[0])]",
    "loud": "import os; os.write(1, b'\\xff\\x00' * 999); os.write(2, b'\\xff\\n' * 99); y = x",
    "writes": "x[0] = 7; y = x",
}


def models(repo: Path) -> None:
    add_onnx(repo / "add" / "1" / "model.onnx")
    add_onnx(repo / "big" / "1" / "model.onnx", shape=(-1,))
    node = helper.make_node("NonZero", ["x"], ["y"])
    path = repo / "nonzero" / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    onnx.save(onnx_model([node], [("x", "FP32", (-1,))], [("y", "INT64", (1, -1))]), path)
    for name, does in MANNERS.items():
        source = f"class Model:\n    def infer(self, inputs):\n        x = inputs['x']; {does}\n"
        python_model(repo / name, source + "        return {'y': y}\n")
        (repo / name / "config.yaml").write_text(CONFIG)


def drawn(size: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).standard_normal(size, np.float32)


def asking(value: np.ndarray[Any, Any], model: str = "big") -> bytes:
    """Bytes both ways."""
    x = {"name": "x", "datatype": "FP32", "shape": list(value.shape),
         "parameters": {"binary_data_size": value.nbytes}}  # fmt: skip
    said = json.dumps({"inputs": [x], "parameters": {"binary_data_output": True}}).encode()
    length = f"Inference-Header-Content-Length: {len(said)}"
    return post(f"/v2/models/{model}/infer", said + value.tobytes(), length)


def told(answer: Answer, dtype: str = "f4") -> np.ndarray[Any, Any]:
    assert answer.status == 200, answer.body[:500]
    return np.frombuffer(
        answer.body[int(answer.headers["inference-header-content-length"]) :], dtype
    )


def memory(siege: Siege, kind: str) -> int:
    """Bytes of the server's own process: Anon, or Shmem, what it has of arenas."""
    text = Path(f"/proc/{siege.running.process.pid}/smaps_rollup").read_text()
    (row,) = [row for row in text.splitlines() if row.startswith(f"Pss_{kind}:")]
    return 1024 * int(row.split()[1])


async def at_rest(siege: Siege) -> None:
    """It answers, nothing is in flight any more, and it has nothing to regret."""
    assert await siege.works()
    async with asyncio.timeout(10):
        while True:
            page = (await siege.client.get("/metrics")).text
            lines = [
                r for r in page.splitlines() if r.startswith("modeldepot_inference_in_flight{")
            ]
            if all(float(row.rpartition(" ")[2]) == 0 for row in lines):
                break
    ours = [row for row in siege.running.log if "ERROR" in row]
    assert not ours


async def order(siege: Siege, what: str, model: str, **more: Any) -> None:
    answer = await siege.client.post(f"/v1/models/{what}", json={"model_name": model, **more})
    assert answer.status_code == 200, answer.text


@each_route
async def test_what_is_half_way_when_its_model_is_reloaded_unloaded_or_killed_is_answered_right(
    tmp_path: Path, route: str
) -> None:
    async with besieged(tmp_path, "--trust-code", *flags_of(route), build=models) as siege:
        value = drawn(LARGE)
        raw = asking(value)

        async def in_two(*, what: str, **more: Any) -> list[Answer]:
            async with AsyncExitStack() as stack:
                wires = [await stack.enter_async_context(connected(siege.port)) for _ in range(6)]
                for wire in wires:
                    await wire.send(raw[: len(raw) // 2])
                await order(siege, what, "big", **more)
                for wire in wires:
                    await wire.send(raw[len(raw) // 2 :])
                return [await wire.answer() for wire in wires]

        for answer in await in_two(what="load", force_reload=True):
            assert np.array_equal(told(answer), value + 1)
        for answer in await in_two(what="unload"):
            assert answer.status == 404 and "big" in answer.text
        await order(siege, "load", "big")
        assert np.array_equal(told(await siege.ask(raw)), value + 1)

        for size in (MIDDLE, LARGE):
            raw = asking(drawn(size), "slow")
            (first,) = workers(siege.running, "slow")
            asked = [asyncio.create_task(siege.ask(raw)) for _ in range(6)]
            answered = await asked[0]
            assert answered.status == 200
            first.kill()
            answers = await asyncio.gather(*asked)
            lost = [answer for answer in answers if answer.status != 200]
            assert lost and all("the worker of 'slow' version 1 died" in a.text for a in lost)
            assert gone([first])
            await order(siege, "load", "slow")
            assert (await siege.ask(raw)).status == 200
        await at_rest(siege)
        held = LARGE * 4 * 3  # of the living: their last places, until they are given back
        await until(lambda: memory(siege, "Shmem") < held)

        children = siege.running.children()
        async with connected(siege.port) as wire:
            await wire.send(raw[: len(raw) // 2])
            siege.running.process.kill()
            assert gone(children) and await wire.end() == b""
        assert not [name for name in left_behind(tmp_path / "models") if "modeldepot" in name]


@each_route
async def test_clients_that_announce_much_or_do_not_read_cost_the_others_nothing(
    tmp_path: Path, route: str
) -> None:
    async with besieged(tmp_path, *flags_of(route), build=few_models) as siege:
        value = drawn(LARGE)
        raw = asking(value)
        assert np.array_equal(told(await siege.ask(raw)), value + 1)
        before = memory(siege, "Anon")
        begun = head("POST", "/v2/models/big/infer", JSON, f"Content-Length: {60 * MIB}",
                     "Inference-Header-Content-Length: 150") + b"{"  # fmt: skip
        async with AsyncExitStack() as stack:
            wires = [await stack.enter_async_context(connected(siege.port)) for _ in range(300)]
            for wire in wires:
                await wire.send(begun)
            for n in range(4):
                for wire in wires:
                    await wire.send(b" ")
                for size in (MIDDLE, LARGE):
                    other = drawn(size, n)
                    assert np.array_equal(told(await siege.ask(asking(other))), other + 1)
            assert memory(siege, "Anon") - before < 96 * MIB
        await at_rest(siege)

        before = memory(siege, "Anon")
        async with AsyncExitStack() as stack:
            wires = [await stack.enter_async_context(connected(siege.port)) for _ in range(24)]
            await hold_back(wires, raw * 3)
            for n in range(3):
                other = drawn(MIDDLE, n)
                assert np.array_equal(told(await siege.ask(asking(other))), other + 1)
            await at_rest(siege)  # what they asked next has not begun
            assert memory(siege, "Anon") - before < 24 * 15 * MIB
            for wire in wires[:4]:
                wire.writer.transport.resume_reading()  # type: ignore[attr-defined]
                for _ in range(3):
                    assert np.array_equal(told(await wire.answer()), value + 1)
            for wire in wires[4:]:
                wire.writer.transport.abort()
        await at_rest(siege)


def few_models(repo: Path) -> None:
    add_onnx(repo / "add" / "1" / "model.onnx")
    add_onnx(repo / "big" / "1" / "model.onnx", shape=(-1,))


async def hold_back(wires: Iterable[Wire], raw: bytes) -> None:
    """They ask, and read nothing; until the server has answered as far as it wants to."""
    for wire in wires:
        wire.writer.transport.pause_reading()  # type: ignore[attr-defined]
        wire.writer.write(raw)
    left, before = 0, -1
    for _ in range(60):
        left, before = sum(w.writer.transport.get_write_buffer_size() for w in wires), left
        if left == before:
            break
        await asyncio.sleep(0.5)


@each_route
async def test_models_of_bad_manners_answer_right_or_say_why_while_two_admins_reload(
    tmp_path: Path, route: str
) -> None:
    async with besieged(tmp_path, "--trust-code", *flags_of(route), build=models) as siege:
        for n, size in enumerate((10, MIDDLE, MIDDLE, 2 * MIDDLE, 20, LARGE, LARGE)):
            value = drawn(size, n)
            value[0] = 1 + n * size // 10
            for model in ("same", "loud"):
                assert np.array_equal(told(await siege.ask(asking(value, model))), value)
            cut = told(await siege.ask(asking(value, "cut")))
            assert np.array_equal(cut, value[: int(value[0])])
            value[value < n / 4] = 0
            found = told(await siege.ask(asking(value, "nonzero")), "i8")
            assert np.array_equal(found, np.nonzero(value)[0])
            refused = await siege.ask(asking(value, "writes"))
            assert refused.status == 500 and "read-only" in refused.text

        asked = 0

        async def traffic(seed: int, done: asyncio.Event) -> None:
            nonlocal asked
            async with connected(siege.port) as wire:
                while not done.is_set():
                    asked += 1
                    value = drawn((10, MIDDLE, LARGE)[asked % 3], seed)
                    await wire.send(asking(value))
                    assert np.array_equal(told(await wire.answer()), value + 1)

        async def admin() -> None:
            for _ in range(4):
                await order(siege, "load", "big", force_reload=True)

        done = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for seed in range(4):
                group.create_task(traffic(seed, done))
            await asyncio.gather(admin(), admin())
            done.set()
        assert asked > 8
        await at_rest(siege)


@each_route
async def test_large_json_that_means_harm_is_refused_clearly_while_others_are_answered(
    tmp_path: Path, route: str
) -> None:
    size = 8 * MIB
    data = {
        "brackets": (b"[" * size, "nested"),
        "digits": (b"[" + b"9" * size + b"]", "out of range"),
        "a text": (b'"' + b"a" * size + b'"', "Expected `array`"),
        "too large": (b"[" + b"1e999," * MIDDLE + b"1e999]", "out of range"),
        "shape": (b"[1]", "has 0 elements|its shape|memory"),
    }
    async with besieged(tmp_path, *flags_of(route), build=few_models) as siege:
        for label, (text, why) in data.items():
            shape = b"[4611686018427387904,4]" if label == "shape" else b"[1]"
            raw = b'{"inputs":[{"name":"x","datatype":"FP32","shape":%b,"data":%b}]}' % (
                shape,
                text,
            )
            async with siege.asking_on(siege.works, every_s=0.02):
                answer = await siege.ask(post("/v2/models/big/infer", raw))
            assert answer.status == 400, label
            assert any(word in answer.text for word in why.split("|")), answer.text
        nested = b'{"inputs":' + b"[" * 10_000 + b"]" * 10_000 + b"}"
        for length in (str(len(nested)), "99999999", "999999999999999999", "-1", "5"):
            said = f"Inference-Header-Content-Length: {length}"
            answer = await siege.ask(post("/v2/models/big/infer", nested + bytes(MIDDLE), said))
            assert answer.status == 400 and len(answer.text) < 500
        await at_rest(siege)
