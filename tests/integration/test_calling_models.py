"""Models that ask models, through the facade: what `Caller.call` comes to."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import numpy as np
import pytest

from repository.errors import (
    InvalidRequestError,
    InvalidTensorError,
    ModelNotFoundError,
    UnsupportedRequestError,
    VersionNotFoundError,
)
from repository.messages import InferRequest
from repository.repository import Options, Repository
from repository.tensors import Tensor
from tests.models import add_onnx


@asynccontextmanager
async def serving(tmp_path, **options):
    root = tmp_path / "models"
    for name, value in (("one", 1.0), ("ten", 10.0)):
        add_onnx(root / name / "1" / "model.onnx", value)
    (root / "both").mkdir(exist_ok=True)
    (root / "both" / "config.yaml").write_text(
        "backend: ensemble\nensemble: {steps: [{model: one, inputs: {x: in}, outputs: {y: mid}}, "
        "{model: ten, inputs: {x: mid}, outputs: {y: out}}]}\n"
    )
    models = Repository(
        Options(
            root, mode="explicit", settle_s=0.1, state_dir=tmp_path / "state", default_host="inline",
            **options,
        )
    )  # fmt: skip
    async with models.running():
        with models.events.subscribe(after=0) as events:
            while len(models.names()) < 3:
                await anext(events)
        yield models
    assert not models._calls


def request(name="x"):
    return InferRequest([Tensor.of(name, np.zeros((2, 4), np.float32))])


async def told(answers):
    return [float(each.outputs[0].array()[0, 0]) async for each in answers]


async def test_a_call_is_a_request_with_a_lease_of_its_own(tmp_path):
    async with serving(tmp_path) as models:
        await models.load_by_name("one")
        answers = models.call("one", None, request())
        (gen,) = models.status("one").generations
        assert gen.leases == 1
        assert await told(answers) == [1.0]
        assert gen.leases == 0 and gen.served == 1
        await models.unload_by_name("one")
        assert models.status("one").state == "unloaded"


async def test_whatever_is_wrong_is_what_the_answers_end_with(tmp_path):
    async with serving(tmp_path) as models:
        await models.load("one")
        for model, version, asked, error in (
            ("nobody", None, request(), ModelNotFoundError),
            ("ten", None, request(), VersionNotFoundError),
            ("one", 7, request(), VersionNotFoundError),
            ("one", None, request("z"), InvalidTensorError),
        ):
            with pytest.raises(error):
                await told(models.call(model, version, asked))
        assert models.status("one").generations[0].leases == 0


async def test_a_model_brings_files_to_another_only_where_that_is_allowed(tmp_path):
    files = {"1/model.onnx": (tmp_path / "seven.onnx")}
    add_onnx(files["1/model.onnx"], 7.0)
    brought = {name: path.read_bytes() for name, path in files.items()}
    async with serving(tmp_path) as models:
        with pytest.raises(UnsupportedRequestError, match="--allow-file-override"):
            await models.load_by_name("one", {}, brought)
    async with serving(tmp_path, allow_files=True) as models:
        with pytest.raises(InvalidRequestError, match="needs the config"):
            await models.load_by_name("one", None, brought)
        await models.load_by_name("one", {"backend": "onnxruntime"}, brought)
        assert await told(models.call("one", None, request())) == [7.0]
        await models.load("both")
        await models.unload_by_name("one")
        await models.load("both")
        await models.unload_by_name("both", dependents=True)
        assert models.status("ten").state == "unloaded"


async def test_who_closes_his_answers_lets_go(tmp_path):
    async with serving(tmp_path) as models:
        await models.load("one")
        answers = models.call("one", None, request())
        answers.close()
        await asyncio.sleep(0)
        (gen,) = models.status("one").generations
        await asyncio.wait_for(gen.idle.wait(), 10)
        assert gen.leases == 0


async def test_a_call_waits_for_a_model_that_a_request_would_load(tmp_path):
    async with serving(tmp_path, on_demand=True) as models:
        calls = [models.call("both", None, request("in")) for _ in range(3)]
        assert [await told(call) for call in calls] == [[11.0]] * 3
        assert models.status("one").state == models.status("ten").state == "loaded"
        left = models.call("nobody", None, request())
        with pytest.raises(ModelNotFoundError):
            await told(left)


async def test_an_ensemble_that_is_away_says_which_model_it_lacks(tmp_path):
    async with serving(tmp_path) as models:
        report = await models.load("both")
        assert report.versions == (1,) and await told(models.call("both", None, request("in"))) == [
            11.0
        ]
        await models.unload("ten")
        (gen,) = models.status("both").generations or (None,)
        if gen is not None:
            await gen.ended.wait()
        with pytest.raises(VersionNotFoundError, match="its model 'ten' was unloaded"):
            models.lease("both")
        report = await models.unload("both", unload_dependents=True)
        assert report.model == "both" and models.status("one").state == "unloaded"


async def test_what_was_said_is_remembered_and_no_more(tmp_path):
    async with serving(tmp_path) as models:
        await models.load("both")
    async with serving(tmp_path) as models:
        assert models._journal.words == {"both": "load"}
        await models.load("both")
        assert models.status("one").state == "loaded"
