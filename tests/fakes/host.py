"""A host with knobs instead of a model. Everything else in the tests is the real thing."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping

from repository.errors import WorkerDiedError
from repository.messages import InferRequest, InferResponse, Loaded
from repository.spec import ModelSpec


def echo(request: InferRequest) -> InferResponse:
    return InferResponse(list(request.inputs))


class FakeHost:
    """Keeps `Host`'s promises and checks that its callers keep theirs; waits in loop time.

    load_s, load_error   how long a load takes; what it raises afterwards instead of `loaded`
    infer_s, result      how long one call takes in a slot; what it answers, or raises
    stop_s               how long stopping takes after what was in flight
    calls                "load" and "stop", as they came
    batches              every request that was given to `infer`
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
        memory: Mapping[str, int] | None = None,
        stop_s: float = 0.0,
    ) -> None:
        self.died: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.slots = slots
        self.load_s = load_s
        self.load_error = load_error
        self.infer_s = infer_s
        self.stop_s = stop_s
        self.loaded = loaded or Loaded()
        self.result = result
        self.measured = dict(memory or {})
        self.calls: list[str] = []
        self.batches: list[InferRequest] = []
        self.spec: ModelSpec | None = None
        self.device = ""
        self._waiting: deque[tuple[InferRequest, asyncio.Future[InferResponse]]] = deque()
        self._running: set[asyncio.Future[InferResponse]] = set()

    @property
    def running(self) -> int:
        """Calls that occupy a slot now."""
        return len(self._running)

    async def load(self, spec: ModelSpec, device: str) -> Loaded:
        assert not self.calls, "load comes first and once"
        self.calls.append("load")
        self.spec, self.device = spec, device
        await asyncio.wait({self.died}, timeout=self.load_s)
        if self.died.done():
            raise WorkerDiedError(self.died.result())
        if self.load_error is not None:
            raise self.load_error
        return self.loaded

    def infer(self, request: InferRequest) -> asyncio.Future[InferResponse]:
        assert "stop" not in self.calls, "infer after stop"
        future: asyncio.Future[InferResponse] = asyncio.get_running_loop().create_future()
        if self.died.done():
            future.set_exception(WorkerDiedError(self.died.result()))
            return future
        self.batches.append(request)
        self._waiting.append((request, future))
        self._fill()
        return future

    def room(self, size: int) -> memoryview | None:
        return None

    async def memory(self) -> dict[str, int]:
        return dict(self.measured)

    async def stop(self, grace_s: float) -> None:
        self.calls.append("stop")
        unfinished = self._running | {future for _, future in self._waiting}
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
        futures = [*self._running, *(future for _, future in self._waiting)]
        self._waiting.clear()
        self._running.clear()
        for future in futures:
            if not future.done():
                future.set_exception(WorkerDiedError(reason))
