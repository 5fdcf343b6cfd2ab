"""The life of one generation, top to bottom, from the moment that it was admitted.

The planner decides that a generation should exist and when it should end; `live` is how it lives in
between. It is the only caller of `Host.load`, `sleep`, `wake` and `stop`, so none of them can run twice
or at once. Memory goes back to the ledgers in its `finally`, all of it; of one that falls asleep, what
came free (`_to_bed`); and of one that another wakes nothing, for the other has it all.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from repository.adapting.rows import RowAdapters
from repository.adapting.shelf import Shelf
from repository.attempts import at_last
from repository.cache import ResponseCache
from repository.entrance import let_in
from repository.errors import (
    FailedError,
    FilesChangedError,
    LoadFailedError,
    LoadTimeoutError,
    ModelNotReadyError,
    WorkerDiedError,
)
from repository.hosts.base import Host
from repository.lifecycle.generation import Generation
from repository.lifecycle.placement import HOST, Bytes
from repository.lifecycle.states import Event, State, advance
from repository.lifecycle.status import text_of
from repository.messages import Loaded
from repository.sequences.beginning import first_states
from repository.sequences.whole import untold, whole
from repository.signature import Signature
from repository.sizes import human
from repository.spec import ModelSpec
from repository.streaming import Streams

T = TypeVar("T")


BED_WAIT_S = 2.0  # for those who make room in the host tier to end


async def stop(gen: Generation, host: Host, stop_s: float) -> bool:
    await host.stop(stop_s)
    return True


@dataclass(frozen=True, slots=True)
class Means:
    """What a life needs from the world.

    rehearse   warm-up and golden checks; returns a note for the story, raises what is wrong
    unchanged  are the files of this spec still those that the scan saw
    phase      told how long each part of a load took: read, build (where the backend tells it
               apart), warmup; or wake; and falling asleep: sleep
    retries    further attempts at a load that failed
    end        stops a host within so many seconds; is all that it held surely back
    shelf      which adapters the models have
    clock      in seconds, for sequences that wait or are silent
    cache      where answers are kept
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
    clock: Callable[[], float] = time.perf_counter
    retries: int = 0
    cache: ResponseCache | None = None


async def _no_bed(gen: Generation, n_bytes: int) -> bool:
    return False


class Books(NamedTuple):
    """Where it is written down what a generation holds (`Generation.held`).

    give_back  all of it has come free
    keep       no more than that any longer, by device
    bed        so many more bytes of the host tier, soon; false: there is no room for them
    """

    give_back: Callable[[Generation], None]
    keep: Callable[[Generation, Bytes], None] = lambda gen, held: None
    bed: Callable[[Generation, int], Awaitable[bool]] = _no_bed


async def live(gen: Generation, means: Means, books: Books) -> None:
    """Drives `gen` from LOADING to GONE or FAILED. What goes wrong ends in `gen.error`."""
    cause: BaseException = ModelNotReadyError(f"{gen} is unloading", retry_after_s=1.0)
    gen.confirmed = False
    try:
        note = "" if gen.host is None else await _wake(gen, gen.host, means, books)
        if gen.host is None:  # nobody slept, or it could not be woken
            gen.loaded = await _unless(gen.retire_asked, _load_at_last(gen, means))
        host = gen.host
        assert host is not None
        gen.step(Event.LOADED, note)
        note = await _unless(gen.retire_asked, _rehearse(gen, host, means))
        open_for_requests(gen, host, _loaded(gen), means)
        gen.step(Event.WARMED, note)
        await _until_retired(gen, host)
        gen.step(Event.RETIRE, gen.retire_why)
        note = await _drain(gen, host, means.drain_s)
        if gen.sleeps:
            _close(gen, cause, means)
            note = await _fall_asleep(gen, host, means, books)
        if not gen.sleeps:
            gen.step(Event.DRAINED, note)
        else:
            gen.fall_asleep(note)
            if await _is_woken(gen, host):
                return
            gen.step(Event.RETIRE, gen.retire_why)
    except _Retired:
        gen.step(Event.RETIRE, gen.retire_why)
    except asyncio.CancelledError as error:  # the server is going down without patience
        _broken_off(gen, error)
        raise
    except Exception as error:  # noqa: BLE001 - kept in the story
        cause = error
        gen.fault(error)
    finally:
        if gen.state is not State.GONE:  # else another has its host, and all that it held
            try:
                _close(gen, cause, means)
                last, gen.host = gen.host, None
                gen.confirmed = last is None or await means.end(gen, last, means.stop_s)
            finally:
                advance(gen.state, Event.STOPPED)  # an illegal move frees nothing: it may be in use
                books.give_back(gen)
                gen.step(Event.STOPPED)


def _broken_off(gen: Generation, error: BaseException) -> None:
    if gen.state is State.ASLEEP:
        gen.retire("the server ends")
        gen.step(Event.RETIRE, gen.retire_why)
    elif gen.state is not State.GONE:
        gen.fault(error)


def _close(gen: Generation, cause: BaseException, means: Means) -> None:
    """No request is taken any more. Again: nothing."""
    if gen.batcher is not None:
        gen.batcher.close(cause)
    if gen.streams is not None:
        gen.streams.close(cause)
    if gen.fitting is not None:
        means.shelf.part(gen.spec.model, gen.fitting)
        gen.rows = None
        if not gen.sleeps:  # else whoever wakes it knows by that what its host has
            gen.fitting = None


async def examine(gen: Generation, means: Means) -> Exception | None:
    """What can be told of its files before anybody leaves for it: what is wrong with them, or None; also
    if it is retired meanwhile. It is queued, and has nothing yet."""
    host: Host | None = None
    try:
        host = means.make_host(gen.spec)
        looking = _in_time(host.validate(whole(gen.spec), gen.device), gen, means, "been looked at")
        await _unless(gen.retire_asked, looking)
    except _Retired:
        return None
    except Exception as error:  # noqa: BLE001 - kept in the story
        return error
    finally:
        if host is not None:
            await host.stop(means.stop_s)
    return None


# asleep -------------------------------------------------------------------------------------------


class _Sleepless(Exception):  # noqa: N818 - a signal, not an error
    pass


async def _fall_asleep(gen: Generation, host: Host, means: Means, books: Books) -> str:
    """Either it sleeps now, or `gen.sleeps` is no longer so; a note for the story."""
    began = time.perf_counter()
    try:
        held = await _unless(gen.roused, _to_bed(gen, host, means, books))
    except Exception as error:  # noqa: BLE001 - it is unloaded then; kept in the story
        gen.sleeps, gen.fitting = False, None
        if isinstance(error, _Retired):
            return gen.retire_why
        return str(error) if isinstance(error, _Sleepless) else f"could not sleep: {text_of(error)}"
    # From here no await until it sleeps: whoever wants what comes free may want to wake it.
    books.keep(gen, held)
    means.phase(gen, "sleep", time.perf_counter() - began)
    return f"{human(held[HOST])} in host memory"


async def _to_bed(gen: Generation, host: Host, means: Means, books: Books) -> Bytes:
    """What it holds asleep. Raises _Sleepless, or what went wrong."""
    if gen.leases:  # what still runs in its host cannot sleep
        raise _Sleepless(f"{gen.leases} leases cut off")
    n_bytes = bytes_asleep(gen)
    await _bed(gen, n_bytes, books)
    await _in_time(host.sleep(), gen, means, "fallen asleep")
    gen.measured = await _in_time(host.memory(), gen, means, "said what it holds asleep")
    told = {device: sum(kinds.values()) for device, kinds in gen.measured.items()}
    await _bed(gen, told.get(HOST, 0), books, has=n_bytes)
    held = {d: min(n, told.get(d, 0)) for d, n in gen.held.items()}
    return held | {HOST: told.get(HOST, 0) or n_bytes}


async def _bed(gen: Generation, n_bytes: int, books: Books, *, has: int = 0) -> None:
    """So many bytes of the host tier, of which it `has` some. Raises _Sleepless."""
    try:
        async with asyncio.timeout(BED_WAIT_S):
            if n_bytes <= has or await books.bed(gen, n_bytes - has):
                return
    except TimeoutError:
        pass
    raise _Sleepless(f"the host tier has no place for {human(n_bytes)}")


def bytes_asleep(gen: Generation) -> int:
    """Of host memory, as far as it can be told before: its weights and adapters; all that it was given
    if nobody has measured those."""
    kept = ("weights", "adapters")
    of_it = [n for kinds in gen.measured.values() for kind, n in kinds.items() if kind in kept]
    return sum(of_it) or sum(n for device, n in gen.held.items() if device != HOST)


async def _is_woken(gen: Generation, host: Host) -> bool:
    """Waits for whoever wakes it; false: it is to end, or its worker has died."""
    await _first(host.died, gen.roused.wait())
    if gen.state is State.GONE:
        return True
    if not gen.roused.is_set():
        gen.retire(f"its worker died asleep: {host.died.result()}")
    return False


async def _wake(gen: Generation, host: Host, means: Means, books: Books) -> str:
    """What slept is awake, or its host is stopped, so that the model can be loaded as if nothing had
    slept. A note for the story."""
    began = time.perf_counter()
    try:
        await _unless(gen.retire_asked, _in_time(host.wake(), gen, means, "woken up"))
    except _Retired:
        raise
    except Exception as error:  # noqa: BLE001 - it is loaded then; kept in the story
        gen.host = gen.fitting = gen.loaded = None
        await means.end(gen, host, means.stop_s)
        books.keep(gen, gen.placement.needs)
        return f"it could not be woken ({text_of(error)}), and is loaded"
    gen.woken = True
    books.keep(gen, gen.placement.needs)
    means.phase(gen, "wake", time.perf_counter() - began)
    return "woken"


# awake --------------------------------------------------------------------------------------------


async def _load_at_last(gen: Generation, means: Means) -> Loaded:
    """Each attempt has a host of its own, which is `gen.host` then."""

    async def attempt() -> Loaded:
        gen.host = means.make_host(gen.spec)
        return await _load(gen, gen.host, means)

    async def clear() -> None:
        assert gen.host is not None
        await means.end(gen, gen.host, means.stop_s)
        gen.host = None

    return await at_last(attempt, clear, retries=means.retries, what=str(gen))


async def _load(gen: Generation, host: Host, means: Means) -> Loaded:
    began = time.perf_counter()
    loaded = await _in_time(_read(gen, host, means), gen, means, "loaded")
    took_s, build_s = time.perf_counter() - began, loaded.details.get("build_s")
    if isinstance(build_s, float) and 0 <= build_s <= took_s:  # a worker may say anything
        took_s -= build_s
        means.phase(gen, "build", build_s)
    means.phase(gen, "read", took_s)
    return loaded


async def _read(gen: Generation, host: Host, means: Means) -> Loaded:
    if gen.rolled_back and not await means.unchanged(gen.spec):
        raise LoadFailedError(
            f"{gen.spec.model} version {gen.spec.version} cannot come back as it was before: its files "
            f"have been overwritten; mend the new ones, or put the old ones back"
        )
    loaded = await host.load(whole(gen.spec), gen.placement.devices)
    if not await means.unchanged(gen.spec):
        raise FilesChangedError(
            f"the files of {gen.spec.model} version {gen.spec.version} changed while they were "
            f"read; they are looked at again"
        )
    return loaded


def _loaded(gen: Generation) -> Loaded:
    assert gen.loaded is not None
    return gen.loaded


async def _rehearse(gen: Generation, host: Host, means: Means) -> str:
    began = time.perf_counter()
    rehearsal = _try_out(gen, host, _loaded(gen), means)
    note = await _in_time(rehearsal, gen, means, "ended its warm-up and checks")
    means.phase(gen, "warmup", time.perf_counter() - began)
    return note


async def _try_out(gen: Generation, host: Host, loaded: Loaded, means: Means) -> str:
    """What was woken has been tried out before."""
    slept = gen.fitting
    fitting = gen.fitting = means.shelf.fit(gen.spec, host, loaded, means.load_timeout_s)
    if fitting is not None:
        if slept is not None:
            fitting.take_over(slept)
        await fitting.sync()  # one that fails is shown as failed, and keeps nobody from serving
    if gen.spec.config.sequences is not None:
        gen.initial = await asyncio.to_thread(first_states, gen.spec, loaded)
    note = "" if gen.woken else await means.rehearse(host, untold(gen.spec), loaded)
    gen.measured = await host.memory()
    if fitting is not None:
        await fitting.sync()
    return note


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
    let_in(gen, host, loaded, max_queue=means.max_queue, clock=means.clock, cache=means.cache)
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
