"""Where a model runs. A host owns the thread, process or actor; a backend owns the mathematics."""

from __future__ import annotations

import asyncio
from typing import Protocol

from repository.messages import InferRequest, InferResponse, Loaded
from repository.spec import ModelSpec


class Host(Protocol):
    """One host serves one generation and is thrown away with it.

    Order of calls: `load` once, then `infer` any number of times, then `stop` once.
    `stop` is safe after a failed or cancelled `load`, and after death; when it returns, everything
    that the host held (processes, sockets, memory, snapshot files) is gone. Work that is in flight
    when `stop` is called may finish within `grace_s`.
    `died` resolves with the reason, in words, if the host goes down without having been told to;
    what was in flight then fails with WorkerDiedError.
    `slots` is how many `infer` calls run at once (its instances); more than that simply wait.
    `infer` returns a future, not a coroutine: the hot path makes no task. In its requests, and in
    no others, a tensor's data may be a list of buffers that follow each other (`merging.merge`).
    """

    died: asyncio.Future[str]
    slots: int

    async def load(self, spec: ModelSpec, device: str) -> Loaded: ...

    def infer(self, request: InferRequest) -> asyncio.Future[InferResponse]: ...

    def room(self, size: int) -> memoryview | None:
        """`size` bytes, page-aligned, that the model can read where they are, for a request that is on
        its way. They cost nothing until they are written, and are given back when the last view of
        them has died. None: there is nothing better than memory of one's own."""
        ...

    async def memory(self) -> dict[str, int]:
        """Bytes by kind, measured now, summed over the workers."""
        ...

    async def stop(self, grace_s: float) -> None: ...
