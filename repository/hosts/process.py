"""Runs a generation in processes of its own: one worker per instance, forked from a warm zygote.

The only host whose unload surely returns memory, that survives a crash of its model, and that can
stop a model that hangs. One worker that dies takes the generation with it: `died` resolves, what
was in flight there fails with WorkerDiedError, and whoever owns the host stops it and starts
another.

A worker that is not wanted any more is asked first (after what it was asked before), then told by
SIGTERM, then ended by SIGKILL; signals go to its process group, so a model's own children go too.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

from repository.adapters.orders import AdapterOrder, AdapterReport
from repository.backends import registry
from repository.calling import Caller
from repository.errors import InvalidRequestError, LoadFailedError
from repository.generate import Ended, GenerateRequest, Piece
from repository.hosts import arena, frames, snapshots, together
from repository.hosts.arena import Arena
from repository.hosts.asking import LARGE, Asking
from repository.hosts.channel import Channel
from repository.hosts.frames import Kind, LoadOrder
from repository.hosts.groups import only_answer
from repository.hosts.readiness import Readiness
from repository.hosts.threads import threads_for
from repository.hosts.workers import Worker
from repository.hosts.zygotes import Zygotes
from repository.lifecycle.placement import Memory, all_memory
from repository.messages import InferRequest, InferResponse, Loaded
from repository.responding import Responses
from repository.spec import ModelSpec

T = TypeVar("T")
log = logging.getLogger(__name__)
TERM_S = 1.0  # between SIGTERM and SIGKILL
_busy = attrgetter("busy")
VALIDATED_S = 1.0  # a worker has nothing to unload that has only looked
LATE_S = 10.0  # a killed process that is still there then is reported


class ProcessHost:
    """`threads` per worker; None: the cores divided among the instances. `extra` reaches the
    backend. `arena_size` in bytes, 0: all tensors go through the sockets. `caller`: whom its model may
    ask for other models; None: nobody."""

    def __init__(
        self,
        zygotes: Zygotes,
        *,
        state_dir: Path,
        instances: int = 1,
        threads: int | None = None,
        extra: dict[str, Any] | None = None,
        arena_size: int = arena.SIZE,
        caller: Caller | None = None,
    ) -> None:
        self.died: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.slots = instances
        self.blocked: dict[object, list[Any]] = {}  # see `calls.Waits`
        self._caller = caller
        self._asks = False
        self._zygotes = zygotes
        self._state_dir = state_dir
        self._threads = threads
        self._extra = extra or {}
        self._workers: list[Worker] = []
        self._forks: list[asyncio.Task[Worker]] = []
        self._snapshot: Path | None = None
        self._stopping = False
        self._stopped: asyncio.Task[None] | None = None
        self._model = ""
        self._abilities: tuple[str, ...] = ()
        self._arena_size = arena_size
        self._arena: Arena | None = None
        self._asking = Asking(None)
        self._readiness: Readiness | None = None

    # load ---------------------------------------------------------------------------------------

    async def load(self, spec: ModelSpec, devices: Sequence[str]) -> Loaded:
        """Raises LoadFailedError (a leaf), WorkerDiedError. Failed or cancelled, its workers are
        killed at once; `stop` then waits for their end."""
        entry = registry.entry(spec.backend)
        self._name(spec, devices)
        name = f"md:{spec.model}:{spec.version}"
        self._make_arena()
        self._forks = [
            asyncio.create_task(self._fork(entry.framework, name)) for _ in range(self.slots)
        ]
        try:
            # Shielded: a fork that has begun must be known to `stop`, whatever happens here.
            workers = [await asyncio.shield(fork) for fork in self._forks]
            path = await self._prepare(workers[0], spec, devices[0])
            orders = [self._order(spec, device, path, i) for i, device in enumerate(devices)]
            loading = [
                asyncio.create_task(self._ask(worker, Kind.LOAD, order, frames.read_loaded))
                for worker, order in zip(workers, orders, strict=True)
            ]
            loaded = together.loaded(await _all_or_none(loading), [w.child.pid for w in workers])
            self._abilities = loaded.abilities
            self._asks = "ask" in loaded.abilities
            return loaded
        except BaseException:
            self._stopping = True
            self._kill()
            raise

    def _name(self, spec: ModelSpec, devices: Sequence[str]) -> None:
        """Raises LoadFailedError for devices that its backend cannot use."""
        self._model = f"'{spec.model}' version {spec.version}"
        gpu = any(device.startswith("cuda") for device in devices)
        if gpu and not registry.entry(spec.backend).gpu:
            raise LoadFailedError(f"backend '{spec.backend}' cannot use a GPU; set device to cpu")

    def _make_arena(self) -> None:
        """Without one (no descriptor is left, or the system has no such thing) it works too."""
        if self._arena_size:
            try:
                self._arena = Arena(self._arena_size)
            except OSError as error:
                log.warning("%s has no shared memory: %s", self._model, error.strerror)
        self._asking = Asking(self._arena)

    async def _fork(self, framework: str, name: str) -> Worker:
        shared = self._arena.fd if self._arena is not None else -1
        worker = Worker(await self._zygotes.fork(framework, name, shared))
        self._workers.append(worker)
        await worker.connect(self._asking, self._caller, self)
        worker.ended.add_done_callback(partial(self._on_end, worker))
        if self._stopping:
            worker.child.signal(signal.SIGKILL)
        return worker

    async def _prepare(self, worker: Worker, spec: ModelSpec, device: str) -> str:
        """Where to load from. The first worker copies what has to be copied, so that the server's
        own process neither parses a model's file nor reads it."""
        policy = registry.entry(spec.backend).snapshot
        if policy == "none" or (policy == "external" and _is_alone(spec)):
            return os.fspath(spec.path)
        self._snapshot = snapshots.fresh(self._state_dir)
        order = self._order(spec, device, os.fspath(spec.path), 0)
        order.snapshot = os.fspath(self._snapshot)
        prepared = await self._ask(worker, Kind.PREPARE, order, frames.read_prepared)
        path: str = prepared.path
        return path

    def _order(self, spec: ModelSpec, device: str, path: str, instance: int) -> LoadOrder:
        return LoadOrder(
            backend=spec.backend,
            model=spec.model,
            version=spec.version,
            path=path,
            model_file=spec.model_file,
            config=spec.config,
            device=device,
            threads=threads_for(spec.config, self.slots, self._threads),
            instance=instance,
            private=self._snapshot is not None and path == os.fspath(self._snapshot),
            extra={**self._extra, "folder": os.fspath(spec.folder)},
        )

    async def _ask(self, worker: Worker, kind: Kind, order: LoadOrder, read: Any) -> Any:
        assert worker.channel is not None
        return await worker.channel.ask(kind, order, read)

    # use ----------------------------------------------------------------------------------------

    def infer(self, request: InferRequest, at: int | None = None) -> asyncio.Future[InferResponse]:
        channel = self._channel(at)
        return only_answer(channel, request) if self._asks else channel.infer(request)

    def ask(self, requests: Sequence[Responses], at: int | None = None) -> asyncio.Future[None]:
        assert self._asks, "the model takes one request at a time"
        return self._channel(at).converse(requests)

    def _channel(self, at: int | None) -> Channel:
        workers = self._workers
        if at is not None:
            worker = workers[at]
        else:
            worker = workers[0] if len(workers) == 1 else min(workers, key=_busy)
        channel = worker.channel
        assert channel is not None, "infer before load"
        return channel

    def generate(
        self, request: GenerateRequest, tell: Callable[[Piece], None]
    ) -> asyncio.Future[Ended]:
        self._check_can("generate", "does not generate text")
        channel = min(self._workers, key=_busy).channel
        assert channel is not None, "generate before load"
        return channel.generate(request, tell)

    async def adapt(self, orders: Sequence[AdapterOrder]) -> list[AdapterReport]:
        self._check_can("adapt", "takes no adapters")
        told = await self._ask_all(Kind.ADAPT, list(orders), frames.read_reports)
        return together.answers(told) if orders else together.whereabouts(told)

    def _check_can(self, ability: str, otherwise: str) -> None:
        if ability not in self._abilities:
            raise InvalidRequestError(f"{self._model} {otherwise}")

    def room(self, size: int) -> memoryview | None:
        if size < LARGE or self._arena is None:
            return None
        found = self._arena.take(size, populate=False)
        return found[0] if found is not None else None

    async def memory(self) -> Memory:
        return all_memory(await self._ask_all(Kind.MEMORY, None, frames.read_memory))

    def figures(self) -> Sequence[bytes]:
        channels = [w.channel for w in self._workers if w.channel is not None]
        return [channel.figures for channel in channels if channel.figures]

    async def ready(self) -> bool:
        if self._readiness is None:
            ask = partial(self._ask_all, Kind.IS_READY, None, frames.read_verdict)
            self._readiness = Readiness(self._model, ask)
        return await self._readiness.now()

    async def _ask_all(self, kind: Kind, body: Any, read: Callable[[memoryview], T]) -> list[T]:
        channels = [w.channel for w in self._workers if w.channel is not None]
        told: list[T] = await asyncio.gather(*[c.ask(kind, body, read) for c in channels])
        return told

    def _on_end(self, worker: Worker, ended: asyncio.Future[str]) -> None:
        how = ended.result()
        if worker.channel is not None:
            worker.channel.fail(f"the worker of {self._model} died: {how}; ask again")
        if not self._stopping and not self.died.done():
            self.died.set_result(how)

    # rest ---------------------------------------------------------------------------------------

    async def sleep(self) -> None:
        self._check_can("sleep", "cannot sleep")
        await self._all(Kind.SLEEP)
        if self._arena is not None:
            self._arena.rest()

    async def wake(self) -> None:
        self._check_can("sleep", "does not sleep")
        await self._all(Kind.WAKE)

    async def _all(self, kind: Kind) -> None:
        """In every worker. Raises what the first says that fails; only once all have answered, so that
        none is in the middle of it when the host is stopped. Cancelled, it kills them, as `load`."""
        asked = [w.channel.ask(kind, None, _nothing) for w in self._workers if w.channel]
        try:
            await asyncio.wait(asked)
        except asyncio.CancelledError:
            self._stopping = True
            self._kill()
            raise
        finally:
            for each in asked:  # whoever has gone away looks at no answer
                each.cancel()
        for error in [each.exception() for each in asked]:
            if error is not None:
                raise error

    async def validate(self, spec: ModelSpec, device: str) -> None:
        """In a worker of its own, which has ended when this returns or raises."""
        entry = registry.entry(spec.backend)
        self._name(spec, [device])
        fork = asyncio.create_task(self._fork(entry.framework, f"md:{spec.model}:{spec.version}"))
        self._forks = [fork]
        try:
            worker = await asyncio.shield(fork)
            order = self._order(spec, device, os.fspath(spec.path), 0)
            await self._ask(worker, Kind.VALIDATE, order, _nothing)
        except asyncio.CancelledError:
            self._stopping = True
            self._kill()
            raise
        finally:
            await self.stop(VALIDATED_S)

    # stop ---------------------------------------------------------------------------------------

    async def stop(self, grace_s: float) -> None:
        """Cancelled, it kills at once, and still waits for the end."""
        if self._stopped is None:
            self._stopped = asyncio.create_task(self._stop(grace_s))
        try:
            await asyncio.shield(self._stopped)
        except asyncio.CancelledError:
            self._kill()
            await asyncio.shield(self._stopped)
            raise

    async def _stop(self, grace_s: float) -> None:
        killed = self._stopping  # a load that failed has killed them already
        self._stopping = True
        if self._forks:
            await asyncio.wait(self._forks)
        for fork in self._forks:
            if not fork.cancelled():
                fork.exception()  # retrieved: load has reported the first of them
        if not killed:
            for worker in self._workers:
                if worker.channel is not None:
                    worker.channel.stop()
            await self._until_gone(grace_s)
            self._signal(signal.SIGTERM)
            await self._until_gone(TERM_S)
        self._kill()
        if not await self._until_gone(LATE_S):
            log.warning("the worker of %s does not end; its memory is not back", self._model)
            await self._until_gone(None)
        await self._close()
        if self._snapshot is not None:
            await asyncio.to_thread(snapshots.remove, self._snapshot)

    async def _close(self) -> None:
        if self._readiness is not None:
            self._readiness.close()
        for worker in self._workers:
            await worker.close()
        if self._arena is not None:
            self._arena.close()

    async def _until_gone(self, patience_s: float | None) -> bool:
        left = [worker.ended for worker in self._workers if not worker.ended.done()]
        if left:
            await asyncio.wait(left, timeout=patience_s)
        return all(ended.done() for ended in left)

    def _kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        for worker in self._workers:
            worker.child.signal(number)


def _nothing(answer: memoryview) -> None:
    frames.read_nothing(answer)


def _is_alone(spec: ModelSpec) -> bool:
    """Nothing lies beside the model's file, so there can be no external data."""
    folder = (spec.path / spec.model_file).parent
    try:
        return os.listdir(folder) == [Path(spec.model_file).name]
    except OSError:
        return True  # the load will say what is wrong


async def _all_or_none(tasks: list[asyncio.Task[Any]]) -> list[Any]:
    """All results, or the first failure, with the others cancelled and over."""
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    failed = [t.exception() for t in tasks if not t.cancelled() and t.exception() is not None]
    for error in failed:
        assert error is not None
        raise error
    return [task.result() for task in tasks]
