"""Real hosts for tests, and eyes for what they leave behind."""

from __future__ import annotations

import asyncio
import os
import select
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from repository.hosts.base import Host
from repository.hosts.inline import InlineHost
from repository.hosts.process import ProcessHost
from repository.hosts.zygotes import Zygotes
from repository.messages import InferRequest, InferResponse, Loaded
from repository.spec import ModelSpec
from repository.tensors import Array, Tensor

# Says that a request is inside, and keeps it there.
SLOW = """
    import pathlib, time
    class Model:
        def infer(self, inputs):
            pathlib.Path(MARK).write_text("here")
            time.sleep(600)
"""


@asynccontextmanager
async def forking() -> AsyncIterator[Zygotes]:
    """Zygotes; afterwards no child process is left."""
    before = children()
    zygotes = Zygotes()
    try:
        yield zygotes
    finally:
        await zygotes.close()
    assert children() <= before


@asynccontextmanager
async def hosted(
    spec: ModelSpec, state_dir: Path, zygotes: Zygotes | None = None, **options: Any
) -> AsyncIterator[tuple[Host, Loaded]]:
    """A loaded host: in a process where zygotes are given, else inline."""
    host = make(spec, state_dir, zygotes, **options)
    try:
        yield host, await host.load(spec, ["cpu"] * host.slots)
    finally:
        await host.stop(5.0)


def make(
    spec: ModelSpec, state_dir: Path, zygotes: Zygotes | None = None, **options: Any
) -> ProcessHost | InlineHost:
    options.setdefault("instances", spec.config.instances)
    if zygotes is None:
        return InlineHost(state_dir=state_dir, **options)
    return ProcessHost(zygotes, state_dir=state_dir, **options)


def ask(*tensors: Tensor, outputs: tuple[str, ...] = ()) -> InferRequest:
    return InferRequest(list(tensors), outputs)


def one(response: InferResponse) -> Array:
    """The only output."""
    (tensor,) = response.outputs
    return tensor.array()


def children() -> set[int]:
    return {p.pid for p in psutil.Process().children(recursive=True)}


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def until_gone(pids: set[int], patience_s: float = 20.0) -> set[int]:
    """Those that still live after `patience_s`; returns as soon as all are gone. Blocks."""
    left = set()
    for pid in pids:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            ended, _, _ = select.select([pidfd], [], [], patience_s)
        finally:
            os.close(pidfd)
        if not ended:
            left.add(pid)
    return left


class Waymark:
    """A named pipe at `path`: whoever writes a word into it has come so far."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)

    async def reached(self) -> str:
        """The word, once it is there."""
        return await asyncio.to_thread(self.path.read_text)


async def fails(work: Callable[[], Any], kind: type[BaseException]) -> str:
    """The text of the error of exactly `kind` that `work` ends with."""
    with pytest.raises(kind) as caught:
        await work()
    assert caught.type is kind
    return str(caught.value)
