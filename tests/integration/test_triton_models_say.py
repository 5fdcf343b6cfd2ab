"""What python models say beside their answers: metrics of their own, whether they are ready. What they
do to other models: calls that end with who asked, files that they bring. Real workers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable

import numpy as np
import pytest
import pytest_asyncio

from repository.hosts import readiness
from repository.messages import InferRequest
from repository.repository import Options, Repository
from repository.tensors import Tensor
from server.codecs.v2_paths import Route
from server.triton.metadata import model_ready
from tests.fakes.serving import Client, staying

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(60)]

CANCELLED = 7.0
IO = """
input [ { name: "x" data_type: TYPE_FP32 dims: [ -1 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ -1 ] } ]
"""
HEAD = """
import json
import time
import numpy as np
import triton_python_backend_utils as pb_utils

def call(model, x):
    return pb_utils.InferenceRequest(model_name=model, requested_output_names=["y"],
        inputs=[pb_utils.Tensor("x", x)], namespace="none")

def x_of(request):
    return pb_utils.get_input_tensor_by_name(request, "x").as_numpy()

def answer(*y):
    return pb_utils.InferenceResponse([pb_utils.Tensor("y", np.array(y, np.float32))])

def code_of(response):
    return float(response.error().code()) if response.has_error() else -1.0

class TritonPythonModel:
    code = -2.0
    def execute(self, requests):
        return [self.answers(x_of(request), request) for request in requests]
"""
COUNTS = """
    def initialize(self, args):
        family = lambda name, kind: pb_utils.MetricFamily(name, "Of a test.", kind)
        self.requests = family("counts_requests_total", pb_utils.MetricFamily.COUNTER).Metric(
            labels={"model": args["model_name"], "version": args["model_version"]})
        self.level = family("counts_level", pb_utils.MetricFamily.GAUGE).Metric()
        self.took = family("counts_took", pb_utils.MetricFamily.HISTOGRAM).Metric(buckets=[0.1, 1])
        try:
            family("nv_mine", pb_utils.MetricFamily.GAUGE)
        except pb_utils.TritonModelException as error:
            self.refused = "server's own" in error.message()

    def answers(self, x, request):
        self.requests.increment(1)
        self.level.set(float(x[0]))
        self.took.observe(float(x[0]))
        return answer(self.refused)
"""
MOODY = """
    ready = True
    def answers(self, x, request):
        self.ready = {0: False, 1: True, 2: "yes", 3: None}[int(x[0])]
        return answer(1)

    async def is_ready(self):
        if self.ready is None:
            raise ValueError("nobody knows")
        return self.ready
"""
SLOW = """
    def answers(self, x, request):
        until = time.monotonic() + 20
        while time.monotonic() < until and not request.is_cancelled():
            time.sleep(0.005)
        return answer(1)
"""
# Asks the slow one; of 0 it answers what that came to the last time
PATIENT = """
    def answers(self, x, request):
        if x[0]:
            self.code = code_of(call("slow", x).exec())
        return answer(self.code)
"""
AWAITS = """
    async def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            if x_of(request)[0]:
                self.code = code_of(await call("slow", x_of(request)).async_exec())
            sender.send(answer(self.code), pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""
BROUGHT = "    def answers(self, x, request): return answer(*(x * 3))"
BRINGS = f"""
    def answers(self, x, request):
        config = {{"backend": "python",
            "input": [{{"name": "x", "data_type": "TYPE_FP32", "dims": [-1]}}],
            "output": [{{"name": "y", "data_type": "TYPE_FP32", "dims": [-1]}}]}}
        pb_utils.load_model("brought", json.dumps(config),
            files={{"file:1/model.py": {(HEAD + BROUGHT)!r}.encode()}})
        response = call("brought", x).exec()
        return answer(*pb_utils.get_output_tensor_by_name(response, "y").as_numpy())
"""
MODELS = {
    "counts": (COUNTS, "instance_group [ { count: 2 kind: KIND_CPU } ]"),
    "moody": (MOODY, ""),
    "slow": (SLOW, ""),
    "patient": (PATIENT, ""),
    "awaits": (AWAITS, "model_transaction_policy { decoupled: true }"),
    "brings": (BRINGS, ""),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def models(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    home = tmp_path_factory.mktemp("say")
    for name, (text, config) in MODELS.items():
        folder = home / "models" / name / "1"
        folder.mkdir(parents=True)
        (folder / "model.py").write_text(HEAD + text)
        (folder.parent / "config.pbtxt").write_text('backend: "python"\n' + config + IO)
    return Repository(
        Options(
            home / "models", mode="explicit", load=("*",), state_dir=home / "state", settle_s=0.05,
            watch="off", trust_code=True, allow_files=True,
        )
    )  # fmt: skip


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(models: Repository) -> AsyncIterator[Client]:
    async with staying(models) as client:
        await asyncio.gather(*[models.load(name) for name in MODELS])
        yield client


def asked(*x: float) -> InferRequest:
    return InferRequest([Tensor.of("x", np.array(x, np.float32))])


async def one(models: Repository, name: str, *x: float) -> list[float]:
    with models.lease(name) as gen:
        (response,) = [each async for each in models.stream(gen, asked(*x))]
    found: list[float] = response.outputs[0].array().tolist()
    return found


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(15):
        while not true():  # noqa: ASYNC110 - nobody is told
            await asyncio.sleep(0.005)


async def page_with(client: Client, *lines: str, accept: str = "") -> list[str]:
    """Once it has all of them."""
    async with asyncio.timeout(15):
        while True:
            page = (await client.get("/metrics", headers={"accept": accept})).text.splitlines()
            if set(lines) <= set(page):
                return page
            await asyncio.sleep(0.05)


async def test_what_models_count_is_on_the_metrics_page_summed_over_instances(
    models: Repository, client: Client
) -> None:
    await page_with(client, 'counts_requests_total{model="counts",version="1"} 0.0')
    for n in range(40):
        await asyncio.gather(one(models, "counts", 0), one(models, "counts", 0))
        assert n or await one(models, "counts", 5) == [1]
    page = await page_with(
        client, 'counts_requests_total{model="counts",version="1"} 81.0', "counts_took_count 81.0"
    )
    assert 'counts_took_bucket{le="1.0"} 80.0' in page and "counts_took_sum 5.0" in page
    assert "counts_level 0.0" in page and not any("nv_mine" in line for line in page)
    rich = await page_with(
        client, "# TYPE counts_requests counter", accept="application/openmetrics-text"
    )
    assert rich[-1] == "# EOF"


async def test_they_are_gone_with_the_model_and_begin_anew_with_the_next(
    models: Repository, client: Client
) -> None:
    await models.unload("counts")
    async with asyncio.timeout(15):
        while "counts_" in (await client.get("/metrics")).text:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    await models.load("counts")
    await page_with(client, 'counts_requests_total{model="counts",version="1"} 0.0')


async def test_a_model_that_says_so_is_not_ready_and_serves_all_the_same(
    models: Repository, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readiness, "FRESH_S", 0.0)
    found = []
    for x in (1, 0, 1, 2, 3):
        assert await one(models, "moody", x) == [1]
        response = await client.get("/v2/models/moody/ready")
        found.append((response.status_code, response.text))
    no = (400, json.dumps({"error": "Model version not ready"}, separators=(",", ":")))
    assert found == [(200, ""), no, (200, ""), no, no]
    assert (await client.get("/v2/models/moody/versions/1/ready")).status_code == 400
    assert not await model_ready(models, Route("moody", None))  # what gRPC answers
    assert (await client.get("/v2/models/slow/ready")).status_code == 200


@pytest.mark.parametrize("name", ["patient", "awaits"])
async def test_who_leaves_takes_the_calls_along_that_were_made_for_him(
    models: Repository, client: Client, name: str
) -> None:
    slow = models.lease("slow").generation
    with models.lease(name) as gen:
        left = models.stream(gen, asked(1))
        await until(lambda: bool(slow.leases))
        left.close()
        async with asyncio.timeout(15):
            await slow.idle.wait()
            assert await one(models, name, 0) == [CANCELLED]


async def test_a_model_loads_another_with_files_that_it_brings(
    models: Repository, client: Client
) -> None:
    assert await one(models, "brings", 1, 2) == [3, 6]
