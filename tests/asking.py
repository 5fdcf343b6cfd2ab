"""Models that take requests as they are, in real worker processes that know each other."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np

from repository.asks import AskLine
from repository.hosts.process import ProcessHost
from repository.hosts.zygotes import Zygotes
from repository.messages import InferRequest, InferResponse
from repository.responding import Responses
from repository.tensors import Tensor
from tests.fakes.calling import OtherModels
from tests.hosting import open_files, until_gone
from tests.models import python_model, spec_of

HEAD = """
    import threading, time, os
    import numpy as np
    import triton_python_backend_utils as pb_utils

    def value(request):
        return pb_utils.get_input_tensor_by_name(request, "x").as_numpy()

    def answer(array):
        return pb_utils.InferenceResponse([pb_utils.Tensor("y", np.asarray(array))])

    def called(model, array, decoupled=False):
        asked = pb_utils.InferenceRequest(model_name=model, requested_output_names=["y"],
            inputs=[pb_utils.Tensor("x", array)])
        return asked.exec(decoupled=decoupled)

    def checked(response):
        if response.has_error():
            raise pb_utils.TritonModelException(response.error().message())
        return pb_utils.get_output_tensor_by_name(response, "y").as_numpy()

    FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
"""
# y = x + the number of requests that came together
GROUPS = """
    class TritonPythonModel:
        def execute(self, requests):
            return [answer(value(r) + len(requests)) for r in requests]
"""
# As many answers as x says, from a thread, after execute has returned.
COUNTS = """
    class TritonPythonModel:
        def execute(self, requests):
            for r in requests:
                threading.Thread(target=self.count, args=(value(r), r.get_response_sender())).start()
        def count(self, x, sender):
            for n in range(int(x[0])):
                if sender.is_cancelled():
                    break
                sender.send(answer(np.array([n], np.float32)))
                if len(x) > 1:
                    time.sleep(float(x[1]))
            sender.send(flags=FINAL)
"""
# y = what the next model makes of x, plus one
CALLS = """
    class TritonPythonModel:
        def execute(self, requests):
            return [answer(checked(called(NEXT, value(r))) + 1) for r in requests]
"""
# Reads all that "c" has to say.
READS = """
    class TritonPythonModel:
        def execute(self, requests):
            return [answer(np.array([len(list(called("c", value(r), True)))])) for r in requests]
"""
HANGS = """
    class TritonPythonModel:
        def execute(self, requests):
            open(MARK, "w").write("here")
            time.sleep(600)
"""
DECOUPLED: dict[str, Any] = {"decoupled": True, "triton": {
    "model_transaction_policy": {"decoupled": True}}}  # fmt: skip


def question(*values: float) -> InferRequest:
    return InferRequest([Tensor.of("x", np.array(values, np.float32))])


def values(response: InferResponse) -> list[float]:
    found: list[float] = response.outputs[0].array().tolist()
    return found


async def every(responses: Responses) -> list[list[float]]:
    return [values(response) async for response in responses]


async def until(true: Callable[[], bool]) -> None:
    """What another process brings about."""
    async with asyncio.timeout(20):
        while not true():  # noqa: ASYNC110 - nobody here is told
            await asyncio.sleep(0.005)


class House:
    """Models of one test, which know each other."""

    def __init__(self, tmp_path: Path, zygotes: Zygotes) -> None:
        self.caller = OtherModels()
        self.tmp_path, self.zygotes = tmp_path, zygotes
        self.hosts: dict[str, ProcessHost] = {}

    async def add(self, name: str, source: str, *, instances: int = 1, **config: Any) -> AskLine:
        folder = python_model(self.tmp_path / name / "1", HEAD + source)
        spec = spec_of(folder, "triton_python", name, **config)
        host = ProcessHost(
            self.zygotes, state_dir=self.tmp_path, instances=instances, caller=self.caller
        )
        self.hosts[name] = host
        loaded = await host.load(spec, ["cpu"] * instances)
        line = AskLine(host, loaded, spec.config, max_queue=100)
        self.caller.models[name] = line, host
        return line

    def pid(self, name: str) -> int:
        return self.hosts[name]._workers[0].child.pid


@asynccontextmanager
async def home(tmp_path: Path, zygotes: Zygotes) -> AsyncIterator[House]:
    """Afterwards nothing is left: no process, no descriptor, no thread, no lease."""
    await zygotes.warm("python")
    files, threads = open_files(), threading.active_count()
    house = House(tmp_path, zygotes)
    try:
        yield house
    finally:
        pids = {w.child.pid for host in house.hosts.values() for w in host._workers}
        await asyncio.gather(*[host.stop(5.0) for host in house.hosts.values()])
    await asyncio.sleep(0.02)
    assert house.caller.leases == 0
    assert until_gone(pids) == set()
    assert open_files() <= files and threading.active_count() <= threads + 4
