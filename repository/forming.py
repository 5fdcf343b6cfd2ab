"""Who goes to the host now, and with whom: the forming of groups in front of one generation's host.

Without batching (max_batch_size 0, or batching.enabled false) a request goes alone. With batching a
group is formed one loop iteration after its first request came, so that all that arrived together
go together, and each slot has one group in flight: what comes meanwhile is the next one. Where
requests have come one by one of late, the first of a group does not wait for others.

Rules: who is served next is the queue's business (`repository.queueing`), and nobody overtakes: the
head of the queue decides what goes with it, and only the unbroken run of compatible requests behind
it may. No task is made for a request. Whoever cancels while it waits is dropped. All calls come from
the event loop's thread.

How far ahead the host is sent work, and who a group waits for, follows from `repository.pacing`.

It must not know what a group becomes (`repository.batching`: one request; `repository.asks`: handed
over as it is), nor check requests: `repository.signature` did that before.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from itertools import takewhile

from repository.config import Batching, ModelConfig
from repository.errors import QueueFullError, RequestTimeoutError
from repository.forms import Group
from repository.hosts.base import Host
from repository.merging import place
from repository.messages import InferRequest, Loaded
from repository.pacing import Pace, Reunion
from repository.prompt import own
from repository.queueing import Alarm, InOrder, Queue, Waiting, settle

# With several slots nothing is sent ahead while a request has been at the host for so long: nobody
# is to stand behind it.
STUCK_S = 0.01
STOPPED = "the model was stopped before it answered; ask again"
ALONE = 8  # such answers in a row after which nobody waits an iteration of the loop for company
EARLY_S = 0.0005  # uvloop's timers have whole milliseconds: one may ring so much too soon
SHORTEST_RETRY_S, LONGEST_RETRY_S = 0.1, 30.0


class Forming(ABC):
    """`clock` in seconds, for waiting and reporting.

    `max_queue` requests may wait (0: any number); a model's own `batching.max_queue` overrides it.
    `executions` counts what was given to the host, `samples` the rows in it (a request without
    a batch axis is one row); `batches`: rows -> executions that succeeded, and their seconds.

    `max_delay_us`: a group that could still grow waits at most that long, counted from its oldest
    request. `preferred_sizes`, as Triton means it: the largest preferred size that the waiting
    requests make goes at once; past the delay, everything that fits does. (A delay below EARLY_S
    ends at the next loop iteration.)
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
        self.batches: dict[int, list[float]] = {}
        self._host = host
        self._loop = asyncio.get_running_loop()
        self._clock = clock
        self._most = loaded.max_batch_size
        self._merges = self._most > 0 and batching.enabled
        self._slots = host.slots
        self._pace = Pace(host.slots, merges=self._merges)
        self._delay_s = batching.max_delay_us / 1e6
        self._preferred = frozenset(batching.preferred_sizes)
        self._largest = max(self._preferred, default=0)
        self._queue = Queue(batching, max_queue)
        self._again: deque[Waiting] = deque()  # of groups that were refused: each goes alone
        self._order = InOrder() if batching.preserve_ordering else None
        self._busy = 0  # groups at the host
        self._alone_in_a_row = 0  # answers of late to one request with nobody beside or behind it
        self._in_flight = 0  # requests at the host
        # Since when, in that order; only where it matters which of several slots has what.
        several = self._slots > 1 and not self._merges
        self._since: dict[Waiting, float] | None = {} if several else None
        alone = self._merges and self._slots == 1 and not (self._delay_s or self._preferred)
        self._reunion = Reunion(self._most) if alone else None
        self._wake: asyncio.Handle | None = None
        self._later = Alarm(self._loop, clock, self._look_again)
        self._time_over = Alarm(self._loop, clock, self._on_timeout)
        self._closed: BaseException | None = None

    @property
    def queue_length(self) -> int:
        """Requests that wait here, without those whose client has left."""
        return self._queue.length + sum(not waiting.done() for waiting in self._again)

    @property
    def in_flight(self) -> int:
        """Requests that the host has."""
        return self._in_flight

    def room(self, size: int) -> memoryview | None:
        """As the host has it, for a request that is on its way."""
        return self._host.room(size)

    def close(self, error: BaseException) -> None:
        """Fails what still waits and whatever comes later; what the host has is still answered."""
        self._closed = error
        if self._wake is not None:
            self._wake.cancel()
            self._wake = None
        self._later.stop()
        self._time_over.stop()
        waiting = [*self._again, *self._queue.clear()]
        self._again.clear()
        self._refuse(waiting, error)

    @abstractmethod
    def _launch(self, batch: list[Waiting], rows: int, now: float) -> None:
        """Gives the host one group of them, which has `rows` in all."""

    @abstractmethod
    def _launch_one(self, waiting: Waiting, now: float) -> None:
        """The same, for the one that goes alone."""

    def _place(self, request: InferRequest) -> tuple[int, Group]:
        """Its rows, and its group: those of equal groups may go together."""
        return place(request, self._most)

    # waiting --------------------------------------------------------------------------------------

    def _enter(self, waiting: Waiting, request: InferRequest) -> None:
        """It waits for its turn, or has gone. Raises as `Batcher.submit`."""
        if self._closed is not None:
            raise own(self._closed, STOPPED)
        waiting.request = request
        waiting.arrived = self._clock()
        waiting.queue = waiting.listener = None
        waiting.rows = 1
        if self._most:
            waiting.rows, waiting.group = self._place(request)
        if self._merges or self._queue.length or self._is_full(waiting.arrived):
            self._enqueue(waiting)
            return
        if self._order is not None:
            self._order.expect(waiting)
        self._launch_one(waiting, waiting.arrived)

    def _enqueue(self, waiting: Waiting) -> None:
        queue = self._queue
        try:
            queue.add(waiting)
        except QueueFullError as error:
            error.retry_after_s = self._retry_after_s()
            raise
        if self._order is not None:
            self._order.expect(waiting)
        if waiting.deadline is not None:
            self._time_over.set(queue.earliest)
        self._go_on(waiting.arrived)

    def _on_timeout(self) -> None:
        self._expire(self._clock() + EARLY_S)

    def _expire(self, now: float) -> None:
        over = self._queue.expire(now)
        if over:
            error = RequestTimeoutError(
                "Request timeout expired: it waited for its turn as long as it may; ask again "
                "later, or allow more time (the parameter timeout, or batching.timeout_us)",
                retry_after_s=self._retry_after_s(),
            )
            self._refuse(over, error)
        self._time_over.set(self._queue.earliest)

    def _retry_after_s(self) -> float:
        wait_s = self._pace.per_request_s * self._queue.length
        return min(max(wait_s, SHORTEST_RETRY_S), LONGEST_RETRY_S)

    def _refuse(self, those: Sequence[Waiting], error: BaseException) -> None:
        """At once, whatever came before them."""
        for waiting in those:
            settle(waiting, own(error, STOPPED))

    # choosing -------------------------------------------------------------------------------------

    def _go_on(self, now: float) -> None:
        """Gives the host what it has room for; where requests are merged, a loop iteration later."""
        if self._merges:
            if self._busy >= self._slots or self._wake is not None:
                return
            if self._alone_in_a_row >= ALONE:
                self._gather(0.0)
            else:
                self._wake = self._loop.call_soon(self._form)
            return
        queue = self._queue
        if queue.deadlines:
            self._expire(now)
        while queue.length and not self._is_full(now):
            self._launch_one(queue.pop(), now)

    def _is_full(self, now: float) -> bool:
        """Whether a request that goes alone has to wait here."""
        busy = self._busy
        if busy < self._slots:
            return False
        if busy >= self._pace.room or self._since is None:
            return busy >= self._pace.room
        stuck = sum(1 for _ in takewhile(lambda t: now - t >= STUCK_S, self._since.values()))
        if stuck in (0, busy):
            return False
        self._later.set(now + STUCK_S)  # the others may be stuck too by then, behind the first
        return True

    def _form(self) -> None:
        self._wake = None
        self._gather(0.0)

    def _look_again(self) -> None:
        if self._merges:
            self._gather(EARLY_S)
        else:
            self._go_on(self._clock() + EARLY_S)

    def _gather(self, early_s: float) -> None:
        queue, now = self._queue, self._clock()
        if queue.deadlines:
            self._expire(now)
        while self._again and self._busy < self._slots:
            waiting = self._again.popleft()
            if not waiting.done():
                self._launch_one(waiting, now)
        while queue.length and self._busy < self._slots:
            batch, rows = self._choose(now + early_s)
            if not batch:
                return
            queue.remove(*batch)
            self._later.stop()
            self._launch(batch, rows, now)

    def _choose(self, now: float) -> tuple[list[Waiting], int]:
        """The batch that goes now, and its rows; empty while it is better to wait."""
        batch: list[Waiting] = []
        rows, best, best_rows, most = 0, 0, 0, self._most
        full = False
        for waiting in self._queue:
            if batch and (rows + waiting.rows > most or waiting.group != batch[0].group):
                full = True
                break
            batch.append(waiting)
            rows += waiting.rows
            if rows in self._preferred:
                best, best_rows = len(batch), rows
            if rows >= most:
                full = True
                break
        if self._reunion is not None and not full and self._reunion.awaits(len(batch), now):
            self._later.set(self._reunion.until)
            return [], 0
        late = not self._delay_s or self._waited_enough(batch, now)
        if best and not (late and self._delay_s):
            return batch[:best], best_rows
        if full or late or (self._largest and rows >= self._largest):
            return batch, rows
        return [], 0

    def _waited_enough(self, batch: list[Waiting], now: float) -> bool:
        """Else the alarm is set for when it will have."""
        until = min([waiting.arrived for waiting in batch]) + self._delay_s
        if until <= now:
            return True
        self._later.set(until)
        return False

    # ran ------------------------------------------------------------------------------------------

    def _count(self, rows: int, compute_s: float) -> None:
        found = self.batches.get(rows)
        if found is None:
            found = self.batches[rows] = [0, 0.0]
        found[0] += 1
        found[1] += compute_s

    def _make_room(self, started: float, requests: int, *, left: int) -> None:
        """The worker gets its next work first; handing out what is done can wait a moment. `left`:
        how many of the `requests` the host has no more."""
        self._busy -= 1
        self._in_flight -= left
        now = self._clock()
        took_s = self._pace.answered(now, started, requests)
        if self._reunion is not None:
            self._reunion.answered(now, took_s, requests, self._queue.length)
        if self._queue.length or self._again:
            if self._merges:
                self._gather(0.0)
            else:
                self._go_on(now)
