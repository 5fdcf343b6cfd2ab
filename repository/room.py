"""The devices as the queue for memory sees them at one moment: who fits where, who would have to leave.

Pure: it is made for one decision, and what that decision gives away is taken off here first, so nothing
is promised twice. Bytes, by device. A model takes all that it needs of several devices or nothing.

    free     nobody holds it
    soon     the same, once those who are leaving have left
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

from repository.lifecycle.generation import Generation, Trigger
from repository.lifecycle.ledger import MemoryLedger
from repository.lifecycle.placement import NOTHING, Bytes, Placement
from repository.lifecycle.residency import Moment, give_way, in_use, next_turn, victims
from repository.lifecycle.states import HOLDS_MEMORY, LEAVING, RISING, State
from repository.lifecycle.worth import seconds_back
from repository.spec import ModelSpec

Outgoing = Callable[[Generation], bool]


class Clearing(NamedTuple):
    """Who leaves so that a model can go there; nobody: what is leaving already is enough."""

    placement: Placement
    leave: list[Generation]


def modest(gen: Generation) -> bool:
    """Nobody has asked for it at this moment (or nobody waits for it any more): it takes room that is
    free and evicts nobody."""
    return gen.trigger not in (Trigger.WATCH, Trigger.API)


def replaces(spec: ModelSpec, old: Generation, outgoing: Outgoing) -> bool:
    """`spec` comes instead of `old`: the same version, or `old` is of one that is on its way out."""
    if spec.model != old.spec.model:
        return False
    return spec.version == old.spec.version or outgoing(old)


class Room:
    """`outgoing`: is it of a version that serves only until a wanted one does? `demanded`: models that
    requests wait for."""

    def __init__(
        self,
        ledgers: Mapping[str, MemoryLedger],
        residents: Iterable[Generation],
        queue: Sequence[Generation],
        outgoing: Outgoing,
        at: Moment,
        demanded: Collection[str] = (),
    ) -> None:
        self.ledgers = ledgers
        self.queue = queue
        self.outgoing = outgoing
        self.at = at
        self.demanded = demanded
        self.holders = [g for g in residents if g.state in HOLDS_MEMORY]
        self.leaving = {g for g in self.holders if _leaves(g)}
        self.ready = [g for g in self.holders if g.state is State.READY and not _leaves(g)]
        self.rising = [g for g in self.holders if g.state in RISING and not _leaves(g)]
        self.asleep = [g for g in self.holders if g.state is State.ASLEEP and not _leaves(g)]
        self.coming: list[tuple[Generation, Placement]] = []  # admitted in the same breath
        self.free = {device: ledger.free for device, ledger in ledgers.items()}
        self.soon = {device: of.usable - of.held for device, of in ledgers.items()}
        for gen in self.leaving:
            _add(self.soon, gen.held)

    # what it gives away ---------------------------------------------------------------------------

    def take(self, gen: Generation, where: Placement) -> None:
        sleeper = self.waking(gen, where)
        lacks = self.lacks(gen, where)
        self.coming.append((gen, where))
        for device, n_bytes in lacks.items():
            self.free[device] -= n_bytes
            self.soon[device] -= n_bytes
        if sleeper is not None:
            self.asleep.remove(sleeper)

    def leave(self, gens: Iterable[Generation]) -> None:
        for gen in gens:
            (self.asleep if gen.state is State.ASLEEP else self.ready).remove(gen)
            self.leaving.add(gen)
            _add(self.soon, gen.held)

    # where it may go ------------------------------------------------------------------------------

    def choices(self, gen: Generation) -> list[Placement]:
        """Those of its options that it would fit into, were they empty. One that wakes a sleeper goes
        where that sleeps, if there is room or will be without a busy one leaving; else wherever there
        is."""
        found = [o for o in gen.options if self.allows(gen.spec, o)]
        sleeper = self.waking(gen)
        if sleeper is None or not self.ever(gen.spec, sleeper.placement, gen=gen):
            return found
        there = sleeper.placement
        waits = self.is_demanded(gen) or not modest(gen)  # for the turns of others to end
        if self.clearing(gen, [there], Moment(math.inf) if waits else self.at) is not None:
            return [there]
        return [there, *(o for o in found if o != there)]

    def waking(self, gen: Generation, where: Placement | None = None) -> Generation | None:
        """The sleeper that it takes over (if it goes there)."""
        sleeper = gen.wakes
        if sleeper is None or sleeper not in self.asleep:
            return None
        return sleeper if where is None or where == sleeper.placement else None

    def allows(self, spec: ModelSpec, where: Placement) -> bool:
        """Its config and the budgets do."""
        return all(n <= self.most(spec, device) for device, n in where.needs.items())

    def most(self, spec: ModelSpec, device: str) -> int:
        """What its config lets it need of the device."""
        return self.ledgers[device].most(spec.config.device_share)

    def lacks(self, gen: Generation, where: Placement) -> dict[str, int]:
        """What it needs there and does not hold already, asleep."""
        sleeper = self.waking(gen, where)
        has: Bytes = NOTHING if sleeper is None else sleeper.held
        return {device: max(0, n - has.get(device, 0)) for device, n in where.needs.items()}

    def best_fit(self, gen: Generation, choices: Iterable[Placement]) -> Placement | None:
        """Where it fits now and the least is left over on the tightest device, so that large holes stay
        for large models. GPUs before the CPU, spread before together."""
        found: list[tuple[tuple[bool, int, int, int], Placement]] = []
        for index, where in enumerate(choices):
            lacks = self.lacks(gen, where)
            left = min((self.free[d] - n for d, n in lacks.items()), default=0)
            if left >= 0:
                found.append(((*_class(where), left, index), where))
        return min(found, key=lambda f: f[0])[1] if found else None

    # who leaves for it ----------------------------------------------------------------------------

    def clearing(
        self, gen: Generation, choices: Iterable[Placement], at: Moment | None = None
    ) -> Clearing | None:
        """The one of them for which it costs least to make room; None: for none it can be made now.
        `at`: if it were then."""
        found: list[tuple[tuple[bool, int, float, float, bool, int, int], Clearing]] = []
        for index, where in enumerate(choices):
            leave = self.leave_for(gen, where, at or self.at)
            if leave is not None:
                price = (*self._price(gen, leave), *_class(where), index)
                found.append((price, Clearing(where, leave)))
        return min(found, key=lambda f: f[0])[1] if found else None

    def _price(self, gen: Generation, leave: list[Generation]) -> tuple[bool, int, float, float]:
        """A gap of its own, requests that are in flight, priority, seconds to bring the others back."""
        others = [g for g in leave if g.spec.model != gen.spec.model and g.state is State.READY]
        gap = any(g.spec.model == gen.spec.model and g.state is State.READY for g in leave)
        return (
            gap and gen.spec.config.reload != "replace",
            sum(g.leases > 0 for g in others),
            max((g.spec.config.priority for g in others), default=-math.inf),
            sum(seconds_back(g) for g in others),
        )

    def leave_for(self, gen: Generation, where: Placement, at: Moment) -> list[Generation] | None:
        """Others first; failing that the model's own older generations too, if its config lets them.
        With `reload: replace` its own go first and others only if that is not enough."""
        short = _short(self.lacks(gen, where), self.soon)
        own = [g for g in self.own(gen.spec) if any(g.held.get(device) for device in short)]
        if gen.spec.config.reload != "replace":
            found = self._others_leave(gen, short, at)
            if found is not None or not own or gen.spec.config.reload == "overlap":
                return found
        rest = dict(short)
        for old in own:
            rest = {device: n - old.held.get(device, 0) for device, n in rest.items()}
        found = self._others_leave(gen, rest, at)
        return None if found is None else own + found

    def _others_leave(self, gen: Generation, short: Bytes, at: Moment) -> list[Generation] | None:
        ahead = itertools.takewhile(lambda g: g is not gen, self.queue)
        called = [gen.wakes, *(g.wakes for g in ahead if self._is_asked(g))]
        sleepers = [g for g in self.asleep if g not in called]
        others = [g for g in self.others(gen) if g.spec.model not in self._busy]
        if modest(gen) and (self.is_demanded(gen) or not self.own(gen.spec)):
            others = []
        found = victims(short, [*sleepers, *others], self._for(gen, at))
        if found is not None or not self.is_demanded(gen):
            return found
        staying = [g for g in self.holders if g not in self.leaving]
        awake = [
            g for g in staying if g.spec.model != gen.spec.model and g.state is not State.ASLEEP
        ]
        return give_way(short, [*sleepers, *awake], at)

    @cached_property
    def _busy(self) -> set[str]:
        return in_use([*self.holders, *self.queue])

    def _is_asked(self, gen: Generation) -> bool:
        return gen.trigger.asked or self.is_demanded(gen)

    def is_demanded(self, gen: Generation) -> bool:
        return gen.spec.model in self.demanded

    def own(self, spec: ModelSpec) -> list[Generation]:
        return [g for g in self.ready if replaces(spec, g, self.outgoing)]

    def others(self, gen: Generation) -> list[Generation]:
        return [g for g in self.ready if g.spec.model != gen.spec.model]

    # what may come of waiting ---------------------------------------------------------------------

    def in_time(self, gen: Generation, where: Placement) -> bool:
        """It would fit if everyone who is busy or loading now came to rest, and what others than us use
        were given back."""
        own = self.own(gen.spec) if gen.spec.config.reload != "overlap" else []
        sleepers = [g for g in self.asleep if g is not gen.wakes]
        rising = [g for g in self.rising if g.spec.model != gen.spec.model]
        may = [g for g in [*self.others(gen), *sleepers, *rising] if not g.pinned] + own
        room = {d: self.soon[d] + self._foreign(d) for d in where.needs}
        for other in may:
            _add(room, other.held)
        return not _short(self.lacks(gen, where), room)

    def ever(self, spec: ModelSpec, where: Placement, gen: Generation | None = None) -> bool:
        """It would fit once every other model has had its turn and left, but for those that are pinned,
        and for its own versions, which stay beside it."""
        if not self.allows(spec, where):
            return False
        own = self.own(spec) if spec.config.reload != "overlap" else []
        wakes = None if gen is None else self.waking(gen, where)
        room = {d: self.ledgers[d].ceiling for d in where.needs}
        for old in self.holders:
            is_own = old.spec.model == spec.model
            beside = is_own and old in self.ready and old not in own
            pinned = old.pinned and not is_own and old not in self.leaving
            if (beside or pinned) and old is not wakes:
                _add(room, {device: -n for device, n in old.held.items()})
        return not _short(where.needs, room)

    def after_turns(self, gen: Generation, choices: Iterable[Placement]) -> bool:
        """Room can be made as soon as those who idle now have served their turn."""
        return self.clearing(gen, choices, Moment(math.inf)) is not None

    def next_turn(self, gen: Generation, choices: Iterable[Placement]) -> float | None:
        """When the next of those who are there has served its turn."""
        devices = {device for where in choices for device in where.needs}
        there = [g for g in self.others(gen) if not devices.isdisjoint(g.held)]
        return next_turn(there, self._for(gen, self.at))

    def _for(self, gen: Generation, at: Moment) -> Moment:
        """Loads are paid back only where requests take turns."""
        return replace(at, pays=self.is_demanded(gen))

    def _foreign(self, device: str) -> int:
        ledger = self.ledgers[device]
        return ledger.ceiling - ledger.usable


def _leaves(gen: Generation) -> bool:
    return gen.state in LEAVING or gen.retire_asked.is_set()


def _class(where: Placement) -> tuple[bool, int]:
    return "cpu" in where.devices, -len(set(where.devices))


def _short(needs: Bytes, room: Bytes) -> dict[str, int]:
    return {d: n - room[d] for d, n in needs.items() if n > room[d]}


def _add(room: dict[str, int], held: Bytes) -> None:
    for device, n_bytes in held.items():
        if device in room:
            room[device] += n_bytes
