"""Ensembles on a real server: real ONNX models in real workers, asked over HTTP, while their steps come
and go. One server for all; each test has models of its own."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import onnx
import pytest
import pytest_asyncio
from onnx import TensorProto, helper

from tests.e2e.server import WITHIN_S, Running, serving
from tests.models import add_onnx, onnx_model, two_by_two_onnx
from tests.triton_python import SOURCES

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

FLAGS = ("--model-control-mode", "explicit", "--settle", "0.2", "--watch", "notify")
PBTXT = """
platform: "ensemble"
max_batch_size: 8
input [ { name: "in" data_type: TYPE_FP32 dims: [ 4 ] } ]
output [ { name: "out" data_type: TYPE_FP32 dims: [ 4 ] } ]
ensemble_scheduling {
  step [
    { model_name: "one" model_version: -1
      input_map { key: "x" value: "in" } output_map { key: "y" value: "mid" } },
    { model_name: "ten" model_version: -1
      input_map { key: "x" value: "mid" } output_map { key: "y" value: "out" } }
  ]
}
"""
BROKEN = """
class Model:
    def load(self, *_):
        raise RuntimeError("these weights fit no layer")
    def infer(self, inputs):
        return {"y": inputs["x"]}
"""
MENDED = BROKEN.replace('raise RuntimeError("these weights fit no layer")', "pass")
PYTHON = """
backend: python
max_batch_size: 8
inputs: [{name: x, datatype: FP32, shape: [4]}]
outputs: [{name: y, datatype: FP32, shape: [4]}]
warmup: []
"""


REPEAT = """
backend: "python" max_batch_size: 0
input [
  { name: "IN" data_type: TYPE_INT32 dims: [ -1 ] },
  { name: "DELAY" data_type: TYPE_UINT32 dims: [ -1 ] }
]
output [
  { name: "OUT" data_type: TYPE_INT32 dims: [ 1 ] },
  { name: "IDX" data_type: TYPE_UINT32 dims: [ 1 ] }
]
model_transaction_policy { decoupled: true }
"""
MANY = """
backend: ensemble
decoupled: true
ensemble:
  max_inflight: 1
  steps:
    - {model: repeat, inputs: {IN: in, DELAY: delay}, outputs: {OUT: whole, IDX: index}}
    - {model: as_floats, inputs: {x: whole}, outputs: {y: out}}
outputs: [{name: out, datatype: FP32, shape: [1]}, {name: index, datatype: UINT32, shape: [1]}]
"""


class House:
    def __init__(self, repo: Path, server: Running, client: httpx.AsyncClient) -> None:
        self.repo, self.server, self.client = repo, server, client

    def add(self, name: str, value: float, version: int = 1) -> None:
        """y = x + value, in batches of up to 8."""
        write_add(self.repo, name, value, version)

    def chain(self, name: str, *models: str, **more: Any) -> None:
        write_chain(self.repo, name, *models, **more)

    async def load(self, name: str) -> httpx.Response:
        return await self.client.post(f"/v2/repository/models/{name}/load")

    async def unload(self, name: str, **parameters: Any) -> None:
        body = {"parameters": parameters} if parameters else None
        got = await self.client.post(f"/v2/repository/models/{name}/unload", json=body)
        assert got.status_code == 200, got.text
        await self.until(name, "unloaded")

    async def loaded(self, *names: str) -> None:
        for name in names:
            got = await self.load(name)
            assert got.status_code == 200, got.text

    async def ask(self, name: str, *rows: float, tensor: str = "in") -> httpx.Response:
        data = [value for value in rows or (0.0,) for _ in range(4)]
        shape = [len(rows) or 1, 4]
        body = {"inputs": [{"name": tensor, "datatype": "FP32", "shape": shape, "data": data}]}
        return await self.client.post(f"/v2/models/{name}/infer", json=body)

    async def answer(self, name: str, *rows: float) -> list[float]:
        """The first number of each row."""
        got = await self.ask(name, *rows)
        assert got.status_code == 200, got.text
        found: list[float] = got.json()["outputs"][0]["data"]
        return found[::4]

    async def show(self, name: str) -> dict[str, Any]:
        got: dict[str, Any] = (await self.client.get(f"/v1/models/{name}")).json()
        return got

    async def until(self, name: str, state: str) -> dict[str, Any]:
        async with asyncio.timeout(WITHIN_S):
            while True:
                found = await self.show(name)
                if found.get("state") == state:
                    return found
                await asyncio.sleep(0.02)


def write_add(repo: Path, name: str, value: float, version: int = 1) -> None:
    folder = repo / name
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text("max_batch_size: 8\n")
    made = add_onnx(repo.parent / f"{name}.onnx", value)
    (folder / str(version)).mkdir(exist_ok=True)
    made.rename(folder / str(version) / "model.onnx")


def write_chain(repo: Path, name: str, *models: str, inner: tuple[str, str] = ("x", "y")) -> None:
    """`models` one behind the other; of those whose names begin with "chain" `in` and `out`."""
    tensors = ["in", *(f"t{i}" for i in range(1, len(models))), "out"]
    steps = []
    for i, model in enumerate(models):
        takes, gives = ("in", "out") if model.startswith("chain") else inner
        steps.append(
            f"    - model: {model}\n      inputs: {{{takes}: {tensors[i]}}}\n"
            f"      outputs: {{{gives}: {tensors[i + 1]}}}\n"
        )
    (repo / name).mkdir(exist_ok=True)
    (repo / name / "config.yaml").write_text(
        "backend: ensemble\nmax_batch_size: 8\n"
        "inputs: [{name: in, datatype: FP32, shape: [4]}]\n"
        "outputs: [{name: out, datatype: FP32, shape: [4]}]\n"
        f"ensemble:\n  steps:\n{''.join(steps)}"
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    repo = tmp_path_factory.mktemp("ensembles") / "models"
    repo.mkdir()
    write_add(repo, "one", 1)
    write_add(repo, "ten", 10)
    write_add(repo, "hundred", 100)
    write_chain(repo, "chain", "one", "ten", "hundred")
    async with serving(repo, *FLAGS) as server, server.client() as client:
        yield House(repo, server, client)


@asynccontextmanager
async def hammering(house: House, name: str, allowed: set[float]) -> AsyncIterator[list[int]]:
    """Clients that ask without a pause; what they are told is right, or that it cannot be had now.
    Yields the numbers of what was answered: [right, refused]."""
    found, over = [0, 0], asyncio.Event()

    async def client(n: int) -> None:
        while not over.is_set():
            got = await house.ask(name, float(n))
            if got.status_code == 200:
                (value,) = got.json()["outputs"][0]["data"][:1]
                assert value - n in allowed, value
                found[0] += 1
            else:
                assert got.status_code in (404, 503), got.text
                found[1] += 1

    async with asyncio.TaskGroup() as clients:
        for n in range(4):
            clients.create_task(client(n))
        try:
            yield found
        finally:
            over.set()


async def comes(true: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(WITHIN_S):
        while True:
            if await true():
                return
            await asyncio.sleep(0.02)


async def more(found: list[int], which: int) -> None:
    least = found[which] + 5

    async def enough() -> bool:
        return found[which] >= least

    await comes(enough)


async def _answers(house: House, name: str, value: float) -> bool:
    got = await house.ask(name, 0)
    return got.status_code == 200 and got.json()["outputs"][0]["data"][0] == value


async def test_loading_it_loads_its_models_and_batches_go_through(house: House) -> None:
    assert (await house.show("one"))["state"] == "unloaded"
    await house.loaded("chain")
    assert (await house.show("ten"))["state"] == "loaded"
    assert await house.answer("chain", 0, 5) == [111, 116]
    told = (await house.client.get("/v2/models/chain")).json()
    assert told["platform"] == "ensemble"
    assert told["inputs"] == [{"name": "in", "datatype": "FP32", "shape": [-1, 4]}]


async def test_triton_s_own_config_says_the_same(house: House) -> None:
    folder = house.repo / "theirs"
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(PBTXT)
    await house.loaded("theirs")
    assert await house.answer("theirs", 2) == [13]


async def test_a_branch_and_a_join_and_an_ensemble_in_an_ensemble(house: House) -> None:
    folder = house.repo / "two"
    (folder / "1").mkdir(parents=True)
    (folder / "config.yaml").write_text("max_batch_size: 8\n")
    two_by_two_onnx(folder / "1" / "model.onnx")
    house.repo.joinpath("fork").mkdir()
    (house.repo / "fork" / "config.yaml").write_text(
        "backend: ensemble\nensemble:\n  steps:\n"
        "    - {model: two, inputs: {a: l, b: r}, outputs: {total: sum}}\n"
        "    - {model: chain, inputs: {in: in}, outputs: {out: l}}\n"
        "    - {model: ten, inputs: {x: in}, outputs: {y: r}}\n"
    )
    await house.loaded("fork")
    assert await house.answer("fork", 1, 2) == [1 + 111 + 1 + 10, 2 + 111 + 2 + 10]


async def test_what_is_wrong_with_a_request_is_told_before_a_step_runs(house: House) -> None:
    await house.loaded("chain")
    got = await house.ask("chain", *range(9))
    assert got.status_code == 400 and "batch-size must be <= 8" in got.text
    got = await house.ask("chain", tensor="x")
    assert got.status_code == 400 and "unexpected inference input 'x'" in got.text


async def test_a_step_that_is_reloaded_under_load_never_gives_a_wrong_answer(house: House) -> None:
    house.add("swapped", 10)
    house.chain("reloaded", "one", "swapped")
    await house.loaded("reloaded")
    async with hammering(house, "reloaded", {11, 21}) as found:
        await more(found, 0)
        house.add("swapped", 20)
        await comes(lambda: _answers(house, "reloaded", 21))
        await more(found, 0)
    assert found[1] == 0


async def test_a_step_that_is_unloaded_and_loaded_under_load(house: House) -> None:
    house.add("leaves", 10)
    house.chain("left", "one", "leaves")
    await house.loaded("left")
    async with hammering(house, "left", {11}) as found:
        await more(found, 0)
        await house.unload("leaves")
        found_out = await house.until("left", "unloaded")
        assert found_out["wanted"]
        await more(found, 1)
        await house.loaded("leaves")
        await house.until("left", "loaded")
        await more(found, 0)


async def test_dependents_leave_with_it_when_it_is_said(house: House) -> None:
    house.add("mine", 1)
    house.chain("owner", "mine", "one")
    await house.loaded("chain", "owner")
    await house.unload("owner")
    assert (await house.show("mine"))["state"] == "loaded"
    await house.loaded("owner")
    await house.unload("owner", unload_dependents=True)
    await house.until("mine", "unloaded")
    assert (await house.show("one"))["state"] == "loaded"


async def test_a_broken_step_fails_it_in_words_and_it_heals(house: House) -> None:
    folder = house.repo / "sick"
    folder.mkdir()
    (folder / "config.yaml").write_text(PYTHON)
    (folder / "model.py").write_text(BROKEN)
    house.chain("patient", "one", "sick")
    got = await house.load("patient")
    assert got.status_code in (400, 500)
    found = await house.until("patient", "failed")
    told = found["last_error"]["message"]
    assert told.startswith("in ensemble 'patient', step 'sick': ")
    assert "these weights fit no layer" in told
    assert [(s["model"], s["serving_version"]) for s in found["steps"]] == [
        ("one", 1),
        ("sick", None),
    ]
    (folder / "model.py").write_text(MENDED)
    await house.until("patient", "loaded")
    assert await house.answer("patient", 1) == [2]


async def test_steps_that_do_not_fit_are_told_with_both_shapes(house: House) -> None:
    folder = house.repo / "wide"
    (folder / "1").mkdir(parents=True)
    (folder / "config.yaml").write_text("max_batch_size: 8\n")
    add_onnx(folder / "1" / "model.onnx", 1.0, (-1, 5))
    house.chain("misfit", "one", "wide")
    assert (await house.load("misfit")).status_code in (400, 500)
    told = (await house.until("misfit", "failed"))["last_error"]["message"]
    assert "output 'y' of step 'one' is FP32 [-1,4], and input 'x' of step 'wide' is FP32" in told
    add_onnx(folder / "1" / "model.onnx", 1.0)
    await house.until("misfit", "loaded")


async def test_a_config_that_cannot_work_is_told_of_the_folder(house: House) -> None:
    house.chain("loop", "one", "loop")
    got = await house.load("loop")
    assert got.status_code in (400, 500)
    found = await house.show("loop")
    assert "step 'loop' is the ensemble itself" in str(found["problems"])


async def test_a_dead_worker_of_a_step_is_an_answer_in_words_and_it_comes_back(
    house: House,
) -> None:
    folder = house.repo / "mortal"
    folder.mkdir()
    (folder / "config.yaml").write_text(PYTHON)
    (folder / "model.py").write_text(
        "import os\n"
        "class Model:\n"
        "    def load(self, *_):\n"
        "        pass\n"
        "    def infer(self, inputs):\n"
        "        if inputs['x'][0][0] > 100:\n"
        "            os._exit(9)\n"
        "        return {'y': inputs['x']}\n"
    )
    house.chain("brave", "one", "mortal")
    await house.loaded("brave")
    got = await house.ask("brave", 500)
    assert got.status_code == 500
    assert got.json()["error"].startswith("in ensemble 'brave', step 'mortal': ")
    await comes(lambda: _answers(house, "brave", 1))


async def test_each_answer_of_a_decoupled_step_goes_on_as_it_comes(house: House) -> None:
    folder = house.repo / "repeat" / "1"
    folder.mkdir(parents=True)
    shutil.copy(SOURCES / "repeat.py", folder / "model.py")
    (folder.parent / "config.pbtxt").write_text(REPEAT)
    folder = house.repo / "as_floats" / "1"
    folder.mkdir(parents=True)
    cast = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)
    tensors = [("x", "INT32", (1,))], [("y", "FP32", (1,))]
    onnx.save(onnx_model([cast], *tensors), folder / "model.onnx")
    (house.repo / "many").mkdir()
    (house.repo / "many" / "config.yaml").write_text(MANY)
    await house.loaded("many")
    body = {"in": [3, 1, 2], "delay": [0, 50, 0]}
    got = await house.client.post("/v2/models/many/generate_stream", json=body)
    assert got.status_code == 200, got.text
    told = [json.loads(line[6:]) for line in got.text.splitlines() if line.startswith("data: ")]
    assert [(each["out"], each["index"]) for each in told] == [(3.0, 0), (1.0, 1), (2.0, 2)]


async def test_executions_are_those_of_the_steps_models(house: House) -> None:
    house.add("counted", 1)
    house.chain("counts", "counted", "counted")
    await house.loaded("counts")
    for _ in range(3):
        await house.answer("counts", 1, 2)
    stats = (await house.client.get("/v2/models/counted/stats")).json()["model_stats"][0]
    assert stats["execution_count"] == 6
