"""Answers that are kept, in a real repository: models that count how often they were run, and ONNX."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repository.cached import ON_LOOP
from repository.errors import InvalidTensorError
from repository.messages import InferRequest, InferResponse
from repository.reports import Brought, CacheReport
from repository.repository import Options, Repository
from repository.tensors import Array, Tensor
from tests.models import add_onnx, python_model, two_by_two_onnx

pytestmark = pytest.mark.timeout(120)

# Each answer says how many runs there have been: one that is given again is known by that.
COUNTS = """
    import threading
    import numpy as np

    class Model:
        def load(self, *_):
            self.runs = 0

        def infer(self, inputs):
            self.runs += 1
            x = inputs["x"]
            if x.dtype != object and x.size and x.reshape(-1)[0] == 13:
                raise ValueError("thirteen")
            return {"y": x, "runs": np.array([self.runs], np.int32)}
"""
CONFIG = """
backend: python
response_cache: %s
inputs: [{name: x, datatype: %s, shape: [-1]}]
outputs: [{name: y, datatype: %s, shape: [-1]}, {name: runs, datatype: INT32, shape: [1]}]
warmup: []
"""
ENSEMBLE = """
backend: ensemble
response_cache: true
ensemble:
  steps: [{model: floats, inputs: {x: x}, outputs: {y: y, runs: runs}}]
"""
ROOM = 8 << 20
CONFIG_PBTXT = 'backend: "onnxruntime" response_cache { enable: true }'


def count_runs(root: Path, name: str, datatype: str = "FP32", *, on: str = "true") -> Path:
    python_model(root / name / "1", COUNTS)
    (root / name / "config.yaml").write_text(CONFIG % (on, datatype, datatype))
    return root / name


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "models"
    path.mkdir()
    return path


@asynccontextmanager
async def serving(root: Path, *names: str, room: int = ROOM) -> AsyncGenerator[Repository]:
    state = root.parent / "state"
    options = Options(
        root, mode="explicit", watch="off", settle_s=0.0, trust_code=True, state_dir=state,
        response_cache=room,
    )  # fmt: skip
    models = Repository(options)
    async with models.running():
        await asyncio.gather(*[models.load(name) for name in names])
        yield models


async def answer(
    models: Repository, name: str, *outputs: str, x: Any = (1, 2), **parameters: Any
) -> InferResponse:
    array = np.asarray(x, np.float32) if not isinstance(x, np.ndarray) else x
    request = InferRequest([Tensor.of("x", array)], outputs, parameters=parameters)
    with models.lease(name) as gen:
        return await models.infer(gen, request)


async def ask(models: Repository, name: str, *outputs: str, **said: Any) -> dict[str, Array]:
    response = await answer(models, name, *outputs, **said)
    return {t.name: t.array() for t in response.outputs}


async def runs(models: Repository, name: str, **said: Any) -> int:
    return int((await ask(models, name, **said))["runs"][0])


def kept(models: Repository) -> CacheReport:
    report = models.cache()
    assert report is not None
    return report


def warnings(models: Repository, name: str) -> list[str]:
    folder = models.status(name).folder
    assert folder is not None
    return [problem.message for problem in folder.problems if problem.warning]


async def test_models_that_want_it_are_not_run_for_the_same_again(root: Path) -> None:
    for name, datatype, on in (
        ("floats", "FP32", "true"), ("texts", "BYTES", "true"), ("plain", "FP32", "false"),
    ):  # fmt: skip
        count_runs(root, name, datatype, on=on)
    (root / "chain").mkdir()
    (root / "chain" / "config.yaml").write_text(ENSEMBLE)
    async with serving(root, "floats", "texts", "plain", "chain") as models:
        assert [await runs(models, "floats") for _ in range(3)] == [1, 1, 1]
        assert [await runs(models, "plain") for _ in range(2)] == [1, 2]
        # Everything that the model sees counts, and nothing else.
        assert await runs(models, "floats", x=(2, 1)) == 2
        assert await runs(models, "floats", top=1) == 3
        assert await runs(models, "floats", top=1, priority=1, timeout=10**6) == 3
        assert sorted(await ask(models, "floats", "y")) == ["y"]
        assert sorted(await ask(models, "floats")) == ["runs", "y"]
        assert await runs(models, "floats") == 1
        # Bits are compared, not numbers.
        nan = np.array([np.nan, -0.0], np.float32)
        first, again = [await ask(models, "floats", x=nan) for _ in range(2)]
        assert first["runs"] == again["runs"] == [5]
        assert again["y"].tobytes() == nan.tobytes()
        assert await runs(models, "floats", x=np.array([np.nan, 0.0], np.float32)) == 6
        # An empty one, and texts.
        assert [await runs(models, "floats", x=()) for _ in range(2)] == [7, 7]
        texts = np.array([b"\0\xff", b"", "ä".encode()], object)
        found = [await ask(models, "texts", x=texts) for _ in range(2)]
        assert [f["runs"][0] for f in found] == [1, 1]
        assert found[1]["y"].tolist() == texts.tolist()
        assert await runs(models, "texts", x=np.array([b"\0", b"\xff", b""], object)) == 2
        # What is refused, and what fails, is not kept.
        for _ in range(2):
            with pytest.raises(InvalidTensorError):
                await ask(models, "texts", x=nan)
            with pytest.raises(Exception, match="thirteen"):
                await ask(models, "floats", x=(13,))
        with models.lease("floats") as gen:
            assert gen.work.executions == 9 == gen.work.samples
            assert gen.lookups is not None
            assert (gen.lookups.hits, gen.lookups.misses) == (7, 9)
        # An ensemble is always run; its models may have been asked before. (It names their outputs.)
        assert [await runs(models, "chain") for _ in range(2)] == [10, 10]
        assert (await ask(models, "floats", "y", "runs"))["runs"] == [10]
        with models.lease("chain") as gen:
            assert gen.work.executions == 2 and gen.lookups is None
        (said,) = warnings(models, "chain")
        assert "it is an ensemble" in said and warnings(models, "floats") == []


async def test_whoever_comes_by_whatever_way_gets_the_answer(root: Path) -> None:
    count_runs(root, "floats")
    async with serving(root, "floats") as models:
        many = await asyncio.gather(*[runs(models, "floats") for _ in range(5)])
        assert await runs(models, "floats") in many
        streamed = InferRequest([Tensor.of("x", np.float32([1, 2]))])
        with models.lease("floats") as gen:
            before = gen.work.executions
            (found,) = [a async for a in models.stream(gen, streamed)]
        (called,) = [a async for a in models.call("floats", None, streamed)]
        assert found.outputs[1].array() == called.outputs[1].array() <= 5
        # One that leaves takes nothing with it, and what is hashed elsewhere finds its way.
        leaving = asyncio.create_task(answer(models, "floats", x=(5,)))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.wait([leaving])
        long = np.arange(ON_LOOP, dtype=np.float32)
        first, again = [await ask(models, "floats", x=long) for _ in range(2)]
        assert first["runs"] == again["runs"] and (again["y"] == long).all()
        with models.lease("floats") as gen:
            assert gen.work.executions - before in (1, 2)


async def test_nothing_is_answered_that_an_older_generation_has_said(root: Path) -> None:
    path = root / "m" / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    (root / "m" / "config.pbtxt").write_text(CONFIG_PBTXT)
    add_onnx(path, 1.0)
    x = np.zeros((1, 4), np.float32)
    async with serving(root, "m") as models:
        for _ in range(2):
            assert (await ask(models, "m", x=x))["y"][0, 0] == 1
        assert kept(models).entries == 1
        # A new file of the same length, forced, by another config, and after an unload.
        add_onnx(path, 2.0)
        await models.load("m")
        assert (await ask(models, "m", x=x))["y"][0, 0] == 2
        await until_kept(models, 1)
        await models.load("m", force=True)
        assert (await ask(models, "m", x=x))["y"][0, 0] == 2
        with models.lease("m") as gen:
            assert gen.lookups is not None and (gen.lookups.hits, gen.lookups.misses) == (0, 1)
        await models.load("m", config=Brought('{"backend": "onnxruntime"}'))
        await ask(models, "m", x=x)
        with models.lease("m") as gen:
            assert gen.lookups is None
        await until_kept(models, 0)
        await models.load("m", config=Brought('{"response_cache": {"enable": true}}'))
        await ask(models, "m", x=x)
        await until_kept(models, 1)
        await models.unload("m")
        await until_kept(models, 0)
        assert kept(models).size == 0 and kept(models).evictions == 0


async def test_through_many_reloads_nobody_is_answered_what_was_true_before(root: Path) -> None:
    path = root / "m" / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    (root / "m" / "config.pbtxt").write_text(CONFIG_PBTXT)
    add_onnx(path, 0.0)
    x, serves, over, hits = np.zeros((1, 4), np.float32), 0, False, 0

    async def keep_asking() -> None:
        nonlocal hits
        while not over:
            at_least = serves
            response = await answer(models, "m", x=x)
            assert response.outputs[0].array()[0, 0] >= at_least
            hits += not response.compute_s
            await asyncio.sleep(0)

    async with serving(root, "m") as models, asyncio.TaskGroup() as clients:
        for _ in range(4):
            clients.create_task(keep_asking())
        for value in range(1, 6):
            add_onnx(path, float(value))
            await models.load("m")
            serves = value
        over = True
    assert hits > 5


async def until_kept(models: Repository, entries: int) -> None:
    """An older generation may still be on its way out."""
    with models.events.subscribe(after=0) as events:
        async for _ in events:
            await asyncio.sleep(0)
            if kept(models).entries == entries:
                return


async def test_answers_outlive_the_memory_that_they_came_in(root: Path) -> None:
    path = root / "m" / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    (root / "m" / "config.pbtxt").write_text(CONFIG_PBTXT)
    two_by_two_onnx(path, (-1, 65536))  # outputs of 256 KiB a row, in shared memory
    async with serving(root, "m") as models:

        async def sums(value: float) -> list[Array]:
            array = np.full((1, 65536), value, np.float32)
            request = InferRequest([Tensor.of("a", array), Tensor.of("b", array)])
            with models.lease("m") as gen:
                return [t.array() for t in (await models.infer(gen, request)).outputs]

        for value in range(8):  # more than the cache has room for
            await sums(value)
        report = kept(models)
        assert report.size <= report.limit == ROOM and report.entries == 8
        await models.unload("m")
        await models.load("m")
        for value in (1, 2, 1):
            total, difference = await sums(value)
            assert (total == 2 * value).all() and not difference.any()
            del total, difference


async def test_a_small_cache_gives_up_what_was_not_asked_for_the_longest(root: Path) -> None:
    count_runs(root, "floats")
    async with serving(root, "floats", room=12_000) as models:
        said = [await runs(models, "floats", x=(n,)) for n in range(50, 70)]
        assert said == list(range(1, 21))
        report = kept(models)
        assert report.evictions == 20 - report.entries > 0 and report.size <= report.limit
        assert await runs(models, "floats", x=(69,)) == 20
        assert await runs(models, "floats", x=(50,)) == 21


async def test_without_a_cache_every_request_is_run_and_the_status_says_so(root: Path) -> None:
    count_runs(root, "floats")
    async with serving(root, "floats", room=0) as models:
        assert [await runs(models, "floats") for _ in range(2)] == [1, 2]
        assert models.cache() is None
        (said,) = warnings(models, "floats")
        assert said.endswith("is run, unless the server is started with --response-cache-size")
