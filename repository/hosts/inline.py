"""Runs a generation on threads of this process: one per instance, each with a backend of its own.

For small trusted CPU models that need the lowest latency, and for tests. What it cannot do: a
thread cannot be killed, so a model that hangs is left behind when `stop` loses patience (its thread
is a daemon and does not keep the server from exiting), and a model that crashes takes the server
with it. The framework is imported on the model's thread, the first time that an inline model needs
it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from repository.adapters.orders import AdapterOrder, AdapterReport
from repository.backends import registry
from repository.backends.abilities import Adapts, Sleeps, Validates
from repository.backends.base import Backend, Order
from repository.errors import (
    InferenceFailedError,
    InvalidRequestError,
    LoadFailedError,
    RepositoryError,
)
from repository.generate import Ended, GenerateRequest, Piece
from repository.hosts import failures, snapshots, together
from repository.hosts.threads import threads_for
from repository.lifecycle.placement import Memory
from repository.messages import InferRequest, InferResponse, Loaded
from repository.responding import Responses
from repository.spec import ModelSpec

log = logging.getLogger(__name__)
VALIDATED_S = 5.0  # how long one that only looked may take to end


class Runner:
    """A daemon thread that does what it is given, in order, and answers by futures."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._work: queue.SimpleQueue[tuple[Callable[[], Any], asyncio.Future[Any]] | None]
        self._work = queue.SimpleQueue()
        self.waiting = 0
        self.ended = asyncio.Event()
        self.backend: Backend | None = None
        self.asleep: Backend | None = None  # in place of `backend`
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def do(self, work: Callable[[], Any]) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = self._loop.create_future()
        self.waiting += 1
        self._work.put((work, future))
        return future

    def end(self) -> None:
        """After what has been given to it."""
        self._work.put(None)

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            work, future = item
            result: Any = None
            error: BaseException | None = None
            try:
                result = work()
            except BaseException as raised:  # noqa: BLE001 - handed on whole
                error = raised
            self._tell(self._answer, future, result, error)
            # Nothing of an answer may stay here until the next question comes.
            del item, work, future, result, error
        self.backend = self.asleep = None
        self._tell(self.ended.set)

    def _tell(self, call: Callable[..., object], *args: Any) -> None:
        # A loop that has closed: a thread that was left behind has nobody to tell.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call, *args)

    def _answer(
        self, future: asyncio.Future[Any], result: Any, error: BaseException | None
    ) -> None:
        self.waiting -= 1
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)


class InlineHost:
    """As ProcessHost, on threads. `died` never resolves."""

    def __init__(
        self,
        *,
        state_dir: Path,
        instances: int = 1,
        threads: int | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        self.died: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.slots = instances
        self._state_dir = state_dir
        self._threads = threads
        self._extra = {**(extra or {}), "shares_process": True}
        self._runners: list[Runner] = []
        self._snapshot: Path | None = None
        self._roots: tuple[str, ...] = ()
        self._adapts = self._sleeps = False

    async def load(self, spec: ModelSpec, devices: Sequence[str]) -> Loaded:
        device = next((d for d in devices if d != "cpu"), "cpu")
        if device != "cpu":
            raise LoadFailedError(
                f"'{spec.model}' is to run on {device} with host inline, which is for CPU models "
                "only; set host to process, or device to cpu"
            )
        entry = registry.entry(spec.backend)
        self._snapshot = snapshots.fresh(self._state_dir)
        self._roots = (os.fspath(spec.path), os.fspath(self._snapshot))
        self._runners = [Runner(f"model {spec.model} {i}") for i in range(self.slots)]
        first = self._runners[0]
        target = self._snapshot

        def prepare() -> Path:
            return snapshots.prepare(entry.snapshot, spec.path, spec.model_file, target)

        path = await first.do(partial(self._guard, prepare))
        orders = [self._order(spec, device, path, i) for i in range(self.slots)]
        loading = [
            runner.do(partial(self._load, runner, spec.backend, order))
            for runner, order in zip(self._runners, orders, strict=True)
        ]
        loaded: list[Loaded] = await asyncio.gather(*loading)
        if "generate" in loaded[0].abilities:
            raise LoadFailedError(
                f"'{spec.model}' generates text, which with host inline would hold up every other "
                "request of the server; set host to process"
            )
        self._adapts = "adapt" in loaded[0].abilities
        self._sleeps = "sleep" in loaded[0].abilities
        return together.loaded(loaded)

    def infer(self, request: InferRequest, at: int | None = None) -> asyncio.Future[InferResponse]:
        runner = min(self._runners, key=lambda r: r.waiting) if at is None else self._runners[at]
        return runner.do(partial(self._infer, runner, request))

    def ask(self, requests: Sequence[Responses], at: int | None = None) -> asyncio.Future[None]:
        raise NotImplementedError("a model that is asked so is not loaded here")

    def generate(
        self, request: GenerateRequest, tell: Callable[[Piece], None]
    ) -> asyncio.Future[Ended]:
        raise InvalidRequestError("a model with host inline does not generate text")

    async def adapt(self, orders: Sequence[AdapterOrder]) -> list[AdapterReport]:
        if not self._adapts:
            raise InvalidRequestError("the model takes no adapters")
        doing = [runner.do(partial(self._adapt, runner, orders)) for runner in self._runners]
        told = await asyncio.gather(*doing)
        return together.answers(told) if orders else together.whereabouts(told)

    def room(self, size: int) -> memoryview | None:
        """None: all memory here is as near as it can be."""
        return None

    async def memory(self) -> Memory:
        """Nothing: what a thread holds cannot be told from what the server holds."""
        return {}

    def figures(self) -> Sequence[bytes]:
        return ()

    async def ready(self) -> bool:
        return True

    async def sleep(self) -> None:
        if not self._sleeps:
            raise InvalidRequestError("the model cannot sleep")
        await self._all(self._fall_asleep)

    async def wake(self) -> None:
        if not self._sleeps:
            raise InvalidRequestError("the model does not sleep")
        await self._all(self._wake_up)

    async def _all(self, what: Callable[[Runner], None]) -> None:
        doing = [r.do(partial(self._guard, partial(what, r))) for r in self._runners]
        await asyncio.wait(doing)
        for error in [each.exception() for each in doing]:
            if error is not None:
                raise error

    async def validate(self, spec: ModelSpec, device: str) -> None:
        self._roots = (os.fspath(spec.path),)
        self._runners = [Runner(f"validates {spec.model}")]
        work = partial(self._validate, self._runners[0], self._order(spec, device, spec.path, 0))
        try:
            await self._runners[0].do(partial(self._guard, partial(work, spec.backend)))
        finally:
            await self.stop(VALIDATED_S)

    async def stop(self, grace_s: float) -> None:
        """Unloads after what is in flight. Past `grace_s` a thread that hangs is left behind, with
        whatever memory its model holds."""
        for runner in self._runners:
            runner.do(partial(self._unload, runner)).add_done_callback(_retrieve)
            runner.end()
        try:
            async with asyncio.timeout(grace_s):
                for runner in self._runners:
                    await runner.ended.wait()
        except TimeoutError:
            log.warning("an inline model does not stop; its thread is left behind")
        if self._snapshot is not None:
            await asyncio.to_thread(snapshots.remove, self._snapshot)

    # on the model's thread ----------------------------------------------------------------------

    def _guard(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except (Exception, SystemExit) as error:  # the model's edge
            if not isinstance(error, RepositoryError):
                log.warning("a model failed to load", exc_info=error)
            raise failures.of_load(error, *self._roots) from None

    def _load(self, runner: Runner, backend: str, order: Order) -> Loaded:
        def load() -> Loaded:
            runner.backend = registry.make(backend, order.config)
            if hasattr(runner.backend, "ask"):
                raise LoadFailedError(
                    f"backend '{backend}' needs a process of its own for each instance; "
                    "set host to process"
                )
            return runner.backend.load(order)

        loaded: Loaded = self._guard(load)
        return loaded

    def _infer(self, runner: Runner, request: InferRequest) -> InferResponse:
        if runner.backend is None:
            said = "the model sleeps" if runner.asleep else "the model is not loaded"
            raise InferenceFailedError(said)
        for tensor in request.inputs:
            if isinstance(tensor.data, list):
                tensor.data = b"".join(tensor.data)
        began = time.perf_counter()
        try:
            response = runner.backend.infer(request)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the model's edge
            raise failures.of_infer(error, *self._roots) from None
        response.compute_s = time.perf_counter() - began
        return response

    def _adapt(self, runner: Runner, orders: Sequence[AdapterOrder]) -> list[AdapterReport]:
        if runner.backend is None:
            raise InferenceFailedError("the model is not loaded")
        try:
            return cast("Adapts", runner.backend).adapt(orders)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the model's edge
            raise failures.of_infer(error, *self._roots) from None

    def _fall_asleep(self, runner: Runner) -> None:
        if runner.backend is None:
            raise InvalidRequestError("the model sleeps already")
        # Whatever comes of it, nothing is to run before it is awake again.
        runner.asleep, runner.backend = runner.backend, None
        cast("Sleeps", runner.asleep).sleep()

    def _wake_up(self, runner: Runner) -> None:
        if runner.asleep is None:
            raise InvalidRequestError("the model does not sleep")
        cast("Sleeps", runner.asleep).wake()
        runner.backend, runner.asleep = runner.asleep, None

    def _validate(self, runner: Runner, order: Order, backend: str) -> None:
        runner.backend = registry.make(backend, order.config)
        if hasattr(runner.backend, "validate"):
            cast("Validates", runner.backend).validate(order)

    def _unload(self, runner: Runner) -> None:
        backend = runner.backend or runner.asleep
        runner.backend = runner.asleep = None
        if backend is not None:
            backend.unload()

    def _order(self, spec: ModelSpec, device: str, path: Path, instance: int) -> Order:
        return Order(
            model=spec.model,
            version=spec.version,
            path=path,
            model_file=spec.model_file,
            config=spec.config,
            device=device,
            threads=threads_for(spec.config, self.slots, self._threads),
            instance=instance,
            private=path == self._snapshot,
            extra=self._extra,
        )


def _retrieve(future: asyncio.Future[Any]) -> None:
    if not future.cancelled() and (error := future.exception()) is not None:
        log.warning("a model failed to unload", exc_info=error)
