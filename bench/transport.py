"""How tensors travel between the server and a worker: python -m bench.transport [--seconds 0.4]

A model that adds one to its input, asked through its host alone, without HTTP: 16 requests in flight,
and one. For each size, in alternating turns:

    inline   everything through the socket
    copied   through the arena, from and to which the front copies what lies elsewhere
    placed   the input lies in the arena already, as a body does that was received there

Prints requests per second and the CPU time of front and worker for each; the size from which `copied`
beats `inline` is `repository.hosts.asking.LARGE`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import uvloop

from bench.depot import cpu_s
from bench.figures import MIB
from repository.forms import form_of
from repository.hosts import asking
from repository.hosts.process import ProcessHost
from repository.hosts.zygotes import Zygotes
from repository.messages import InferRequest, InferResponse
from repository.spec import ModelSpec
from repository.tensors import Buffer, Tensor
from tests import models

SIZES = (64, 4096, 16384, 32768, 65536, 131072, 262144, 600_000, MIB, 2 * MIB, 8 * MIB)
WAYS = ("inline", "copied", "placed")
Ask = Callable[[], InferRequest]


@dataclass
class Turns:
    """`rates` per second; seconds of CPU per request of the front and of the worker."""

    rates: list[float] = field(default_factory=list)
    front_s: list[float] = field(default_factory=list)
    worker_s: list[float] = field(default_factory=list)

    def row(self) -> str:
        front, worker = (statistics.median(each) * 1e6 for each in (self.front_s, self.worker_s))
        return f"{statistics.median(self.rates):9,.0f}/s {front:7.0f} {worker:7.0f}"


class Table:
    def __init__(self, host: ProcessHost, pids: list[int], seconds: float) -> None:
        self._host = host
        self._pids = pids
        self._seconds = seconds

    async def turn(self, ask: Ask, in_flight: int, into: Turns | None) -> None:
        front, worker, began = cpu_s([os.getpid()]), cpu_s(self._pids), time.perf_counter()
        count = await self._drive(ask, in_flight)
        if into is not None:
            into.rates.append(count / (time.perf_counter() - began))
            into.front_s.append((cpu_s([os.getpid()]) - front) / count)
            into.worker_s.append((cpu_s(self._pids) - worker) / count)

    async def _drive(self, ask: Ask, in_flight: int) -> int:
        """Keeps so many in flight for a while; how many were answered."""
        loop = asyncio.get_running_loop()
        over: asyncio.Future[None] = loop.create_future()
        until = time.perf_counter() + self._seconds
        count, left = 0, in_flight

        def go() -> None:
            self._host.infer(ask()).add_done_callback(answered)

        def answered(future: asyncio.Future[InferResponse]) -> None:
            nonlocal count, left
            future.result()
            count += 1
            if time.perf_counter() < until:
                go()
                return
            left -= 1
            if not left:
                over.set_result(None)

        for _ in range(in_flight):
            go()
        await over
        return count


def asking_with(host: ProcessHost, way: str, size: int) -> Ask:
    x = np.ones(size // 4, np.float32)
    own = x.tobytes()
    form = form_of([Tensor("x", "FP32", x.shape, own)])
    rooms = [host.room(size) for _ in range(17)] if way == "placed" else []
    turn = 0

    def ask() -> InferRequest:
        nonlocal turn
        turn += 1
        data: Buffer = (rooms[turn % len(rooms)] if rooms else None) or own
        return InferRequest([Tensor("x", "FP32", x.shape, data)], form=form)

    for room in rooms:
        if room is not None:
            room[:] = own
    return ask


async def measure(options: argparse.Namespace) -> None:
    asking.LARGE = 1  # to see where it should be
    async with AsyncExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        spec = models.spec_of(models.add_onnx(home / "add/1/model.onnx", 1.0, (-1,)))
        zygotes = Zygotes()
        stack.push_async_callback(zygotes.close)
        inline = await _loaded(stack, zygotes, spec, home, arena_size=0)
        shared = await _loaded(stack, zygotes, spec, home, arena_size=1 << 30)
        for in_flight in (16, 1):
            print(f"\n{in_flight} in flight; CPU of front and worker in us per request")
            print(f"{'':>10}" + "".join(f"{way:>12}{'front':>8}{'worker':>8}   " for way in WAYS))
            for size in options.sizes:
                turns = {way: Turns() for way in WAYS}
                for round_ in range(options.rounds + 1):
                    for way, found in turns.items():
                        host, pids = inline if way == "inline" else shared
                        table = Table(host, pids, options.seconds)
                        ask = asking_with(host, way, size)
                        await table.turn(ask, in_flight, found if round_ else None)
                print(
                    f"{size:>10,}" + "   ".join(found.row() for found in turns.values()), flush=True
                )


async def _loaded(
    stack: AsyncExitStack, zygotes: Zygotes, spec: ModelSpec, home: Path, arena_size: int
) -> tuple[ProcessHost, list[int]]:
    host = ProcessHost(zygotes, state_dir=home / "state", threads=1, arena_size=arena_size)
    stack.push_async_callback(host.stop, 5.0)
    loaded = await host.load(spec, ["cpu"])
    return host, list(loaded.details["pids"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.4, help="of one turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    uvloop.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
