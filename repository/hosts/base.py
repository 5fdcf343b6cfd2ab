"""Where a model runs. A host owns the thread, process or actor; a backend owns the mathematics."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from repository.adapters.orders import AdapterOrder, AdapterReport
from repository.generate import Ended, GenerateRequest, Piece
from repository.lifecycle.placement import Memory
from repository.messages import InferRequest, InferResponse, Loaded
from repository.responding import Responses
from repository.spec import ModelSpec


class Host(Protocol):
    """One host serves one generation and is thrown away with it.

    Order of calls: `load` once, then `infer`, `generate` and `adapt` any number of times, with `sleep`
    and `wake` in between, then `stop` once.
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

    async def load(self, spec: ModelSpec, devices: Sequence[str]) -> Loaded:
        """`devices`: one for each instance."""
        ...

    def infer(self, request: InferRequest, at: int | None = None) -> asyncio.Future[InferResponse]:
        """`at`: by which instance, from 0; None: by whichever is free first."""
        ...

    def ask(self, requests: Sequence[Responses], at: int | None = None) -> asyncio.Future[None]:
        """All of them at once, by one instance; only where `Loaded.abilities` has "ask". Each is told
        its answers and its end, on the loop's thread. Done when the model can take the next ones: some
        of these may go on. `Responses.close` leaves one of them. Never fails: what goes wrong is what
        the requests end with."""
        ...

    def room(self, size: int) -> memoryview | None:
        """`size` bytes, page-aligned, that the model can read where they are, for a request that is on
        its way. They cost nothing until they are written, and are given back when the last view of
        them has died. None: there is nothing better than memory of one's own."""
        ...

    def generate(
        self, request: GenerateRequest, tell: Callable[[Piece], None]
    ) -> asyncio.Future[Ended]:
        """One sequence: `tell` is called with each piece, on the loop's thread, before the future is
        done; it must not raise. Cancelling the future leaves the sequence at the next step; nothing
        is told after that. Fails with what the model says (InvalidRequestError, ...), with
        InferenceFailedError, WorkerDiedError. Raises InvalidRequestError where the model does not
        generate."""
        ...

    async def adapt(self, orders: Sequence[AdapterOrder]) -> list[AdapterReport]:
        """Carried out in every worker; a report for each order, in their order, with the error of the
        first worker that has one. No orders: where each adapter is now. Raises InvalidRequestError
        where the model takes no adapters, WorkerDiedError."""
        ...

    async def memory(self) -> Memory:
        """Bytes by device and kind (weights, kv, adapters, workspace, context), measured now, summed
        over the workers. What sleeps is under "host". Empty where it cannot be told."""
        ...

    def figures(self) -> Sequence[bytes]:
        """What its model counts itself, as each instance told it last (see `repository.figures`)."""
        ...

    async def ready(self) -> bool:
        """What the model says of itself, a second ago at most, or as it said it last where it computes.
        Takes half a second at most, and never raises. Only where `Loaded.abilities` has "ready"."""
        ...

    async def sleep(self) -> None:
        """Moves what the model has on its devices into host memory, and gives the devices' memory back
        as far as a living process can. Only where `Loaded.abilities` has "sleep", and when nothing is in
        flight; until `wake` only `memory`, `wake` and `stop` may be called. Raises what went wrong; then
        it can only be stopped."""
        ...

    async def wake(self) -> None:
        """Back to the same devices: `infer` and the others may be called again, and answer as before.
        Raises OutOfMemory errors of the backend, WorkerDiedError; then it can only be stopped."""
        ...

    async def validate(self, spec: ModelSpec, device: str) -> None:
        """In place of `load`: what can be told of the model's files without the memory that a load
        takes, as the backend knows best. Raises what `load` would; then (or not) `stop`."""
        ...

    async def stop(self, grace_s: float) -> None: ...
