"""Who waits for a model, in which order and for how long: one queue, as Triton's policy defines it.

Priority 1 goes before 2 and so on; inside a priority first come, first served. A request may bring a
`priority` (0, or one that does not exist: the default) and a `timeout` in microseconds, which ends
its waiting and never its running; it can only shorten the policy's own, and only where the policy
lets it. When the time is over the request is refused, or (timeout_action: delay) waits on behind all
others of its own and higher priorities.

Rules: whoever cancels is out at once, and nothing of it stays. Nothing here costs more for the
length of the queue but the logarithm of its deadlines. All moments are the caller's clock, in
seconds. It must not know what runs, when a batch is full, nor set a timer (`Alarm` is told when).
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, count
from typing import Any, TypeAlias

from repository.config import Batching
from repository.errors import QueueFullError, RepositoryError
from repository.forms import Group
from repository.messages import InferRequest, InferResponse
from repository.prompt import Prompt

NEVER = math.inf
# Deadlines of those who have left that are kept until it pays to sweep them.
STALE = 64


class Waiting(Prompt[InferResponse]):
    """A request and, in the same object, the answer to come.

    arrived      when, by the batcher's clock
    rows, group  count only where the model batches; equal groups may share a batch
    queue, lane  where it waits now; no queue: nowhere, or not any more
    deadline     its entry among the queue's, where it has one
    """

    __slots__ = ("arrived", "deadline", "group", "lane", "policy", "queue", "request", "rows")

    arrived: float
    deadline: _Deadline | None
    group: Group
    lane: Lane
    policy: _Policy
    queue: Queue | None
    request: InferRequest
    rows: int

    def cancel(self, msg: Any | None = None) -> bool:
        """Its client has left. Waiting, it makes way at once; running, it runs on for nobody."""
        cancelled = super().cancel(msg)
        if cancelled and self.queue is not None:
            self.queue.remove(self)
        return cancelled


Lane: TypeAlias = OrderedDict[Waiting, None]  # removes from anywhere in constant time
Outcome: TypeAlias = InferResponse | RepositoryError
_Deadline: TypeAlias = list[Any]  # [moment, serial, Waiting, or None once it has left]


@dataclass(slots=True, eq=False)
class _Policy:
    """One priority's. `timeout_us` 0: for ever. `most` 0: the whole queue's limit counts."""

    timeout_us: int
    delays: bool
    may_override: bool
    most: int
    lane: Lane = field(default_factory=OrderedDict)
    delayed: Lane = field(default_factory=OrderedDict)

    def allowance_us(self, wish: int | None) -> int:
        """How long a request may wait that asks for `wish`; 0: for ever."""
        own = self.timeout_us
        if not wish or wish < 0 or not self.may_override:
            return own
        return min(own, wish) if own else wish


class Queue:
    """`limit`: how many may wait in all, where their policy does not say (0: any number).

    Iterating goes through them in the order in which they are to be served. `length` is how many
    they are; where `deadlines` is empty, nobody's time can be over.
    """

    def __init__(self, batching: Batching, limit: int) -> None:
        self.length = 0
        self._limit = limit
        self._levels = [
            _policy(batching, priority) for priority in range(1, max(1, batching.priorities) + 1)
        ]
        self._default = self._levels[max(0, batching.default_priority - 1)]
        self._lanes = [lane for level in self._levels for lane in (level.lane, level.delayed)]
        self.deadlines: list[_Deadline] = []
        self._serial = count()

    def __iter__(self) -> Iterator[Waiting]:
        return chain.from_iterable(self._lanes)

    def add(self, waiting: Waiting) -> None:
        """Raises QueueFullError."""
        policy, parameters = self._default, waiting.request.parameters
        if parameters:
            policy = self._policy_for(parameters.get("priority"))
            timeout_us = policy.allowance_us(parameters.get("timeout"))
        else:
            timeout_us = policy.timeout_us
        if policy.most:
            self._check_room(len(policy.lane) + len(policy.delayed), policy.most)
        elif self._limit:
            self._check_room(self.length, self._limit)
        lane = policy.lane
        lane[waiting] = None
        waiting.queue, waiting.lane, waiting.deadline = self, lane, None
        self.length += 1
        if timeout_us:
            self._limit_wait(waiting, policy, waiting.arrived + timeout_us / 1e6)

    def remove(self, *those: Waiting) -> None:
        """Out of the queue: to be run, refused, or because their client has left."""
        for waiting in those:
            del waiting.lane[waiting]
            waiting.queue = None
            if waiting.deadline is not None:
                waiting.deadline[2] = None
        self.length -= len(those)

    def pop(self) -> Waiting:
        """Takes out the next. Only where there is one."""
        first, _ = next(filter(None, self._lanes)).popitem(last=False)
        first.queue = None
        if first.deadline is not None:
            first.deadline[2] = None
        self.length -= 1
        return first

    @property
    def earliest(self) -> float:
        """The next moment at which somebody's time is over."""
        deadlines = self.deadlines
        while deadlines and deadlines[0][2] is None:
            heapq.heappop(deadlines)
        return deadlines[0][0] if deadlines else NEVER

    def expire(self, now: float) -> list[Waiting]:
        """Those whose time is over and who are to be refused; others are put back."""
        refused: list[Waiting] = []
        while self.earliest <= now:
            waiting: Waiting = heapq.heappop(self.deadlines)[2]
            waiting.deadline = None
            if waiting.policy.delays:
                del waiting.lane[waiting]
                waiting.lane = waiting.policy.delayed
                waiting.lane[waiting] = None
            else:
                self.remove(waiting)
                refused.append(waiting)
        return refused

    def clear(self) -> list[Waiting]:
        """Takes out everyone."""
        everyone = list(self)
        self.remove(*everyone)
        return everyone

    def _policy_for(self, priority: int | None) -> _Policy:
        if priority and 0 < priority <= len(self._levels):
            return self._levels[priority - 1]
        return self._default

    def _check_room(self, waiting: int, most: int) -> None:
        if waiting >= most:
            raise QueueFullError(
                f"Exceeds maximum queue size: {waiting} requests wait already; ask again later, "
                f"or raise batching.max_queue"
            )

    def _limit_wait(self, waiting: Waiting, policy: _Policy, until: float) -> None:
        waiting.policy = policy
        waiting.deadline = [until, next(self._serial), waiting]
        heapq.heappush(self.deadlines, waiting.deadline)
        if len(self.deadlines) > 2 * self.length + STALE:
            self.deadlines = [entry for entry in self.deadlines if entry[2] is not None]
            heapq.heapify(self.deadlines)


def _policy(batching: Batching, priority: int) -> _Policy:
    level = batching.policy(priority)
    return _Policy(
        timeout_us=level.timeout_us or 0,
        delays=level.timeout_action == "delay",
        may_override=bool(level.allow_timeout_override),
        most=level.max_queue or 0,
    )


class Alarm:
    """One timer for many moments: it is always set for the earliest that it was told of.

    It may ring early, for the loop's timers are coarse, or for nothing: look at the clock then.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float],
        ring: Callable[[], None],
    ) -> None:
        self._loop, self._clock, self._ring = loop, clock, ring
        self._at = NEVER
        self._timer: asyncio.TimerHandle | None = None

    def set(self, at: float) -> None:
        if at < self._at:
            self.stop()
            self._at = at
            self._timer = self._loop.call_later(max(0.0, at - self._clock()), self._go)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._at = None, NEVER

    def _go(self) -> None:
        self._timer, self._at = None, NEVER
        self._ring()


class InOrder:
    """Holds answers back until all that came before them are answered, or refused, or gone."""

    def __init__(self) -> None:
        self._expected: deque[Waiting] = deque()
        self._ready: dict[Waiting, Outcome] = {}
        self._sweep_at = STALE

    def expect(self, waiting: Waiting) -> None:
        waiting.add_done_callback(self._on_done)
        self._expected.append(waiting)
        if len(self._expected) > self._sweep_at:
            self._expected = deque(w for w in self._expected if not w.done())
            self._sweep_at = 2 * len(self._expected) + STALE

    def give(self, waiting: Waiting, outcome: Outcome) -> None:
        if not waiting.done():
            self._ready[waiting] = outcome
            self._release()

    def _on_done(self, waiting: Waiting) -> None:
        self._ready.pop(waiting, None)  # of a client that left before its turn
        self._release()

    def _release(self) -> None:
        """Hands out what need not wait any more."""
        expected, ready = self._expected, self._ready
        while expected:
            first = expected[0]
            outcome = ready.pop(first, None)
            if outcome is None and not first.done():
                return
            expected.popleft()
            if outcome is not None:
                settle(first, outcome)


def settle(waiting: Waiting, outcome: Outcome) -> None:
    """Unless its client has left."""
    if waiting.done():
        return
    if isinstance(outcome, RepositoryError):
        waiting.set_exception(outcome)
    else:
        waiting.set_result(outcome)
