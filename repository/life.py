"""The life of one generation, top to bottom, from the moment that it was admitted.

The planner decides that a generation should exist and when it should end; `live` is how it lives in
between. It is the only caller of `Host.load` and `Host.stop`, so neither can run twice or at once,
and its `finally` is the only place where memory goes back to the ledger.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from repository.adapting.rows import RowAdapters
from repository.adapting.shelf import Shelf
from repository.batching import Batcher
from repository.errors import (
    FailedError,
    FilesChangedError,
    LoadTimeoutError,
    ModelNotReadyError,
    WorkerDiedError,
)
from repository.hosts.base import Host
from repository.lifecycle.generation import Generation
from repository.lifecycle.states import Event, advance
from repository.messages import Loaded
from repository.signature import Signature
from repository.spec import ModelSpec
from repository.streaming import Streams

T = TypeVar("T")


async def stop(gen: Generation, host: Host, stop_s: float) -> bool:
    await host.stop(stop_s)
    return True


@dataclass(frozen=True, slots=True)
class Means:
    """What a life needs from the world.

    rehearse   warm-up and golden checks; returns a note for the story, raises what is wrong
    unchanged  are the files of this spec still those that the scan saw
    phase      told how long each part of a load took: read, warmup
    end        stops a host within so many seconds; is all that it held surely back
    shelf      which adapters the models have
    """

    make_host: Callable[[ModelSpec], Host]
    rehearse: Callable[[Host, ModelSpec, Loaded], Awaitable[str]]
    unchanged: Callable[[ModelSpec], Awaitable[bool]]
    phase: Callable[[Generation, str, float], None]
    end: Callable[[Generation, Host, float], Awaitable[bool]] = stop
    shelf: Shelf = field(default_factory=Shelf)
    load_timeout_s: float = 600.0
    drain_s: float = 30.0
    stop_s: float = 5.0
    max_queue: int = 1024


async def live(gen: Generation, means: Means, give_back: Callable[[Generation], None]) -> None:
    """Drives `gen` from LOADING to GONE or FAILED. What goes wrong ends in `gen.error`."""
    host: Host | None = None
    cause: BaseException = ModelNotReadyError(f"{gen} is unloading", retry_after_s=1.0)
    gen.confirmed = False
    try:
        host = means.make_host(gen.spec)
        gen.loaded = await _unless(gen.retire_asked, _load(gen, host, means))
        gen.step(Event.LOADED)
        note = await _unless(gen.retire_asked, _rehearse(gen, host, means))
        open_for_requests(gen, host, gen.loaded, means)
        gen.step(Event.WARMED, note)
        await _until_retired(gen, host)
        gen.step(Event.RETIRE, gen.retire_why)
        gen.step(Event.DRAINED, await _drain(gen, host, means.drain_s))
    except _Retired:
        gen.step(Event.RETIRE, gen.retire_why)
    except asyncio.CancelledError as error:  # the server is going down without patience
        gen.fault(error)
        raise
    except Exception as error:  # noqa: BLE001 - kept in the story
        cause = error
        gen.fault(error)
    finally:
        try:
            if gen.batcher is not None:
                gen.batcher.close(cause)
            if gen.streams is not None:
                gen.streams.close(cause)
            _unfit(gen, means)
            gen.confirmed = host is None or await means.end(gen, host, means.stop_s)
        finally:
            advance(gen.state, Event.STOPPED)  # an illegal move must not free what may be in use
            give_back(gen)
            gen.step(Event.STOPPED)


async def _load(gen: Generation, host: Host, means: Means) -> Loaded:
    began = time.perf_counter()
    loaded = await _in_time(_read(gen, host, means), gen, means, "loaded")
    means.phase(gen, "read", time.perf_counter() - began)
    return loaded


async def _read(gen: Generation, host: Host, means: Means) -> Loaded:
    loaded = await host.load(gen.spec, gen.device)
    if not await means.unchanged(gen.spec):
        raise FilesChangedError(
            f"the files of {gen.spec.model} version {gen.spec.version} changed while they were "
            f"read; they are looked at again"
        )
    return loaded


async def _rehearse(gen: Generation, host: Host, means: Means) -> str:
    assert gen.loaded is not None
    began = time.perf_counter()
    rehearsal = _try_out(gen, host, gen.loaded, means)
    note = await _in_time(rehearsal, gen, means, "ended its warm-up and checks")
    means.phase(gen, "warmup", time.perf_counter() - began)
    return note


async def _try_out(gen: Generation, host: Host, loaded: Loaded, means: Means) -> str:
    fitting = gen.fitting = means.shelf.fit(gen.spec, host, loaded, means.load_timeout_s)
    if fitting is None:
        note = await means.rehearse(host, gen.spec, loaded)
        gen.measured = await host.memory()
        return note
    await fitting.sync()  # one that fails is shown as failed, and keeps nobody from serving
    note = await means.rehearse(host, gen.spec, loaded)
    gen.measured = await host.memory()
    await fitting.sync()
    return note


def _unfit(gen: Generation, means: Means) -> None:
    if gen.fitting is not None:
        means.shelf.part(gen.spec.model, gen.fitting)
        gen.fitting = gen.rows = None


async def _in_time(work: Awaitable[T], gen: Generation, means: Means, done: str) -> T:
    try:
        async with asyncio.timeout(means.load_timeout_s) as limit:
            return await work
    except TimeoutError:
        if not limit.expired():
            raise
        raise LoadTimeoutError(
            f"{gen.spec.model} version {gen.spec.version} had not {done} after "
            f"{means.load_timeout_s:g} s (--load-timeout)"
        ) from None


def open_for_requests(gen: Generation, host: Host, loaded: Loaded, means: Means) -> None:
    gen.signature = Signature(gen.spec.model, loaded, gen.spec.config)
    gen.batcher = Batcher(host, loaded, gen.spec.config, max_queue=means.max_queue)
    if gen.fitting is not None:
        gen.fitting.begin()
        gen.rows = RowAdapters(gen.fitting, whole=loaded.max_batch_size == 0)
    if "generate" in loaded.abilities:
        gen.streams = Streams(host, loaded, gen.spec.config, max_queue=means.max_queue)


async def _until_retired(gen: Generation, host: Host) -> None:
    await _first(host.died, gen.retire_asked.wait())
    if not gen.retire_asked.is_set():  # who was told to go and dies has gone
        raise died(gen, host)


def died(gen: Generation, host: Host) -> FailedError:
    spec = gen.spec
    return WorkerDiedError(
        f"the worker of '{spec.model}' version {spec.version} died: {host.died.result()}"
    )


async def _drain(gen: Generation, host: Host, patience_s: float) -> str:
    """Waits for the last lease, at most `patience_s`. Returns a note for the story."""
    began = gen.clock()
    await _first(host.died, gen.idle.wait(), patience_s)
    gen.drain_s = gen.clock() - began
    return f"{gen.leases} leases cut off" if gen.leases else ""


class _Retired(Exception):  # noqa: N818 - a signal, not an error
    pass


async def _unless(stop: asyncio.Event, work: Awaitable[T]) -> T:
    """The result of `work`, or _Retired if `stop` is first; `work` is then cancelled and over."""
    task: asyncio.Future[T] = asyncio.ensure_future(work)
    try:
        await _first(task, stop.wait())
    finally:
        task.cancel()
        await asyncio.wait([task])
    if stop.is_set():
        if not task.cancelled():
            task.exception()  # retrieved: nobody asks for it any more
        raise _Retired
    return task.result()


async def _first(
    kept: asyncio.Future[T], other: Awaitable[object], limit_s: float | None = None
) -> None:
    """Returns when either is done or the limit is over. `kept` is left running, `other` is not."""
    waiting: list[asyncio.Future[Any]] = [kept, asyncio.ensure_future(other)]
    try:
        await asyncio.wait(waiting, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting[1].cancel()
