"""Threads per worker: a large model and a tiny one, alone and beside others that are busy too.

python -m bench.threads [ROUNDS]      windows with 1, 2 and 4 threads take turns: look at the ratios
python -m bench.threads spin          what OpenMP pools cost that spin, and as workers are started

Models run in real workers behind real batchers, without a server. See docs/decisions/0015-threads.md.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import numpy as np
import onnx
import psutil
import uvloop
from onnx import helper, numpy_helper

from repository.batching import Batcher
from repository.config import ModelConfig
from repository.hosts import zygotes as settings
from repository.hosts.process import ProcessHost
from repository.hosts.zygotes import Zygotes
from repository.messages import InferRequest, Loaded
from repository.spec import ModelSpec
from repository.tensors import Tensor
from tests import models

THREADS = (1, 2, 4)
CLIENTS = 16
WINDOW_S = 0.2
TOGETHER = (("large",), ("large",) * 2, ("large",) * 4, ("tiny",) * 2, ("large", "tiny"))
REQUEST = InferRequest([Tensor.of("x", np.ones((1, 1), "f4"))])
SPINNING = {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "30000000000", "KMP_BLOCKTIME": "200"}
TORCH = """
    import numpy as np, torch
    class Model:
        def load(self, context):
            torch.set_num_threads(context.threads)
            self.a = torch.rand(256, 256)
        def infer(self, inputs):
            y = self.a
            for _ in range(20):
                y = torch.mm(y, self.a) * 0.01
            return {"y": np.array([[float(y[0, 0])]], "f4")}
"""


def large(path: Path) -> ModelSpec:
    """One number in, one out, and 268 million operations between: 3 to 5 ms of a core."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    constants = [
        numpy_helper.from_array(random.random(shape, dtype=np.float32), name)
        for name, shape in (("a", (128, 1024)), ("b", (1024, 1024)))
    ]
    nodes = [
        helper.make_node("Mul", ["x", "a"], ["h"]),
        helper.make_node("MatMul", ["h", "b"], ["m"]),
        helper.make_node("ReduceMax", ["m"], ["s"], keepdims=1),
        helper.make_node("Add", ["x", "s"], ["y"]),
    ]
    shape = [("x", "FP32", (1, 1))], [("y", "FP32", (1, 1))]
    onnx.save(models.onnx_model(nodes, *shape, constants), path)
    return models.spec_of(path)


async def rate(host: ProcessHost) -> float:
    """Requests per second in one window, with CLIENTS that each wait for their answer."""
    queue = Batcher(host, Loaded(), ModelConfig(), max_queue=0)
    until = time.perf_counter() + WINDOW_S
    answered = 0

    async def client() -> None:
        nonlocal answered
        while time.perf_counter() < until:
            await queue.submit(REQUEST)
            answered += time.perf_counter() < until

    await asyncio.gather(*[client() for _ in range(CLIENTS)])
    return answered / WINDOW_S


async def started(
    stack: AsyncExitStack, zygotes: Zygotes, folder: Path, spec: ModelSpec, threads: int
) -> tuple[ProcessHost, int]:
    """The host and its worker's pid."""
    host = ProcessHost(zygotes, state_dir=folder, threads=threads)
    stack.push_async_callback(host.stop, 1.0)
    loaded = await host.load(spec, ["cpu"])
    return host, loaded.details["pids"][0]


async def compare(rounds: int, folder: Path) -> None:
    specs = {
        "large": large(folder / "large/1/model.onnx"),
        "tiny": models.spec_of(models.add_onnx(folder / "tiny/1/model.onnx", shape=(1, 1))),
    }
    async with AsyncExitStack() as stack:
        zygotes = Zygotes()
        stack.push_async_callback(zygotes.close)
        hosts = {
            (name, threads): [
                (await started(stack, zygotes, folder, spec, threads))[0] for _ in range(4)
            ]
            for name, spec in specs.items()
            for threads in THREADS
        }
        rates: dict[tuple[tuple[str, ...], int], list[float]] = {}
        for _ in range(rounds):
            for names in TOGETHER:
                for threads in THREADS:
                    busy = [hosts[n, threads][names[:i].count(n)] for i, n in enumerate(names)]
                    found = await asyncio.gather(*map(rate, busy))
                    rates.setdefault((names, threads), []).append(sum(found))
    for names in TOGETHER:
        one = rates[names, 1]
        print(f"{' + '.join(names):30}", *(_told(t, rates[names, t], one) for t in THREADS))


def _told(threads: int, rates: Sequence[float], one: Sequence[float]) -> str:
    ratio = statistics.median(mine / its for mine, its in zip(rates, one, strict=True))
    return f"| {threads} threads: {statistics.median(rates):6.0f}/s, {ratio:.2f}x"


async def spin(folder: Path) -> None:
    spec = models.spec_of(models.python_model(folder / "torch/1", TORCH), "python")
    for label, environment in (("as started", {}), ("spinning", SPINNING)):
        settings.SETTINGS.update(environment)
        async with AsyncExitStack() as stack:
            zygotes = Zygotes()
            stack.push_async_callback(zygotes.close)
            pair = [await started(stack, zygotes, folder, spec, 2) for _ in range(2)]
            processes = [psutil.Process(pid) for _, pid in pair]
            await asyncio.gather(*[host.infer(REQUEST) for host, _ in pair])
            before, began, answered = _cpu_s(processes), time.perf_counter(), 0
            while time.perf_counter() - began < 10 * WINDOW_S:
                await asyncio.gather(*[host.infer(REQUEST) for host, _ in pair])
                answered += len(pair)
            busy_s = _cpu_s(processes) - before
            before = _cpu_s(processes)
            await asyncio.sleep(0.5)
            idle_ms = (_cpu_s(processes) - before) * 1e3
            per_request_ms = busy_s / answered * 1e3
            print(
                f"{label}: {per_request_ms:.1f} ms CPU a request; idle for 0.5 s: {idle_ms:.0f} ms"
            )


def _cpu_s(processes: Sequence[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        if sys.argv[1:] == ["spin"]:
            uvloop.run(spin(Path(name)))
        else:
            uvloop.run(compare(int(sys.argv[1]) if sys.argv[1:] else 10, Path(name)))


if __name__ == "__main__":
    main()
