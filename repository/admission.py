"""Who of the queued may load now and where, who must leave for them, and who is refused.

`decide` is pure. The reconciler carries its decisions out in the same breath, so what the ledgers say
is still true when it is acted upon. Per device the queue is first come, first served: a large model
that waits for room is not overtaken by small ones for ever. It holds up nobody who goes elsewhere.

Where: what fits now wins, the tightest fit of it; else where it costs least to make room; else it waits,
or is refused. What it needs of several devices it gets together or not at all.

A model that requests wait for (`demanded`) is patient: it waits for as long as they do, and others leave
for it once their turn is over, busy or not. Only what could not fit even then is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from repository.errors import NoRoomError
from repository.lifecycle.generation import Generation
from repository.lifecycle.ledger import MemoryLedger
from repository.lifecycle.placement import Placement
from repository.lifecycle.residency import Moment
from repository.lifecycle.states import State
from repository.lifecycle.worth import credit
from repository.room import Clearing, Outgoing, Room, modest
from repository.shortage import refusal
from repository.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Admit:
    gen: Generation
    placement: Placement


@dataclass(frozen=True, slots=True)
class Evict:
    """`gen` leaves so that `room_for` can come. Its own older generation is replaced, not evicted:
    the model is still wanted. `placement`: where that goes then; `credit`: what `gen` was worth to
    whoever needs the room (`lifecycle.worth`)."""

    gen: Generation
    room_for: Generation
    placement: Placement
    credit: float

    @property
    def replaced(self) -> bool:
        return self.gen.spec.model == self.room_for.spec.model


@dataclass(frozen=True, slots=True)
class Refuse:
    gen: Generation
    error: NoRoomError


Decision = Admit | Evict | Refuse


@dataclass(frozen=True, slots=True)
class Decisions:
    """`again_at`: somebody's patience, or somebody's turn, ends then."""

    todo: tuple[Decision, ...] = ()
    again_at: float | None = None


class Waiting(NamedTuple):
    """Models that requests wait for, and how long others have served before they leave."""

    models: Collection[str] = ()
    min_residency_s: float = 0.0


NOBODY = Waiting()


def decide(
    queue: Sequence[Generation],
    residents: Iterable[Generation],
    ledgers: Mapping[str, MemoryLedger],
    *,
    load_slots: int,
    room_wait_s: float,
    now: float,
    outgoing: Outgoing = lambda gen: False,
    waiting: Waiting = NOBODY,
    clock: float = 0.0,
) -> Decisions:
    """`queue`: QUEUED and not asked to retire, oldest first. `residents`: all that hold memory, at
    least. `outgoing`: is it of a version that serves only until a wanted one does? `clock`: see
    `lifecycle.worth`."""
    at = Moment(now, waiting.min_residency_s, clock)
    room = Room(ledgers, residents, queue, outgoing, at, waiting.models)
    loading = sum(g.state in (State.LOADING, State.WARMING) for g in room.holders)
    line = _Line(room, load_slots - loading, room_wait_s, _aims(room, queue))
    for gen in queue:
        if not line.serve(gen):
            break
    return Decisions(tuple(line.todo), min(line.again, default=None))


def _aims(room: Room, queue: Sequence[Generation]) -> dict[Generation, Placement]:
    """As long as something can come of it. Of two with the same device, the first in the queue has it:
    they would wait for each other."""
    found: dict[Generation, Placement] = {}
    for gen in queue:
        aim = gen.aim
        if aim is None:  # nearly all, and the queue may be long
            continue
        taken = {device for other in found.values() for device in other.needs}
        if not taken.isdisjoint(aim.needs) or aim not in room.choices(gen):
            continue
        if room.clearing(gen, [aim]) is not None:
            found[gen] = aim
    return found


def never(
    spec: ModelSpec,
    options: Sequence[Placement],
    residents: Iterable[Generation],
    ledgers: Mapping[str, MemoryLedger],
    *,
    outgoing: Callable[[Generation], bool],
) -> NoRoomError | None:
    """What to say at once to a request that would wait for this in vain: it does not fit beside what
    is pinned, however long one waits."""
    room = Room(ledgers, residents, (), outgoing, Moment(0.0))
    if any(room.ever(spec, where) for where in options):
        return None
    return refusal(room, spec, options)


@dataclass(slots=True)
class _Line:
    """The queue, one after the other. `aims`: where others have left for somebody, nobody else goes, not
    even from before them in the queue, or they had left in vain. `blocked`: devices that somebody waits
    for."""

    room: Room
    slots: int
    room_wait_s: float
    aims: dict[Generation, Placement]
    todo: list[Decision] = field(default_factory=list)
    again: list[float] = field(default_factory=list)
    blocked: set[str] = field(default_factory=set)

    def serve(self, gen: Generation) -> bool:
        """False: there is no slot for it, nor for those behind it."""
        choices = self.room.choices(gen)
        if not choices:
            self.todo.append(Refuse(gen, refusal(self.room, gen.spec, gen.options)))
            return True
        open_ = self._open(gen, choices)
        if not open_:
            return True
        where = self.room.best_fit(gen, open_)
        if where is not None:
            return self._admit(gen, where)
        found = make(self.room, gen, open_, patience_until=gen.asked_at + self.room_wait_s)
        match found:
            case Refuse() if len(open_) == len(choices):
                self.todo.append(found)
            case Clearing():
                self.blocked.update(found.placement.needs)
                self._clear(gen, found)
            case float():
                self.blocked.update(device for where in open_ for device in where.needs)
                if found < math.inf:
                    self.again.append(found)
        return True

    def _open(self, gen: Generation, choices: Sequence[Placement]) -> list[Placement]:
        """Where nobody comes before it."""
        aims = {device for g, aim in self.aims.items() if g is not gen for device in aim.needs}
        closed = self.blocked | aims
        found = [where for where in choices if closed.isdisjoint(where.needs)]
        aim = self.aims.get(gen)
        return [aim] if aim in found else found

    def _admit(self, gen: Generation, where: Placement) -> bool:
        if self.slots <= 0:
            return False
        self.slots -= 1
        self.room.take(gen, where)
        self.todo.append(Admit(gen, where))
        return True

    def _clear(self, gen: Generation, found: Clearing) -> None:
        if self.slots > 0:  # nobody leaves for one that could not load yet
            for old in found.leave:
                model = [g for g in found.leave if g.spec.model == old.spec.model]
                worth = credit(model, found.placement.needs, self.room.at.clock)
                self.todo.append(Evict(old, gen, found.placement, worth))
            self.room.leave(found.leave)


def make(
    room: Room, gen: Generation, choices: Sequence[Placement], *, patience_until: float
) -> Clearing | Refuse | float:
    """Who leaves, a refusal, or a time until which to wait (inf: until something happens)."""
    clearing = room.clearing(gen, choices)
    if clearing is not None:
        return clearing
    turn = room.next_turn(gen, choices)
    if room.is_demanded(gen):
        if not any(room.ever(gen.spec, where, gen=gen) for where in choices):
            return Refuse(gen, refusal(room, gen.spec, choices))
        return math.inf if turn is None else turn  # without it, something is on its way
    patient = not modest(gen) and room.at.now < patience_until
    if patient and any(room.in_time(gen, where) for where in choices):
        return patience_until if turn is None else min(patience_until, turn)
    if turn is not None and not modest(gen) and room.after_turns(gen, choices):
        return turn  # that is sure, and near: no reason to send anybody away
    return Refuse(gen, refusal(room, gen.spec, choices))
