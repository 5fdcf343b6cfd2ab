"""A host with knobs instead of a model. Everything else in the tests is the real thing."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from repository.adapters.orders import AdapterOrder, AdapterReport
from repository.errors import WorkerDiedError
from repository.generate import Ended, GenerateRequest, Piece
from repository.lifecycle.placement import Memory
from repository.messages import InferRequest, InferResponse, Loaded
from repository.responding import Responses
from repository.spec import ModelSpec


def echo(request: InferRequest) -> InferResponse:
    return InferResponse(list(request.inputs))


def count(request: GenerateRequest) -> Iterable[Piece]:
    """ "0 ", "1 ", ... up to max_tokens (3 if nobody says how many)."""
    for n in range(request.sampling.max_tokens or 3):
        yield Piece(f"{n} ", [n])


def once(request: InferRequest) -> Iterable[InferResponse]:
    return [echo(request)]


def done(order: AdapterOrder) -> AdapterReport:
    return AdapterReport(order.name, residence="host")


class FakeHost:
    """Keeps `Host`'s promises and checks that its callers keep theirs; waits in loop time.

    load_s, load_error   how long a load takes; what it raises afterwards instead of `loaded`
    infer_s, result      how long one call takes in a slot; what it answers, or raises
    stop_s               how long stopping takes after what was in flight
    sleep_s, sleep_error, asleep   how long falling asleep takes; what it raises; what `memory` says then
    wake_s, wake_error   how long waking takes; what it raises
    validate_s, validate_error     the same of `validate`
    token_s, writes      how long one piece takes (all sequences run at once); what they are, or what
                         it raises instead of the next
    reports              what becomes of an order
    answers, returns_s   what each request of `ask` is told, or what it raises instead of the next; after
                         how long `ask` returns (None: when all have ended)
    groups, left         the requests of each `ask`; those that nobody wanted to the end
    calls                "load", "sleep", "wake", "validate" and "stop", as they came
    batches, ats         every request that was given to `infer`, and by which instance it was to be run
    asked, cancelled     every request that was given to `generate`; those that were cancelled
    orders               every order that was given to `adapt`
    """

    def __init__(
        self,
        *,
        load_s: float = 0.0,
        load_error: BaseException | None = None,
        infer_s: float = 0.0,
        slots: int = 1,
        loaded: Loaded | None = None,
        result: Callable[[InferRequest], InferResponse] = echo,
        memory: Memory | None = None,
        stop_s: float = 0.0,
        sleep_s: float = 0.0,
        sleep_error: BaseException | None = None,
        asleep: Memory | None = None,
        wake_s: float = 0.0,
        wake_error: BaseException | None = None,
        validate_s: float = 0.0,
        validate_error: BaseException | None = None,
        token_s: float = 0.0,
        writes: Callable[[GenerateRequest], Iterable[Piece]] = count,
        reports: Callable[[AdapterOrder], AdapterReport] = done,
        answers: Callable[[InferRequest], Iterable[InferResponse]] = once,
        returns_s: float | None = None,
    ) -> None:
        self.died: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.slots = slots
        self.load_s = load_s
        self.load_error = load_error
        self.infer_s = infer_s
        self.stop_s = stop_s
        self.sleep_s, self.sleep_error, self.asleep = sleep_s, sleep_error, asleep
        self.wake_s, self.wake_error = wake_s, wake_error
        self.validate_s, self.validate_error = validate_s, validate_error
        self.sleeping = False
        self.loaded = loaded or Loaded()
        self.result = result
        self.token_s = token_s
        self.writes = writes
        self.reports = reports
        self.answers, self.returns_s = answers, returns_s
        self.groups: list[list[InferRequest]] = []
        self.left: list[Responses] = []
        self._talks: dict[asyncio.Future[None], asyncio.Task[None]] = {}
        self.measured = dict(memory or {})
        self.calls: list[str] = []
        self.batches: list[InferRequest] = []
        self.ats: list[int | None] = []
        self.asked: list[GenerateRequest] = []
        self.cancelled: list[GenerateRequest] = []
        self.orders: list[AdapterOrder] = []
        self._texts: dict[asyncio.Future[Ended], asyncio.Task[None]] = {}
        self.spec: ModelSpec | None = None
        self.device = ""
        self._waiting: deque[tuple[InferRequest, asyncio.Future[InferResponse]]] = deque()
        self._running: set[asyncio.Future[InferResponse]] = set()

    @property
    def running(self) -> int:
        """Calls that occupy a slot now."""
        return len(self._running)

    async def load(self, spec: ModelSpec, devices: Sequence[str]) -> Loaded:
        assert not self.calls, "load comes first and once"
        self.calls.append("load")
        self.spec, self.device = spec, devices[0]
        await asyncio.wait({self.died}, timeout=self.load_s)
        if self.died.done():
            raise WorkerDiedError(self.died.result())
        if self.load_error is not None:
            raise self.load_error
        return self.loaded

    def infer(self, request: InferRequest, at: int | None = None) -> asyncio.Future[InferResponse]:
        assert "stop" not in self.calls and not self.sleeping, "infer after stop, or asleep"
        future: asyncio.Future[InferResponse] = asyncio.get_running_loop().create_future()
        if self.died.done():
            future.set_exception(WorkerDiedError(self.died.result()))
            return future
        self.batches.append(request)
        self.ats.append(at)
        self._waiting.append((request, future))
        self._fill()
        return future

    def ask(self, requests: Sequence[Responses], at: int | None = None) -> asyncio.Future[None]:
        """Each is told what `answers` says, `token_s` apart, and ends; all at once. Returns after the
        last, or after `returns_s`."""
        assert "stop" not in self.calls and not self.sleeping, "ask after stop, or asleep"
        self.groups.append([r.request for r in requests])
        self.ats.append(at)
        tasks = [asyncio.create_task(self._converse(r)) for r in requests]
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._talks[future] = asyncio.create_task(self._return(tasks, future))
        return future

    async def _converse(self, responses: Responses) -> None:
        responses.on_close = self.left.append
        error: Exception | None = None
        try:
            await asyncio.wait({self.died}, timeout=self.infer_s)
            for response in self.answers(responses.request):
                if self.died.done():
                    raise WorkerDiedError(self.died.result())
                response.compute_s = self.token_s or self.infer_s
                responses.tell(response)
                await asyncio.sleep(self.token_s)
                if responses in self.left:
                    break
        except Exception as raised:  # noqa: BLE001 - a model may raise anything
            error = raised
        responses.end(error)

    async def _return(
        self, tasks: Sequence[asyncio.Task[None]], future: asyncio.Future[None]
    ) -> None:
        await asyncio.wait(tasks, timeout=self.returns_s)
        future.set_result(None)
        await asyncio.wait(tasks)
        del self._talks[future]

    def generate(
        self, request: GenerateRequest, tell: Callable[[Piece], None]
    ) -> asyncio.Future[Ended]:
        assert "stop" not in self.calls, "generate after stop"
        future: asyncio.Future[Ended] = asyncio.get_running_loop().create_future()
        if self.died.done():
            future.set_exception(WorkerDiedError(self.died.result()))
            return future
        self.asked.append(request)
        self._texts[future] = asyncio.create_task(self._write(request, tell, future))
        future.add_done_callback(lambda _: self._text_ended(request, future))
        return future

    def room(self, size: int) -> memoryview | None:
        return None

    async def adapt(self, orders: Sequence[AdapterOrder]) -> list[AdapterReport]:
        assert "stop" not in self.calls, "adapt after stop"
        if self.died.done():
            raise WorkerDiedError(self.died.result())
        self.orders += orders
        return [self.reports(order) for order in orders]

    async def memory(self) -> Memory:
        return dict((self.asleep or {}) if self.sleeping else self.measured)

    def figures(self) -> Sequence[bytes]:
        return ()

    async def ready(self) -> bool:
        return True

    async def sleep(self) -> None:
        assert "stop" not in self.calls and not self.sleeping and not self._running
        self.calls.append("sleep")
        await self._takes(self.sleep_s, self.sleep_error)
        self.sleeping = True

    async def wake(self) -> None:
        assert "stop" not in self.calls and self.sleeping
        self.calls.append("wake")
        await self._takes(self.wake_s, self.wake_error)
        self.sleeping = False

    async def validate(self, spec: ModelSpec, device: str) -> None:
        assert not self.calls, "it is in place of a load"
        self.calls.append("validate")
        await self._takes(self.validate_s, self.validate_error)

    async def _takes(self, for_s: float, error: BaseException | None) -> None:
        await asyncio.wait({self.died}, timeout=for_s)
        if self.died.done():
            raise WorkerDiedError(self.died.result())
        if error is not None:
            raise error

    async def stop(self, grace_s: float) -> None:
        self.calls.append("stop")
        unfinished = self._running | {future for _, future in self._waiting} | {*self._texts}
        if unfinished and not self.died.done():
            await asyncio.wait(unfinished, timeout=grace_s)
        if self.stop_s:
            await asyncio.sleep(self.stop_s)
        self._fail_all("stopped")

    def kill(self, reason: str = "exit code -9") -> None:
        """Dies unasked, as if by SIGKILL. Killing twice changes nothing."""
        if not self.died.done():
            self.died.set_result(reason)
            self._fail_all(reason)

    async def _write(
        self, request: GenerateRequest, tell: Callable[[Piece], None], future: asyncio.Future[Ended]
    ) -> None:
        told = 0
        try:
            for piece in self.writes(request):
                await asyncio.sleep(self.token_s)
                tell(piece)
                told += len(piece.tokens)
        except Exception as error:  # noqa: BLE001 - a model may raise anything
            future.set_exception(error)
        else:
            future.set_result(Ended("length", 1, told, total_s=told * self.token_s))

    def _text_ended(self, request: GenerateRequest, future: asyncio.Future[Ended]) -> None:
        self._texts.pop(future).cancel()
        if future.cancelled():
            self.cancelled.append(request)

    def _fill(self) -> None:
        while self._waiting and len(self._running) < self.slots:
            request, future = self._waiting.popleft()
            self._running.add(future)
            asyncio.get_running_loop().call_later(self.infer_s, self._finish, request, future)

    def _finish(self, request: InferRequest, future: asyncio.Future[InferResponse]) -> None:
        self._running.discard(future)
        if not self.died.done():
            self._fill()
        if future.done():  # its caller left, or the host died
            return
        try:
            response = self.result(request)
        except Exception as error:  # noqa: BLE001 - a model may raise anything
            future.set_exception(error)
            return
        response.compute_s = self.infer_s
        future.set_result(response)

    def _fail_all(self, reason: str) -> None:
        futures: list[asyncio.Future[Any]] = [
            *self._running,
            *(future for _, future in self._waiting),
            *self._texts,
        ]
        self._waiting.clear()
        self._running.clear()
        for future in futures:
            if not future.done():
                future.set_exception(WorkerDiedError(reason))
