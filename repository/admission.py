"""Who of the queued may load now, who must leave for them, and who is refused.

`decide` is pure. The reconciler carries its decisions out in the same breath, so what the ledger says
is still true when it is acted upon. Per device the queue is first come, first served: a large model
that waits for room is not overtaken by small ones for ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from repository.errors import NoRoomError
from repository.lifecycle.generation import Generation, Trigger
from repository.lifecycle.ledger import MemoryLedger
from repository.lifecycle.residency import victims
from repository.lifecycle.states import HOLDS_MEMORY, LEAVING, State
from repository.sizes import human

# Nobody asked for these at this moment: they take room that is free and evict nobody.
MODEST = frozenset({Trigger.STARTUP, Trigger.RESTART})


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


def decide(
    queue: Sequence[Generation],
    residents: Iterable[Generation],
    ledgers: Mapping[str, MemoryLedger],
    *,
    load_slots: int,
    room_wait_s: float,
    now: float,
) -> Decisions:
    """`queue`: QUEUED and not asked to retire, oldest first. `residents`: all that hold memory."""
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
        if room is None:
            room = rooms[gen.device] = Room(ledgers[gen.device], holders, now)
        if gen.spec.bytes_needed <= room.free:
            if slots <= 0:
                break
            slots -= 1
            room.take(gen.spec.bytes_needed)
            todo.append(Admit(gen))
            continue
        found = room.make(gen, patience_until=gen.born_at + room_wait_s)
        if isinstance(found, float):
            again.append(found)
        todo += found if isinstance(found, list) else []
        if not (isinstance(found, list) and isinstance(found[0], Refuse)):
            blocked.add(gen.device)
    return Decisions(tuple(todo), min(again, default=None))


class Room:
    """One device as the head of its queue sees it. Bytes."""

    def __init__(self, ledger: MemoryLedger, holders: Sequence[Generation], now: float) -> None:
        here = [g for g in holders if g.device == ledger.device]
        self.ledger = ledger
        self.now = now
        self.free = ledger.free
        self.leaving = [g for g in here if g.state in LEAVING or g.retire_asked.is_set()]
        self.ready = [g for g in here if g.state is State.READY and g not in self.leaving]
        self.here = here
        self.free_soon = self.free + sum(g.reserved for g in self.leaving)

    def take(self, n_bytes: int) -> None:
        self.free -= n_bytes
        self.free_soon -= n_bytes

    def make(self, gen: Generation, *, patience_until: float) -> list[Decision] | float | None:
        """Evictions or a refusal; a time until which to wait; None: wait for what is leaving."""
        need = gen.spec.bytes_needed
        if need > self.ledger.capacity:
            return [Refuse(gen, self.refusal(gen))]
        if need <= self.free_soon:
            return None
        found = self.leave_for(gen)
        if found is not None:
            return [Evict(g, room_for=gen) for g in found]
        if gen.trigger not in MODEST and self.now < patience_until and need <= self.best_case(gen):
            return patience_until
        return [Refuse(gen, self.refusal(gen))]

    def leave_for(self, gen: Generation) -> list[Generation] | None:
        """Others first; failing that the model's own older generations too, if its config lets them.
        With `reload: replace` its own go first and others only if that is not enough."""
        need, own = gen.spec.bytes_needed, self.own(gen)
        others = [] if gen.trigger in MODEST and not own else self.others(gen)
        own_bytes = sum(g.reserved for g in own)
        if gen.spec.config.reload != "replace":
            found = victims(need, self.free_soon, others, now=self.now)
            if found is not None or not own or gen.spec.config.reload == "overlap":
                return found
        found = victims(need, self.free_soon + own_bytes, others, now=self.now)
        return None if found is None else own + found

    def own(self, gen: Generation) -> list[Generation]:
        return [g for g in self.ready if g.spec.key == gen.spec.key]

    def others(self, gen: Generation) -> list[Generation]:
        return [g for g in self.ready if g.spec.model != gen.spec.model]

    def best_case(self, gen: Generation) -> int:
        """Free bytes if everyone who is busy now came to rest. Loading ones are not counted on."""
        own = self.own(gen) if gen.spec.config.reload != "overlap" else []
        may = [g for g in self.others(gen) if not g.spec.config.pin] + own
        return self.free_soon + sum(g.reserved for g in may)

    def refusal(self, gen: Generation) -> NoRoomError:
        residents = {str(g): g.reserved for g in self.here}
        pinned = [str(g) for g in self.ready if g.spec.config.pin]
        held = ", ".join(f"{name} {human(n)}" for name, n in sorted(residents.items())) or "nothing"
        return NoRoomError(
            f"'{gen.spec.model}' version {gen.spec.version} needs {human(gen.spec.bytes_needed)} on "
            f"{self.ledger.device}; {human(self.free)} of {human(self.ledger.capacity)} are free; "
            f"resident: {held}; pinned: {', '.join(sorted(pinned)) or 'none'}. Unload or unpin one, "
            f"or raise --memory-budget",
            needed=gen.spec.bytes_needed,
            free=self.free,
            device=self.ledger.device,
            residents=residents,
            pinned=sorted(pinned),
        )
