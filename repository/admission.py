"""Who of the queued may load now, who must leave for them, and who is refused.

`decide` is pure. The reconciler carries its decisions out in the same breath, so what the ledger says
is still true when it is acted upon. Per device the queue is first come, first served: a large model
that waits for room is not overtaken by small ones for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from repository.errors import NoRoomError
from repository.lifecycle.generation import Generation, Trigger
from repository.lifecycle.ledger import MemoryLedger
from repository.lifecycle.residency import in_use, victims
from repository.lifecycle.states import HOLDS_MEMORY, LEAVING, State
from repository.sizes import human
from repository.spec import ModelSpec

# Nobody asked for these at this moment: they take room that is free and evict nobody.
MODEST = frozenset({Trigger.STARTUP, Trigger.RESTART})
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


def decide(
    queue: Sequence[Generation],
    residents: Iterable[Generation],
    ledgers: Mapping[str, MemoryLedger],
    *,
    load_slots: int,
    room_wait_s: float,
    now: float,
    outgoing: Callable[[Generation], bool] = lambda gen: False,
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
            room = Room(ledgers[gen.device], holders, queue, outgoing, now)
            rooms[gen.device] = room
        if gen.spec.bytes_needed <= room.free:
            slots -= 1
            room.take(gen)
            todo.append(Admit(gen))
            continue
        found = room.make(gen, patience_until=gen.born_at + room_wait_s)
        if isinstance(found, Refuse):
            todo.append(found)
            continue
        blocked.add(gen.device)
        if isinstance(found, float):
            again.append(found)
        elif slots > 0:  # nobody leaves for one that could not load yet
            todo += found
    return Decisions(tuple(todo), min(again, default=None))


def replaces(
    new: Generation | ModelSpec, old: Generation, outgoing: Callable[[Generation], bool]
) -> bool:
    """`new` comes instead of `old`: the same version, or `old` is of one that is on its way out."""
    spec = new.spec if isinstance(new, Generation) else new
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
        if need > self.ledger.capacity:
            return Refuse(gen, self.refusal(gen))
        if need <= self.free_soon:
            return []
        found = self.leave_for(gen)
        if found is not None:
            return [Evict(g, room_for=gen) for g in found]
        if gen.trigger not in MODEST and self.now < patience_until and need <= self.best_case(gen):
            return patience_until
        return Refuse(gen, self.refusal(gen))

    def leave_for(self, gen: Generation) -> list[Generation] | None:
        """Others first; failing that the model's own older generations too, if its config lets them.
        With `reload: replace` its own go first and others only if that is not enough."""
        need, own = gen.spec.bytes_needed, self.own(gen)
        others = [g for g in self.others(gen) if g.spec.model not in self.busy]
        if gen.trigger in MODEST and not own:
            others = []
        own_bytes = sum(g.reserved for g in own)
        if gen.spec.config.reload != "replace":
            found = victims(need, self.free_soon, others, now=self.now)
            if found is not None or not own or gen.spec.config.reload == "overlap":
                return found
        found = victims(need, self.free_soon + own_bytes, others, now=self.now)
        return None if found is None else own + found

    def own(self, gen: Generation) -> list[Generation]:
        return [g for g in self.ready if replaces(gen, g, self.outgoing)]

    def others(self, gen: Generation) -> list[Generation]:
        return [g for g in self.ready if g.spec.model != gen.spec.model]

    def best_case(self, gen: Generation) -> int:
        """Free bytes if everyone who is busy now came to rest. Loading ones are not counted on."""
        own = self.own(gen) if gen.spec.config.reload != "overlap" else []
        may = [g for g in self.others(gen) if not g.spec.config.pin] + own
        return self.free_soon + sum(g.reserved for g in may)

    def refusal(self, gen: Generation) -> NoRoomError:
        residents = {str(g): g.reserved for g in self.here}
        residents |= {str(g): g.spec.bytes_needed for g in self.coming}
        pinned = [str(g) for g in self.ready if g.spec.config.pin]
        return NoRoomError(
            f"'{gen.spec.model}' version {gen.spec.version} needs {human(gen.spec.bytes_needed)} on "
            f"{self.ledger.device}; {human(self.free)} of {human(self.ledger.capacity)} are free; "
            f"resident: {_largest(residents)}; pinned: {_some(sorted(pinned)) or 'none'}. Unload or "
            f"unpin one, or raise --memory-budget",
            needed=gen.spec.bytes_needed,
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
