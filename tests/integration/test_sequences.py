"""Sequences over real models with a memory, in real workers, through the facade."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repository.errors import InvalidRequestError, LoadFailedError, RepositoryError, WorkerDiedError
from repository.lifecycle.states import State
from repository.messages import InferRequest
from repository.repository import Options, Repository
from repository.tensors import Tensor
from tests.models import python_model
from tests.sequence_models import sum_onnx, write_sums

pytestmark = pytest.mark.timeout(120)


@asynccontextmanager
async def serving(root: Path, *names: str) -> AsyncIterator[Repository]:
    """With these models loaded."""
    models = Repository(
        Options(root, settle_s=0.1, state_dir=root.parent / "state", trust_code=True)
    )
    async with models.running():
        await asyncio.gather(*map(models.load, names))
        yield models


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "models"
    path.mkdir()
    return path


async def say(
    models: Repository,
    value: int,
    sequence: int | str,
    *,
    model: str = "sums",
    start: bool = False,
    end: bool = False,
    shape: tuple[int, ...] = (1, 1),
) -> tuple[int, Any]:
    """(the sum, who was summed up)"""
    said = {"sequence_id": sequence, "sequence_start": start, "sequence_end": end}
    request = InferRequest([Tensor.of("INPUT", np.full(shape, value, "<i4"))], parameters=said)
    with models.lease(model, None, said) as gen:
        response = await models.infer(gen, request)
    found = {t.name: t.array().reshape(-1)[0] for t in response.outputs}
    assert sorted(found) == ["OUTPUT", "WHO"]
    return int(found["OUTPUT"]), found["WHO"]


@pytest.mark.parametrize("strategy", ["direct {}", "oldest { max_candidate_sequences: 4 }"])
async def test_a_model_remembers_each_sequence_and_nobody_sees_how(
    root: Path, strategy: str
) -> None:
    write_sums(root, "sums", strategy=strategy)
    write_sums(root, "alone", strategy=strategy, rows=0, ids="BYTES", first=[100])
    async with serving(root, "sums", "alone") as models:
        gen = models.lease("sums").generation
        assert gen.signature is not None
        told = gen.signature.metadata()
        assert [i["name"] for i in told["inputs"]] == ["INPUT"]
        assert [o["name"] for o in told["outputs"]] == ["OUTPUT", "WHO"]
        begun = await asyncio.gather(*[say(models, n, n, start=True) for n in (1, 2, 3)])
        assert begun == [(1, 1), (2, 2), (3, 3)]
        assert await asyncio.gather(say(models, 10, 1), say(models, 30, 3)) == [(11, 1), (33, 3)]
        assert await say(models, 5, 2, end=True) == (7, 2)
        with pytest.raises(InvalidRequestError, match="must specify the START flag"):
            await say(models, 5, 2)
        alone = {"model": "alone", "shape": (1,)}
        assert await say(models, 1, "a", start=True, **alone) == (101, b"a")
        other = asyncio.create_task(say(models, 9, "b", start=True, end=True, **alone))
        if "direct" in strategy:
            await asyncio.sleep(0)
            assert not other.done(), "there is one place"
        assert await say(models, 1, "a", end=True, **alone) == (102, b"a")
        assert await other == (109, b"b")


async def test_an_open_sequence_is_not_lost_in_a_reload(root: Path) -> None:
    folder = write_sums(root, "sums")
    async with serving(root, "sums") as models:
        await say(models, 1, 5, start=True)
        old = models.lease("sums").generation
        sum_onnx(folder / "1" / "model.onnx", add=1000)
        await old.retire_asked.wait()
        assert await say(models, 1, 6, start=True) == (1001, 6)
        assert old.state is State.DRAINING and await say(models, 2, 5) == (3, 5)
        assert await say(models, 4, 5, end=True) == (7, 5)
        await old.ended.wait()
        assert old.state is State.GONE and "cut off" not in str(old.story)
        with pytest.raises(InvalidRequestError, match="must specify the START flag"):
            await say(models, 4, 5)


async def test_when_a_worker_dies_its_sequences_are_told_so(root: Path) -> None:
    write_sums(root, "sums")
    async with serving(root, "sums") as models:
        await say(models, 1, 5, start=True)
        gen = models.lease("sums").generation
        assert gen.loaded is not None
        os.kill(gen.loaded.details["pids"][0], signal.SIGKILL)
        await gen.ended.wait()
        assert gen.leases == 0
        await models.load("sums")
        with pytest.raises(InvalidRequestError, match="the model that had begun it is gone"):
            await say(models, 1, 5)
        assert await say(models, 1, 5, start=True) == (1, 5)
        assert isinstance(gen.error, WorkerDiedError)


PYTHON = """
import numpy as np

class Model:
    def infer(self, inputs):
        told = np.where(inputs["READY"], inputs["INPUT"] + inputs["SUM"], 0)
        return {"OUTPUT": told, "WHO": inputs["CORRID"], "SUM_OUT": told}
"""
YAML = """
max_batch_size: 4
instances: 2
inputs: [{name: INPUT, datatype: INT32, shape: [1]}]
outputs: [{name: OUTPUT, datatype: INT32, shape: [1]}, {name: WHO, datatype: BYTES, shape: [1]}]
sequences:
  strategy: STRATEGY
  idle_us: 60000000
  controls:
    - {name: READY, kind: ready, datatype: BOOL}
    - {name: CORRID, kind: corrid, datatype: BYTES}
  states:
    - {input: SUM, output: SUM_OUT, datatype: INT32, shape: [1], initial: begin}
"""


@pytest.mark.parametrize("strategy", ["direct", "oldest"])
async def test_a_model_of_our_own_may_have_them_too(root: Path, strategy: str) -> None:
    folder = python_model(root / "sums", PYTHON)
    (folder / "config.yaml").write_text(YAML.replace("STRATEGY", strategy))
    (folder / "initial_state").mkdir()
    (folder / "initial_state" / "begin").write_bytes(np.int32(100).tobytes())
    async with serving(root, "sums") as models:
        names = [f"s{n}" for n in range(7)]
        begun = await asyncio.gather(
            *[say(models, n, name, start=True) for n, name in enumerate(names)]
        )
        assert begun == [(100 + n, name.encode()) for n, name in enumerate(names)]
        ended = await asyncio.gather(*[say(models, 1, name, end=True) for name in names])
        assert ended == [(101 + n, name.encode()) for n, name in enumerate(names)]
        old = models.lease("sums").generation
        (folder / "initial_state" / "begin").write_bytes(np.int32(500).tobytes())
        await old.ended.wait()
        assert await say(models, 1, "new", start=True) == (501, b"new")


async def test_the_end_of_the_server_waits_for_no_silent_sequence(root: Path) -> None:
    write_sums(root, "sums")
    async with serving(root, "sums") as models:
        await say(models, 1, 5, start=True)
        gen = models.lease("sums").generation
    assert gen.state is State.GONE and gen.leases == 0 and gen.drain_s < 5


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        ('name: "START"', 'name: "BEGIN"', "input 'BEGIN'; the model has"),
        ("data_type: TYPE_UINT64 }", "data_type: TYPE_INT32 }", "in the model it is UINT64"),
        ("data_type: TYPE_INT32 dims: [1] i", "data_type: TYPE_INT32 dims: [2] i", "SUM_OUT"),
        ('output_name: "SUM_OUT"', 'output_name: "SUM"', "SUM"),
        ('data_file: "sum"', 'data_file: "none"', "initial_state/none cannot be read"),
        ('data_file: "sum"', 'data_file: "../config.pbtxt"', "initial_state"),
    ],
)
async def test_a_config_that_the_model_does_not_keep_is_said_at_load(
    root: Path, before: str, after: str, why: str
) -> None:
    folder = write_sums(root, "sums", first=[1])
    config = folder / "config.pbtxt"
    assert before in config.read_text()
    config.write_text(config.read_text().replace(before, after))
    async with serving(root) as models:
        with pytest.raises(RepositoryError, match=why) as raised:
            await models.load("sums")
        assert str(root) not in str(raised.value)


async def test_a_first_state_must_have_the_size_of_its_shape(root: Path) -> None:
    folder = write_sums(root, "sums", first=[1])
    (folder / "initial_state" / "sum").write_bytes(b"123")
    async with serving(root) as models:
        with pytest.raises(
            LoadFailedError, match=r"initial_state/sum has 3 bytes; .* begins with 4"
        ):
            await models.load("sums")
