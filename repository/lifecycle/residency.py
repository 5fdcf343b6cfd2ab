"""Which models leave when memory is short, and which have idled too long. Pure.

A model leaves as a whole, with all its versions: as long as one of them is in use, it stays. The one
exception is `give_way`: for requests that wait, one that is in use leaves too when its turn is over.
Those asleep are looked at one by one, and are the first to leave: nobody notices but the next who wakes
them.

`short` is bytes by device, "host" among them. Who frees nothing of what is short does not leave.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from repository.lifecycle.generation import Generation
from repository.lifecycle.states import RISING, State
from repository.lifecycle.worth import credit

PAUSE_S = 0.1  # between two requests of clients that ask one after the other

Model = list[Generation]  # the generations of one model that would leave together


@dataclass(frozen=True, slots=True)
class Moment:
    """`now`: the loop's clock; `clock`: that of `worth`. The others: see `turn_ends`."""

    now: float
    min_residency_s: float = 0.0
    clock: float = 0.0
    pays: bool = True


def victims(
    short: Mapping[str, int], residents: Iterable[Generation], at: Moment
) -> list[Generation] | None:
    """The generations to evict so that all that is short comes free.

    Those asleep first, then models past their TTL, then by priority (low first), then by credit
    (`worth`), then the longest unused; a member that the others make needless is given back, so no
    eviction is in vain. Returns [] when nothing has to go, None when even all of them would not be
    enough: then nobody is evicted, because an eviction that does not help is only an outage. Pinned and
    leased ones never leave, nor does anybody before `turn_ends`.
    """
    if all(n_bytes <= 0 for n_bytes in short.values()):
        return []
    return _enough(short, _idle(short, residents, at))


def give_way(
    short: Mapping[str, int], residents: Iterable[Generation], at: Moment
) -> list[Generation] | None:
    """As `victims`, for one that requests wait for: who is in use leaves too, after all that idle,
    then by priority (low first), then who has served the longest. Nobody leaves before `turn_ends`;
    pinned ones and those of which something is loading never do."""
    gens = list(residents)
    idle = _idle(short, gens, at)
    spared = {model[0].spec.model for model in idle if _serves(model[0])}
    spared |= {g.spec.model for g in gens if _loads(g) or g.pinned or _is_awaited(g)}
    busy: dict[str, Model] = {}
    for gen in gens:
        if _serves(gen) and gen.spec.model not in spared:
            busy.setdefault(gen.spec.model, []).append(gen)
    over = sorted((m for m in busy.values() if _turn_is_over(m, at)), key=_turn_rank)
    return _enough(short, [*idle, *over])


def _idle(short: Mapping[str, int], residents: Iterable[Generation], at: Moment) -> list[Model]:
    """Those that may leave now and free some of what is short, in the order in which they leave. (To
    rank one is most of what a decision costs; of many devices nearly all are elsewhere.)"""
    models = [
        model
        for model in _may_leave(residents)
        if any(_bytes(model, device) for device in short) and _turn_is_over(model, at)
    ]
    return sorted(models, key=lambda model: _rank(model, short, at))


def turn_ends(gen: Generation, at: Moment) -> float:
    """Until then nobody drives it out: it serves for `min_residency_s`, unless nobody has asked for it
    for PAUSE_S, for then its turn would be spent on nothing. Where it `pays` also at least as long as
    it took to load, so that of requests that take turns no more than half of the time goes into
    loading; whoever loads by call knows what that costs, and does not wait for it."""
    if gen.ready_at is None:
        return math.inf
    asked = gen.ready_at + at.min_residency_s
    if gen.leases == 0:
        asked = min(asked, gen.last_used + PAUSE_S)
    if at.pays:
        asked = max(asked, 2 * gen.ready_at - gen.admitted_at)
    serving = [user for user in gen.users if user.ready_at is not None]  # they would leave with it
    return max([asked, *(turn_ends(user, at) for user in serving)])


def next_turn(residents: Iterable[Generation], at: Moment) -> float | None:
    """The first moment after `now` at which a turn ends; None: no turn will."""
    ends = (turn_ends(g, at) for g in residents if _serves(g) and not g.pinned)
    return min((end for end in ends if at.now < end < math.inf), default=None)


def _turn_is_over(model: Model, at: Moment) -> bool:
    """One that idles longer than its own config lets it has nothing to be protected for."""
    if _is_asleep(model[0]) or _is_expired(model, at.now):
        return True
    return all(turn_ends(g, at) <= at.now for g in model)


def _turn_rank(model: Model) -> tuple[int, float, int]:
    ready = min(g.ready_at or 0.0 for g in model)
    return (max(_priority(g) for g in model), ready, min(g.serial for g in model))


def _enough(short: Mapping[str, int], models: Iterable[Model]) -> list[Generation] | None:
    """The first of `models` that free all that is short, without those they make needless."""
    rest = {device: n_bytes for device, n_bytes in short.items() if n_bytes > 0}
    chosen: list[Model] = []
    for model in models:
        if not any(n_bytes > 0 for n_bytes in rest.values()):
            break
        if any(rest[device] > 0 and _bytes(model, device) for device in rest):
            chosen.append(model)
            rest = {device: rest[device] - _bytes(model, device) for device in rest}
    if any(n_bytes > 0 for n_bytes in rest.values()):
        return None
    for model in list(chosen):
        if all(rest[device] + _bytes(model, device) <= 0 for device in rest):
            chosen.remove(model)
            rest = {device: rest[device] + _bytes(model, device) for device in rest}
    return [gen for model in chosen for gen in model]


def expired(
    residents: Iterable[Generation], *, now: float
) -> tuple[list[Generation], float | None]:
    """Those idle for their `ttl_s` or longer, and when the next one will be (None: nobody has one)."""
    over: list[Generation] = []
    ahead: list[float] = []
    for model in _may_leave(residents):
        at = _ttl_ends(model)
        if at is not None and at <= now:
            over += model
        elif at is not None:
            ahead.append(at)
    return over, min(ahead, default=None)


def in_use(generations: Iterable[Generation]) -> set[str]:
    """Models that may not leave now: pinned, leased, loading, or asked for by somebody who waits."""
    return {g.spec.model for g in generations if _stays(g)}


def _stays(gen: Generation) -> bool:
    if gen.retire_asked.is_set():
        return False
    if any(_stays(user) for user in gen.users):
        return True
    if gen.state in RISING:
        return gen.state is not State.QUEUED or gen.trigger.asked
    return gen.state is State.READY and (gen.leases > 0 or gen.pinned)


def _serves(gen: Generation) -> bool:
    return gen.state is State.READY and not gen.retire_asked.is_set()


def _is_asleep(gen: Generation) -> bool:
    return gen.state is State.ASLEEP and not gen.retire_asked.is_set()


def _loads(gen: Generation) -> bool:
    """It is in the middle of it; one that is only queued has cost nothing yet."""
    rising = gen.state in RISING and gen.state is not State.QUEUED
    return rising and not gen.retire_asked.is_set()


def _is_awaited(gen: Generation) -> bool:
    """An ensemble that somebody has asked for cannot load without it."""
    return any(_is_awaited(u) or (u.state in RISING and _stays(u)) for u in gen.users)


def _priority(gen: Generation) -> int:
    """It is as dear as what needs it."""
    return max([gen.spec.config.priority, *(_priority(user) for user in gen.users)])


def _may_leave(residents: Iterable[Generation]) -> list[Model]:
    gens = list(residents)
    staying = in_use(gens)
    models: dict[str, Model] = {}
    asleep: list[Model] = []
    for gen in gens:
        if _is_asleep(gen) and not gen.pinned:
            asleep.append([gen])
        elif _serves(gen):
            models.setdefault(gen.spec.model, []).append(gen)
    return asleep + [gens for name, gens in models.items() if name not in staying]


def _rank(
    model: Model, short: Mapping[str, int], at: Moment
) -> tuple[bool, bool, int, float, float, int]:
    return (
        not _is_asleep(model[0]),
        not _is_expired(model, at.now),
        max(_priority(g) for g in model),
        credit(model, short, at.clock),
        max(g.last_used for g in model),
        min(g.serial for g in model),
    )


def _is_expired(model: Model, now: float) -> bool:
    at = _ttl_ends(model)
    return at is not None and at <= now


def _ttl_ends(model: Model) -> float | None:
    """When the last of its versions will have idled too long; None: one of them may idle for ever."""
    ends = [g.last_used + ttl for g in model if (ttl := g.spec.config.ttl_s) is not None]
    return max(ends) if len(ends) == len(model) else None


def _bytes(model: Model, device: str) -> int:
    return sum(g.held.get(device, 0) for g in model)
