"""A sequence has one row of one instance's batch, from its START to its END.

A batch has the rows from 0 to the last that has something to say; rows between, of sequences that say
nothing now or of nobody, are zeros that are not ready (`Wiring.blank`). The oldest request decides which
shapes go: others wait for the next batch. Each instance has one batch in flight. A model that takes
requests as they are ("ask") gets no rows of nobody.

A batch that the model refuses for what one of its requests holds is run again one by one: no state has
changed.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from repository.batching import OF_ONE
from repository.config import Sequences
from repository.forming import EARLY_S
from repository.hosts.base import Host
from repository.merging import merge, split
from repository.messages import InferRequest, InferResponse, Loaded
from repository.prompt import error_of, listen
from repository.queueing import Alarm
from repository.responding import Responses
from repository.sequences.book import Book, OpenSequence, Place, Turn
from repository.sequences.following import Following
from repository.sequences.wiring import Wiring, group_of


@dataclass(slots=True, eq=False)
class _Instance:
    number: int
    seated: dict[int, OpenSequence] = field(default_factory=dict)
    freed: list[int] = field(default_factory=list)  # a heap of slots that were used before
    busy: bool = False
    wake: asyncio.Handle | None = None
    again: deque[Turn] = field(default_factory=deque)  # of batches that were refused

    def take(self, sequence: OpenSequence) -> Place:
        slot = heapq.heappop(self.freed) if self.freed else len(self.seated)
        self.seated[slot] = sequence
        return Place(self.number, slot)

    def give(self, slot: int) -> None:
        del self.seated[slot]
        heapq.heappush(self.freed, slot)


class Direct:
    """`clock` in seconds."""

    def __init__(
        self,
        host: Host,
        loaded: Loaded,
        config: Sequences,
        book: Book,
        wiring: Wiring,
        clock: Callable[[], float],
    ) -> None:
        self.executions = 0
        self.samples = 0
        self.batches: dict[int, list[float]] = {}
        self._host = host
        self._book = book
        self._wiring = wiring
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._rows = max(1, loaded.max_batch_size)
        self._batched = loaded.max_batch_size > 0
        self._asks = "ask" in loaded.abilities
        self._delay_s = config.max_delay_us / 1e6
        self._enough = config.min_slots_ratio * self._rows
        self._instances = [_Instance(i) for i in range(host.slots)]
        self._in_flight = 0
        self._later = Alarm(self._loop, clock, self._look_again)
        self._following = Following(book)

    @property
    def waiting(self) -> int:
        return sum(len(instance.again) for instance in self._instances)

    @property
    def in_flight(self) -> int:
        return self._in_flight

    # places ---------------------------------------------------------------------------------------

    def seat(self, sequence: OpenSequence) -> bool:
        instance = min(self._instances, key=lambda i: len(i.seated))
        if len(instance.seated) >= self._rows:
            return False
        sequence.place = instance.take(sequence)
        return True

    def leave(self, sequence: OpenSequence) -> None:
        assert sequence.place is not None
        self._instances[sequence.place.instance].give(sequence.place.slot)
        sequence.place = None

    def look(self, sequence: OpenSequence) -> None:
        assert sequence.place is not None
        self._soon(self._instances[sequence.place.instance])

    def close(self, error: BaseException) -> None:
        self._later.stop()
        for instance in self._instances:
            while instance.again:
                self._book.ran(instance.again.popleft(), error)

    # choosing -------------------------------------------------------------------------------------

    def _soon(self, instance: _Instance) -> None:
        """A loop iteration later: what comes together goes together."""
        if instance.wake is None and not instance.busy:
            instance.wake = self._loop.call_soon(self._form, instance, 0.0)

    def _look_again(self) -> None:
        for instance in self._instances:
            if instance.wake is None:
                self._form(instance, EARLY_S)

    def _form(self, instance: _Instance, early_s: float) -> None:
        instance.wake = None
        if instance.busy or self._book.closed is not None:
            return
        now = self._clock()
        if instance.again:
            turn = instance.again.popleft()
            self._run(instance, {_slot(turn): (turn, self._book.dress(turn))}, now)
            return
        ready = self._ready(instance)
        if not ready or self._waits(ready, now + early_s):
            return
        chosen = self._alike(ready)
        for turn, _ in chosen.values():
            self._book.begin(turn)
        self._run(instance, chosen, now)

    def _ready(self, instance: _Instance) -> list[Turn]:
        idle = [s for s in instance.seated.values() if s.running is None]
        heads = [self._book.head(sequence) for sequence in idle]
        # Asked after `head`: one that has just ended leaves its place before another START of its id.
        return [turn for turn in heads if turn is not None and turn.sequence.begun]

    def _waits(self, ready: list[Turn], now: float) -> bool:
        if not self._delay_s or len(ready) >= self._enough:
            return False
        until = min(turn.arrived for turn in ready) + self._delay_s
        if until <= now:
            return False
        self._later.set(until)
        return True

    def _alike(self, ready: list[Turn]) -> dict[int, tuple[Turn, InferRequest]]:
        """By slot: the oldest, and those that can share a batch with it."""
        ready.sort(key=lambda turn: turn.arrived)
        dressed = [(turn, self._book.dress(turn)) for turn in ready]
        if self._asks:
            return {_slot(turn): (turn, request) for turn, request in dressed}
        group = group_of(dressed[0][1])
        return {
            _slot(turn): (turn, request)
            for turn, request in dressed
            if len(dressed) == 1 or group_of(request) == group
        }

    # running --------------------------------------------------------------------------------------

    def _run(
        self, instance: _Instance, chosen: dict[int, tuple[Turn, InferRequest]], now: float
    ) -> None:
        instance.busy = True
        self._in_flight += len(chosen)
        self.executions += 1
        self.samples += len(chosen)
        turns = {slot: chosen[slot][0] for slot in sorted(chosen)}
        if self._asks:
            self._ask(instance, [chosen[slot] for slot in turns], now)
            return
        try:
            answer = self._host.infer(self._whole(chosen), at=instance.number)
        except Exception as error:  # noqa: BLE001 - whatever broke, nobody may wait for ever
            answer = self._loop.create_future()
            answer.set_exception(error)
        listen(answer, partial(self._answered, instance, turns, now))

    def _whole(self, chosen: dict[int, tuple[Turn, InferRequest]]) -> InferRequest:
        some = next(iter(chosen.values()))[1]
        if not self._batched:
            return some
        nobody = self._wiring.blank(some) if len(chosen) <= max(chosen) else some
        rows = [chosen[slot][1] if slot in chosen else nobody for slot in range(max(chosen) + 1)]
        return merge(rows) if len(rows) > 1 else some

    def _answered(
        self,
        instance: _Instance,
        turns: dict[int, Turn],
        started: float,
        answer: asyncio.Future[InferResponse],
    ) -> None:
        instance.busy = False
        self._in_flight -= len(turns)
        error = error_of(answer)
        parts: list[InferResponse] = []
        if error is None:
            try:
                parts = self._parts(answer.result(), max(turns) + 1)
            except Exception as broken:  # noqa: BLE001 - as above
                error = broken
        if error is not None:
            self._failed(instance, list(turns.values()), error)
            return
        self._count(len(turns), answer.result().compute_s)
        self._soon(instance)
        for slot, turn in turns.items():
            part = parts[slot] if self._batched else parts[0]
            part.queue_s = started - turn.arrived
            part.batch_size = len(turns) if self._batched else 0
            self._book.ran(turn, part)

    def _parts(self, whole: InferResponse, rows: int) -> list[InferResponse]:
        return split(whole, [1] * rows) if self._batched and rows > 1 else [whole] * rows

    def _failed(self, instance: _Instance, turns: list[Turn], error: BaseException) -> None:
        self._soon(instance)
        if len(turns) > 1 and isinstance(error, OF_ONE) and self._book.closed is None:
            instance.again.extend(turns)
            return
        for turn in turns:
            self._book.ran(turn, error)

    def _count(self, rows: int, compute_s: float) -> None:
        found = self.batches.setdefault(rows, [0, 0.0])
        found[0] += 1
        found[1] += compute_s

    # models that are asked ------------------------------------------------------------------------

    def _ask(
        self, instance: _Instance, chosen: list[tuple[Turn, InferRequest]], now: float
    ) -> None:
        asked = [Responses(request) for _, request in chosen]
        for (turn, _), answers in zip(chosen, asked, strict=True):
            self._following.follow(turn, answers)
        try:
            free = self._host.ask(asked, at=instance.number)
        except Exception as error:  # noqa: BLE001 - as above
            for answers in asked:
                answers.end(error)
            free = self._loop.create_future()
            free.set_result(None)
        listen(free, partial(self._free, instance, len(chosen), now))

    def _free(
        self, instance: _Instance, asked: int, started: float, free: asyncio.Future[None]
    ) -> None:
        """The model can take the next ones."""
        self._count(asked, self._clock() - started)
        instance.busy = False
        self._in_flight -= asked
        self._soon(instance)


def _slot(turn: Turn) -> int:
    assert turn.sequence.place is not None
    return turn.sequence.place.slot
