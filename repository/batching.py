"""Requests wait here for their turn at the host; where the model batches, they go in company.

Without batching (max_batch_size 0) a request goes alone; each slot of the host is given two, one
that runs and one that waits at the worker, so that it never idles between them. With batching a
batch is formed one loop iteration after its first request came, so that all that arrived together
go together, and each slot has one batch in flight: what comes meanwhile is the next batch.

Rules: nobody overtakes. The head of the queue decides what goes with it, and only the unbroken run
of compatible requests behind it may. A batch of one is passed through untouched. No task is made
for a request. Whoever cancelled its future while it waited is dropped; in flight, its rows are
thrown away. Nothing is retried here. All calls come from the event loop's thread.

It must not know how a model runs, nor check requests: `repository.signature` did that before.
"""

from __future__ import annotations

import asyncio
import copy
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from repository.config import Batching, ModelConfig
from repository.errors import (
    InferenceFailedError,
    QueueFullError,
    RepositoryError,
    WorkerDiedError,
)
from repository.hosts.base import Host
from repository.merging import Group, merge, place, split
from repository.messages import InferRequest, InferResponse, Loaded

AT_A_SLOT = 2  # requests of a model without batching that one slot is given at a time
SHORTEST_RETRY_S, LONGEST_RETRY_S = 0.1, 30.0


@dataclass(slots=True, eq=False)
class _Waiting:
    """`rows` and `group` count only where the model batches. Equal groups may share a batch."""

    request: InferRequest
    future: asyncio.Future[InferResponse]
    arrived: float
    rows: int = 1
    group: Group = ()


class Batcher:
    """The queue in front of one generation's host. `clock` in seconds, for waiting and reporting.

    `max_queue` requests may wait (0: any number); a model's own `batching.max_queue` overrides it.
    `executions` counts what was given to the host, `samples` the rows in it (a request without
    batching is one row).

    `max_delay_us`: a batch that could still grow waits at most that long, counted from its oldest
    request. `preferred_sizes`, as Triton means it: the largest preferred size that the waiting
    requests make goes at once; past the delay, everything that fits does. (uvloop's timers have
    whole milliseconds: a delay below 0.5 ms ends at the next loop iteration.)
    """

    def __init__(
        self,
        host: Host,
        loaded: Loaded,
        config: ModelConfig,
        *,
        max_queue: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        batching = config.batching or Batching()
        self.executions = 0
        self.samples = 0
        self._host = host
        self._loop = asyncio.get_running_loop()
        self._clock = clock
        self._most = loaded.max_batch_size
        self._delay_s = batching.max_delay_us / 1e6
        self._preferred = frozenset(batching.preferred_sizes)
        self._limit = batching.max_queue or max_queue
        self._queue: deque[_Waiting] = deque()
        self._busy = 0  # batches at the host
        self._in_flight = 0  # requests at the host
        self._pace_s = 0.0  # of late, seconds of a slot per request
        self._wake: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_of: _Waiting | None = None
        self._closed: BaseException | None = None

    @property
    def queue_length(self) -> int:
        """Requests that wait here, without those whose client has left."""
        return sum(not waiting.future.done() for waiting in self._queue)

    @property
    def in_flight(self) -> int:
        """Requests that the host has."""
        return self._in_flight

    def submit(self, request: InferRequest) -> asyncio.Future[InferResponse]:
        """The answer to come. It fails with what the host says, or with what `close` was given.

        Raises QueueFullError at once; after `close`, the error that it was given.
        """
        if self._closed is not None:
            raise _own(self._closed)
        if self._limit and len(self._queue) >= self._limit:
            self._forget_the_gone()
            self._refuse_if_full()
        waiting = _Waiting(request, self._loop.create_future(), self._clock())
        self._queue.append(waiting)
        if self._most:
            waiting.rows, waiting.group = place(request, self._most)
        self._go_on()
        return waiting.future

    def close(self, error: BaseException) -> None:
        """Fails what still waits and whatever comes later; what the host has is still answered."""
        self._closed = error
        if self._wake is not None:
            self._wake.cancel()
            self._wake = None
        self._stop_timer()
        waiting, self._queue = list(self._queue), deque()
        _fail(waiting, error)

    # choosing -------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        """Gives the host what it has room for; where the model batches, a loop iteration later."""
        if self._most:
            if self._wake is None and self._busy < self._host.slots:
                self._wake = self._loop.call_soon(self._form)
            return
        room = self._host.slots * AT_A_SLOT
        while self._queue and self._busy < room:
            waiting = self._queue.popleft()
            if not waiting.future.done():
                self._launch([waiting], 1)

    def _form(self) -> None:
        self._wake = None
        self._gather(late=False)

    def _expire(self) -> None:
        self._timer = self._timer_of = None
        self._gather(late=True)

    def _gather(self, *, late: bool) -> None:
        """`late`: the head's delay is over, whatever the clock says (timers are coarser)."""
        while self._queue and self._busy < self._host.slots:
            batch = self._choose(late=late)
            late = False
            if not batch:
                self._wait()
                return
            while self._queue.popleft() is not batch[-1]:
                pass
            self._stop_timer()
            self._launch(batch, sum(waiting.rows for waiting in batch))

    def _choose(self, *, late: bool) -> list[_Waiting]:
        """The batch that goes now; empty while it is better to wait."""
        batch: list[_Waiting] = []
        rows, best, full = 0, 0, False
        for waiting in self._queue:
            if waiting.future.done():
                continue
            full = bool(batch) and (
                rows + waiting.rows > self._most or waiting.group != batch[0].group
            )
            if full:
                break
            batch.append(waiting)
            rows += waiting.rows
            if rows in self._preferred:
                best = len(batch)
            full = rows >= self._most
            if full:
                break
        if not batch:
            return batch
        late = late or self._waited_enough(batch[0])
        if best and not late:
            return batch[:best]
        hopeless = bool(self._preferred) and rows >= max(self._preferred)
        return batch if full or late or hopeless or not self._delay_s else []

    def _waited_enough(self, head: _Waiting) -> bool:
        return self._delay_s > 0 and self._clock() - head.arrived >= self._delay_s

    def _wait(self) -> None:
        self._forget_the_gone()
        if not self._queue:
            return
        head = self._queue[0]
        if self._timer_of is head:
            return
        self._stop_timer()
        left = head.arrived + self._delay_s - self._clock()
        self._timer_of, self._timer = head, self._loop.call_later(left, self._expire)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._timer_of = None

    def _forget_the_gone(self) -> None:
        self._queue = deque(w for w in self._queue if not w.future.done())

    def _refuse_if_full(self) -> None:
        waiting = len(self._queue)
        if waiting < self._limit:
            return
        wait_s = self._pace_s * waiting / max(1, self._host.slots)
        raise QueueFullError(
            f"Exceeds maximum queue size: {waiting} requests wait already; ask again later, "
            f"or raise batching.max_queue",
            retry_after_s=min(max(wait_s, SHORTEST_RETRY_S), LONGEST_RETRY_S),
        )

    # running --------------------------------------------------------------------------------------

    def _launch(self, batch: list[_Waiting], rows: int) -> None:
        started = self._clock()
        try:
            if len(batch) == 1:
                request = batch[0].request
            else:
                request = merge([waiting.request for waiting in batch])
            answer = self._host.infer(request)
        except Exception as error:  # noqa: BLE001 - whatever broke, nobody may wait for ever
            _fail(batch, error)
            return
        self._busy += 1
        self._in_flight += len(batch)
        self.executions += 1
        self.samples += rows
        answer.add_done_callback(partial(self._answered, batch, rows, started))

    def _answered(
        self,
        batch: list[_Waiting],
        rows: int,
        started: float,
        answer: asyncio.Future[InferResponse],
    ) -> None:
        self._busy -= 1
        self._in_flight -= len(batch)
        pace_s = (self._clock() - started) / len(batch)
        self._pace_s += (pace_s - self._pace_s) / 8
        # The worker gets its next work first; handing out what is done can wait a moment.
        if self._queue:
            self._go_on()
        try:
            responses = _responses(batch, answer)
        except RepositoryError as error:
            _fail(batch, error)
            return
        told = rows if self._most else 0
        for waiting, response in zip(batch, responses, strict=True):
            future = waiting.future
            if not future.done():
                response.queue_s = started - waiting.arrived
                response.batch_size = told
                future.set_result(response)


def _responses(
    batch: Sequence[_Waiting], answer: asyncio.Future[InferResponse]
) -> list[InferResponse]:
    """Raises what the host failed with, as one of ours."""
    if answer.cancelled():
        raise WorkerDiedError("the model was stopped before it answered; ask again")
    error = answer.exception()
    if error is not None:
        raise _own(error)
    whole = answer.result()
    return [whole] if len(batch) == 1 else split(whole, [waiting.rows for waiting in batch])


def _fail(batch: Sequence[_Waiting], error: BaseException) -> None:
    for waiting in batch:
        if not waiting.future.done():
            waiting.future.set_exception(_own(error))


def _own(error: BaseException) -> RepositoryError:
    """A copy: an exception that several wait for would collect all their tracebacks."""
    if isinstance(error, RepositoryError):
        mine = copy.copy(error)
        mine.__cause__ = error.__cause__
    else:
        mine = InferenceFailedError(f"{type(error).__name__}: {error}")
        mine.__cause__ = error
    return mine
