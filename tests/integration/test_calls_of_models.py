"""Models that call models in a whole repository, and what may happen to either meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from repository.errors import InferenceFailedError, RepositoryError
from repository.messages import InferRequest
from repository.repository import Options, Repository
from repository.tensors import Tensor

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(60)]

IO = """
input [ { name: "x" data_type: TYPE_FP32 dims: [ -1 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ -1 ] } ]
"""
HEAD = """
import time
import numpy as np
import triton_python_backend_utils as pb_utils

def call(model, x, decoupled=False):
    asked = pb_utils.InferenceRequest(model_name=model, requested_output_names=["y"],
        inputs=[pb_utils.Tensor("x", x)])
    return asked.exec(decoupled=decoupled)

def y_of(response):
    if response.has_error():
        raise pb_utils.TritonModelException(response.error().message())
    return pb_utils.get_output_tensor_by_name(response, "y").as_numpy()

def answer(y):
    return pb_utils.InferenceResponse([pb_utils.Tensor("y", y)])

class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
            found = self.answers(x, request)
            if found is not None:
                return [found]
"""
ONE_MORE = "    def answers(self, x, request): return answer(x + 1)"
SLOW = "    def answers(self, x, request): time.sleep(float(x[0])); return answer(x + 1)"
# Calls the slow one: y = what it says
PATIENT = "    def answers(self, x, request): return answer(y_of(call('slow', x)))"
# Calls the ensemble that it is a step of, unless x is 0
LOOP = """
    def answers(self, x, request):
        return answer(x if x[0] == 0 else y_of(call("ring", x - 1)))
"""
# Says each of 0 .. x - 1
COUNTS = """
    def answers(self, x, request):
        sender = request.get_response_sender()
        for n in range(int(x[0])):
            if sender.is_cancelled(): break
            sender.send(answer(np.array([n], np.float32)))
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""
# How many of those it has heard, and the last: it reads slowly
HEARS = """
    def answers(self, x, request):
        heard = []
        for response in call("counts", x, True):
            if response.output_tensors():
                heard.append(float(y_of(response)[0]))
        return answer(np.array([len(heard), heard[-1]], np.float32))
"""
# Calls itself unless x is 0, and awaits it
COROUTINE = """
    async def execute(self, requests):
        xs = [pb_utils.get_input_tensor_by_name(r, "x").as_numpy() for r in requests]
        return [await self.answer(x) for x in xs]

    async def answer(self, x):
        asked = pb_utils.InferenceRequest(model_name="coroutine", requested_output_names=["y"],
            inputs=[pb_utils.Tensor("x", x - 1)])
        return answer(x if x[0] == 0 else y_of(await asked.async_exec()))
"""
RING = 'ensemble_scheduling { step [ { model_name: "loop" model_version: -1 ' \
    'input_map { key: "x" value: "x" } output_map { key: "y" value: "y" } } ] }'  # fmt: skip
MODELS = {"one_more": ONE_MORE, "slow": SLOW, "patient": PATIENT, "loop": LOOP, "hears": HEARS,
          "coroutine": COROUTINE}  # fmt: skip


def write(root: Path, name: str, source: str | None, config: str) -> None:
    (root / name / "1").mkdir(parents=True)
    if source is not None:
        (root / name / "1" / "model.py").write_text(HEAD + source)
    (root / name / "config.pbtxt").write_text(config + IO)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def models(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Repository]:
    home = tmp_path_factory.mktemp("calls")
    root = home / "models"
    for name, source in MODELS.items():
        write(root, name, source, 'backend: "python"')
    decoupled = 'backend: "python" model_transaction_policy { decoupled: true }'
    write(root, "counts", COUNTS, decoupled)
    write(root, "ring", None, f'platform: "ensemble" {RING}')
    found = Repository(
        Options(
            root, mode="explicit", state_dir=home / "state", settle_s=0.05, watch="off",
            trust_code=True,
        )
    )  # fmt: skip
    async with found.running():
        await asyncio.gather(*[found.load(name) for name in (*MODELS, "counts", "ring")])
        yield found


async def one(models: Repository, name: str, *values: float) -> list[float]:
    request = InferRequest([Tensor.of("x", np.array(values, np.float32))])
    with models.lease(name) as gen:
        response = await models.infer(gen, request)
    found: list[float] = response.outputs[0].array().tolist()
    return found


def generation(models: Repository, name: str) -> Any:
    return models.lease(name).generation


async def test_a_call_is_a_request_like_any_and_ends_its_lease(models: Repository) -> None:
    slow = generation(models, "slow")
    served = slow.served
    asked = asyncio.create_task(one(models, "patient", 0.3))
    async with asyncio.timeout(10):
        while not slow.leases:  # noqa: ASYNC110 - nobody is told
            await asyncio.sleep(0.005)
    assert await asked == pytest.approx([1.3])
    assert (slow.leases, slow.served) == (0, served + 1)


async def test_a_model_that_unloads_still_calls(models: Repository) -> None:
    slow = generation(models, "slow")
    asked = asyncio.create_task(one(models, "patient", 0.5))
    async with asyncio.timeout(10):
        while not slow.leases:  # noqa: ASYNC110 - nobody is told
            await asyncio.sleep(0.005)
    await models.unload("patient")
    assert await asked == pytest.approx([1.5])
    await models.load("patient")


async def test_a_circle_by_way_of_an_ensemble_is_refused_and_both_serve_on(
    models: Repository,
) -> None:
    assert await one(models, "ring", 0) == [0]
    for name in ("loop", "ring"):
        async with asyncio.timeout(20):
            with pytest.raises(InferenceFailedError, match="would wait for ever"):
                await one(models, name, 2)
    assert await one(models, "ring", 0) == [0]


async def test_a_call_that_waits_for_itself_in_a_coroutine_is_refused_too(
    models: Repository,
) -> None:
    assert await one(models, "coroutine", 0) == [0]
    async with asyncio.timeout(20):
        with pytest.raises(InferenceFailedError, match="would wait for ever"):
            await one(models, "coroutine", 2)
    assert await one(models, "coroutine", 0) == [0]


@pytest.mark.parametrize("name", ["counts", "slow"])
async def test_a_call_that_is_left_at_once_keeps_no_lease(models: Repository, name: str) -> None:
    request = InferRequest([Tensor.of("x", np.zeros(1, np.float32))])
    models.call(name, None, request).close()
    gen = generation(models, name)
    async with asyncio.timeout(10):
        await gen.idle.wait()
    assert gen.leases == 0


async def test_a_call_hears_all_that_a_quick_model_says(models: Repository) -> None:
    assert await one(models, "hears", 5000) == [5000, 4999]
    assert generation(models, "counts").leases == 0


async def test_a_call_of_a_model_that_goes_away_fails_and_does_not_hang(
    models: Repository,
) -> None:
    await models.unload("slow")
    with pytest.raises(RepositoryError, match="'slow'"):
        await one(models, "patient", 0)
    await models.load("slow")
    assert await one(models, "patient", 0) == [1]
