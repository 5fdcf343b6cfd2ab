"""Who of the queued may load now, who must leave for them, and who is refused.

`decide` is pure. The reconciler carries its decisions out in the same breath, so what the ledger says
is still true when it is acted upon. Per device the queue is first come, first served: a large model
that waits for room is not overtaken by small ones for ever.

A model that requests wait for (`demanded`) is patient: it waits for as long as they do, and others leave
for it once their turn is over, busy or not. Only what could not fit even then is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from repository.errors import NoRoomError
from repository.lifecycle.generation import Generation, Trigger
from repository.lifecycle.ledger import MemoryLedger
from repository.lifecycle.residency import give_way, in_use, next_turn, victims
from repository.lifecycle.states import HOLDS_MEMORY, LEAVING, State
from repository.sizes import human
from repository.spec import ModelSpec

NAMED = 8  # models that the text of a refusal names; all of them are in its data


@dataclass(frozen=True, slots=True)
class Admit:
    gen: Generation


@dataclass(frozen=True, slots=True)
class Evict:
    """`gen` leaves so that `room_for` can come. Its own older generation is replaced, not evicted:
    the model is still wanted."""

    gen: Generation
    room_for: Generation

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
    """`again_at`: somebody's patience ends then."""

    todo: tuple[Decision, ...] = ()
    again_at: float | None = None


class Waiting(NamedTuple):
    """Models that requests wait for, and how long others have served before they leave for them."""

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
    outgoing: Callable[[Generation], bool] = lambda gen: False,
    waiting: Waiting = NOBODY,
) -> Decisions:
    """`queue`: QUEUED and not asked to retire, oldest first. `residents`: all that hold memory, at
    least. `outgoing`: is it of a version that serves only until a wanted one does?"""
    holders = [g for g in residents if g.state in HOLDS_MEMORY]
    slots = load_slots - sum(g.state in (State.LOADING, State.WARMING) for g in holders)
    todo: list[Decision] = []
    again: list[float] = []
    blocked: set[str] = set()
    rooms: dict[str, Room] = {}
    for gen in queue:
        if gen.device in blocked:
            continue
        room = rooms.get(gen.device)
        free = ledgers[gen.device].free if room is None else room.free
        if slots <= 0 and gen.spec.bytes_needed <= free:
            break
        if room is None:
            room = Room(ledgers[gen.device], holders, queue, outgoing, now, waiting)
            rooms[gen.device] = room
        if gen.spec.bytes_needed <= min(room.free, room.most(gen.spec)):
            slots -= 1
            room.take(gen)
            todo.append(Admit(gen))
            continue
        found = room.make(gen, patience_until=gen.asked_at + room_wait_s)
        if isinstance(found, Refuse):
            todo.append(found)
            continue
        blocked.add(gen.device)
        if isinstance(found, float):
            again.append(found)
        elif slots > 0:  # nobody leaves for one that could not load yet
            todo += found
    return Decisions(tuple(todo), min(again, default=None))


def never(
    spec: ModelSpec,
    residents: Iterable[Generation],
    ledger: MemoryLedger,
    *,
    outgoing: Callable[[Generation], bool],
) -> NoRoomError | None:
    """What to say at once to a request that would wait for this in vain: it does not fit beside what
    is pinned, however long one waits."""
    holders = [g for g in residents if g.state in HOLDS_MEMORY]
    room = Room(ledger, holders, (), outgoing, now=0.0)
    return room.refusal(spec) if spec.bytes_needed > room.at_best(spec) else None


def modest(gen: Generation) -> bool:
    """Nobody has asked for it at this moment (or nobody waits for it any more): it takes room that is
    free and evicts nobody."""
    return gen.trigger not in (Trigger.WATCH, Trigger.API)


def replaces(spec: ModelSpec, old: Generation, outgoing: Callable[[Generation], bool]) -> bool:
    """`spec` comes instead of `old`: the same version, or `old` is of one that is on its way out."""
    if spec.model != old.spec.model:
        return False
    return spec.version == old.spec.version or outgoing(old)


class Room:
    """One device as the head of its queue sees it. Bytes."""

    def __init__(
        self,
        ledger: MemoryLedger,
        holders: Sequence[Generation],
        queue: Sequence[Generation],
        outgoing: Callable[[Generation], bool],
        now: float,
        waiting: Waiting = NOBODY,
    ) -> None:
        here = [g for g in holders if g.device == ledger.device]
        self.ledger = ledger
        self.holders = holders  # on every device: a model may lie on several
        self.queue = queue
        self.outgoing = outgoing
        self.now = now
        self.free = ledger.free
        self.leaving = [g for g in here if g.state in LEAVING or g.retire_asked.is_set()]
        self.ready = [g for g in here if g.state is State.READY and not g.retire_asked.is_set()]
        self.here = here
        self.coming: list[Generation] = []  # admitted in the same breath, nothing reserved yet
        self.waiting = waiting
        self.free_soon = self.free + sum(g.reserved for g in self.leaving)

    @cached_property
    def busy(self) -> set[str]:
        return in_use([*self.holders, *self.queue])

    def take(self, gen: Generation) -> None:
        self.coming.append(gen)
        self.free -= gen.spec.bytes_needed
        self.free_soon -= gen.spec.bytes_needed

    def make(self, gen: Generation, *, patience_until: float) -> list[Evict] | Refuse | float:
        """Evictions ([]: wait for what is leaving), a refusal, or a time until which to wait."""
        need = gen.spec.bytes_needed
        if need > self.most(gen.spec):
            return Refuse(gen, self.refusal(gen.spec))
        if need <= self.free_soon:
            return []
        found = self.leave_for(gen)
        if found is not None:
            return [Evict(g, room_for=gen) for g in found]
        if self.is_demanded(gen):
            return self.wait_for_turn(gen)
        if not modest(gen) and self.now < patience_until and need <= self.best_case(gen):
            return patience_until
        return Refuse(gen, self.refusal(gen.spec))

    def is_demanded(self, gen: Generation) -> bool:
        return gen.spec.model in self.waiting.models

    def wait_for_turn(self, gen: Generation) -> list[Evict] | Refuse | float:
        if gen.spec.bytes_needed > self.at_best(gen.spec):
            return Refuse(gen, self.refusal(gen.spec))
        turn_s = self.waiting.min_residency_s
        at = next_turn(self.others(gen), now=self.now, min_residency_s=turn_s)
        return [] if at is None else at  # without a turn that ends, something is on its way

    def leave_for(self, gen: Generation) -> list[Generation] | None:
        """Others first; failing that the model's own older generations too, if its config lets them.
        With `reload: replace` its own go first and others only if that is not enough."""
        need, own = gen.spec.bytes_needed, self.own(gen.spec)
        own_bytes = sum(g.reserved for g in own)
        if gen.spec.config.reload != "replace":
            found = self.others_leave(gen, need, self.free_soon)
            if found is not None or not own or gen.spec.config.reload == "overlap":
                return found
        found = self.others_leave(gen, need, self.free_soon + own_bytes)
        return None if found is None else own + found

    def others_leave(self, gen: Generation, need: int, free: int) -> list[Generation] | None:
        others = [g for g in self.others(gen) if g.spec.model not in self.busy]
        if modest(gen) and (self.is_demanded(gen) or not self.own(gen.spec)):
            others = []
        found = victims(need, free, others, now=self.now)
        if found is not None or not self.is_demanded(gen):
            return found
        others = [g for g in self.here if g.spec.model != gen.spec.model]
        turn_s = self.waiting.min_residency_s
        return give_way(need, free, others, now=self.now, min_residency_s=turn_s)

    def own(self, spec: ModelSpec) -> list[Generation]:
        return [g for g in self.ready if replaces(spec, g, self.outgoing)]

    def others(self, gen: Generation) -> list[Generation]:
        return [g for g in self.ready if g.spec.model != gen.spec.model]

    def best_case(self, gen: Generation) -> int:
        """Free bytes if everyone who is busy now came to rest. Loading ones are not counted on."""
        own = self.own(gen.spec) if gen.spec.config.reload != "overlap" else []
        may = [g for g in self.others(gen) if not g.spec.config.pin] + own
        return self.free_soon + sum(g.reserved for g in may)

    def at_best(self, spec: ModelSpec) -> int:
        """Free bytes once every other model has had its turn and left, but for those that are pinned,
        and for its own versions, which stay beside it."""
        own = self.own(spec) if spec.config.reload != "overlap" else []
        beside = [g for g in self.ready if g.spec.model == spec.model and g not in own]
        pinned = [g for g in self.here if g.spec.config.pin and g.spec.model != spec.model]
        staying = beside + [g for g in pinned if g not in self.leaving]
        return min(self.most(spec), self.ledger.capacity - sum(g.reserved for g in staying))

    def most(self, spec: ModelSpec) -> int:
        """What its config lets it need of the device."""
        return self.ledger.most(spec.config.device_share)

    def refusal(self, spec: ModelSpec) -> NoRoomError:
        residents = {str(g): g.reserved for g in self.here}
        residents |= {str(g): g.spec.bytes_needed for g in self.coming}
        pinned = [str(g) for g in self.ready if g.spec.config.pin]
        why = (
            f"{human(self.free)} of {human(self.ledger.capacity)} are free; "
            f"resident: {_largest(residents)}; pinned: {_some(sorted(pinned)) or 'none'}. Unload or "
            f"unpin one, or raise --memory-budget"
        )
        if spec.bytes_needed > self.most(spec) and spec.config.device_share is not None:
            why = (
                f"its device_share of {spec.config.device_share:g} is {human(self.most(spec))} of "
                f"{human(self.ledger.capacity)}. Raise device_share (gpu_memory_utilization), or make "
                f"the model smaller"
            )
        return NoRoomError(
            f"'{spec.model}' version {spec.version} needs {human(spec.bytes_needed)} on "
            f"{self.ledger.device}; {why}",
            needed=spec.bytes_needed,
            free=self.free,
            device=self.ledger.device,
            residents=residents,
            pinned=sorted(pinned),
        )


def _largest(residents: Mapping[str, int]) -> str:
    by_size = sorted(residents.items(), key=lambda r: (-r[1], r[0]))
    return _some([f"{name} {human(n_bytes)}" for name, n_bytes in by_size]) or "nothing"


def _some(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
