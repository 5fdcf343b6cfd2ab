"""Weights to a GPU, asleep and awake again: python -m bench.gpu [--device cuda:0] [--gib 8] [--rounds 5]

One safetensors file, in the page cache, of tensors as a llama of 7 billion has them. In one run, in
alternating turns, each as bytes a second:

    preadv    two threads read the file into a ring of page-locked memory, and nothing else
    pinned    copies from page-locked memory to the device, and nothing else
    load      `read_weights`: the file to the device
    sleep     `Movable.sleep`: host memory is made and locked, everything is copied, the device emptied
    wake      `Movable.wake`
    making    only the host memory that a sleep needs: what stands between it and the plain copy

Judged are ratios within a round, the median of the rounds: load to the slower of preadv and pinned
(>= 0.80), sleep and wake to pinned (>= 0.90). Without a GPU it says so and measures nothing.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Protocol

import torch
from safetensors.torch import save_file

from bench.figures import Row, table, write
from repository.backends import ring
from repository.backends.asleep import BLOCK, Ferry, Movable
from repository.backends.ferry import CudaFerry
from repository.backends.weights import CHUNK, read_weights

GIB = 1 << 30
LOAD, REST = 0.80, 0.90
WIDTH = 4096  # tensors are [WIDTH, WIDTH] and [WIDTH * 11 / 4, WIDTH], of two bytes a number


class Machine(Protocol):
    """Where it runs; a test has one without a GPU."""

    device: str

    def lane(self) -> ring.Lane: ...

    def ferry(self) -> Ferry: ...

    def finished(self) -> None:
        """Returns when the device has nothing left to do."""
        ...


class Cuda:
    def __init__(self, device: str) -> None:
        self.device = device
        self._there = torch.device(device)
        torch.cuda.set_device(self._there)

    def lane(self) -> ring.Lane:
        return ring.CudaLane(self._there)

    def ferry(self) -> Ferry:
        return CudaFerry(self._there)

    def finished(self) -> None:
        torch.cuda.synchronize(self._there)


def written(path: Path, size: int, width: int = WIDTH) -> int:
    """A file of about `size` bytes; how many its tensors have."""
    tensors: dict[str, torch.Tensor] = {}
    total = 0
    while total < size:
        rows = width if len(tensors) % 7 < 4 else width * 11 // 4
        tensor = torch.randint(0, 255, (rows, 2 * width), dtype=torch.uint8).view(torch.bfloat16)
        tensors[f"layers.{len(tensors)}.weight"] = tensor
        total += tensor.nbytes
    save_file(tensors, path)
    path.read_bytes()  # into the page cache
    return total


def one_round(machine: Machine, path: Path) -> dict[str, float]:
    """Bytes a second of each."""
    found: dict[str, float] = {}
    size = path.stat().st_size

    @contextmanager
    def timed(what: str) -> Iterator[None]:
        machine.finished()
        began = time.perf_counter()
        yield
        machine.finished()
        found[what] = size / (time.perf_counter() - began)

    with path.open("rb", buffering=0) as file, timed("preadv"):
        _only_read(file.fileno(), size, machine)
    _only_copy(machine, size, timed)
    with timed("load"):
        tensors = read_weights([path], device=machine.device)
    movable = Movable(
        machine.device,
        partial(dict, weights=list(tensors.values())),
        ferry=machine.ferry(),
        block=BLOCK,
    )
    del tensors
    with timed("sleep"):
        movable.sleep()
    with timed("wake"):
        movable.wake()
    del movable
    gc.collect()
    ferry = machine.ferry()
    with timed("making"):
        made = list(ferry.memory([min(BLOCK, size - at) for at in range(0, size, BLOCK)]))
    ferry.give(made)
    return found


def ratios(rounds: Sequence[Mapping[str, float]]) -> list[Row]:
    """Medians over the rounds. Pure."""

    def of(ask: Callable[[Mapping[str, float]], float]) -> float:
        return median(map(ask, rounds))

    rows = [
        Row(what, of(lambda one, what=what: one[what] / 1e9), "GB/s")
        for what in ("preadv", "pinned", "load", "sleep", "wake", "making")
    ]
    load = of(lambda one: one["load"] / min(one["preadv"], one["pinned"]))
    rows.append(Row("load / min(preadv, pinned)", load, "x", at_least=LOAD))
    for what in ("sleep", "wake"):
        share = of(lambda one, what=what: one[what] / one["pinned"])
        rows.append(Row(f"{what} / pinned", share, "x", at_least=REST))
    return rows


def _only_read(fd: int, size: int, machine: Machine) -> None:
    """With as many threads and as much at a time as a load has."""

    class Nowhere:
        """A lane that takes no time."""

        def __init__(self, lane: ring.Lane) -> None:
            self.memory = lane.memory

        def copy(self, target: torch.Tensor, source: torch.Tensor) -> None: ...

        def mark(self) -> Callable[[], None]:
            return lambda: None

    def read(into: memoryview, at: int) -> None:
        done = 0
        while done < len(into):
            done += os.preadv(fd, [into[done:]], at + done)

    chunks = [ring.Chunk(read, at, min(CHUNK, size - at), ()) for at in range(0, size, CHUNK)]
    ring.carry(chunks, Nowhere(machine.lane()), size=CHUNK)


def _only_copy(
    machine: Machine, size: int, timed: Callable[[str], AbstractContextManager[None]]
) -> None:
    lane = machine.lane()
    source = lane.memory(BLOCK)
    source.fill_(1)
    target = torch.empty(BLOCK, dtype=torch.uint8, device=machine.device)
    with timed("pinned"):
        for at in range(0, size, BLOCK):
            count = min(BLOCK, size - at)
            lane.copy(target[:count], source[:count])
        lane.mark()()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--gib", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("bench/out/gpu.json"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(
            f"torch {torch.__version__} finds no GPU here, and this measures nothing else: run it on a "
            "machine with one, with a torch that was built for CUDA"
        )
    machine = Cuda(options.device)
    with tempfile.TemporaryDirectory() as home:
        path = Path(home) / "model.safetensors"
        size = written(path, int(options.gib * GIB))
        one_round(machine, path)  # kernels are loaded, the driver is awake
        found = ratios([one_round(machine, path) for _ in range(options.rounds)])
    title = f"weights, {options.device} ({torch.cuda.get_device_name(options.device)})"
    print(table(f"{title}, {size / GIB:.1f} GiB", found))
    write(options.out, title, found)


if __name__ == "__main__":
    main()
