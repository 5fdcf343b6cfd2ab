"""What stands in front of an ensemble: nothing that waits. Each request goes on at once, and any number
of them side by side; its steps wait and batch in front of their own models."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from repository.hosts.ensemble import EnsembleHost
from repository.messages import InferRequest, InferResponse, Loaded
from repository.prompt import Prompt, own
from repository.responding import Responses

STOPPED = "the ensemble was stopped before it answered; ask again"


class Passing:
    """A `Line` (`repository.lines`). An execution is one request."""

    def __init__(self, host: EnsembleHost, loaded: Loaded) -> None:
        self.executions = 0
        self.samples = 0
        self.batches: dict[int, list[float]] = {}
        self._host = host
        self._batched = loaded.max_batch_size > 0
        self._closed: BaseException | None = None

    @property
    def queue_length(self) -> int:
        """Nobody waits here."""
        return 0

    @property
    def in_flight(self) -> int:
        return len(self._host.running)

    def room(self, size: int) -> memoryview | None:
        return self._host.room(size)

    def submit(self, request: InferRequest) -> asyncio.Future[InferResponse]:
        future: Prompt[InferResponse] = Prompt(loop=asyncio.get_running_loop())
        future.listener = None
        found: list[InferResponse] = []

        def end(error: BaseException | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(found[0])
            else:
                future.set_exception(error)

        leave = self._begin(request, found.append, end)
        future.add_done_callback(lambda done: leave() if done.cancelled() else None)
        return future

    def open(self, request: InferRequest) -> Responses:
        responses = Responses(request)
        leave = self._begin(request, responses.tell, responses.end, responses.until_read)
        responses.on_close = lambda _: leave()
        return responses

    def close(self, cause: BaseException) -> None:
        """What runs is still answered, for as long as the host is let."""
        self._closed = cause

    def _begin(
        self,
        request: InferRequest,
        tell: Callable[[InferResponse], None],
        end: Callable[[BaseException | None], None],
        read: Callable[[int], Awaitable[None]] | None = None,
    ) -> Callable[[], None]:
        """How to leave it."""
        if self._closed is not None:
            raise own(self._closed, STOPPED)
        rows = self._rows(request)
        began = time.perf_counter()

        def over(error: BaseException | None) -> None:
            if error is None:
                count = self.batches.setdefault(rows, [0, 0.0])
                count[0] += 1
                count[1] += time.perf_counter() - began
            end(error)

        def told(response: InferResponse) -> None:
            response.batch_size = rows if self._batched else 0
            tell(response)

        run = self._host.begin(request, told, over, read)
        self.executions += 1
        self.samples += rows
        return lambda: self._host.leave(run)

    def _rows(self, request: InferRequest) -> int:
        if not self._batched or not request.inputs or not request.inputs[0].shape:
            return 1
        return request.inputs[0].shape[0]
