"""Which models leave when memory is short, and which have idled too long. Pure.

A model leaves as a whole, with all its versions: as long as one of them is in use, it stays. The one
exception is `give_way`: for requests that wait, one that is in use leaves too when its turn is over.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from repository.lifecycle.generation import Generation
from repository.lifecycle.states import RISING, State

PAUSE_S = 0.1  # between two requests of clients that ask one after the other

Model = list[Generation]  # the generations of one model that would leave together


def victims(
    need: int, free: int, residents: Iterable[Generation], *, now: float
) -> list[Generation] | None:
    """The idle generations to evict so that `need - free` bytes come free. All sizes in bytes.

    First models past their TTL, then by priority (low first), then the longest unused; a member that
    the others make needless is given back, so no eviction is in vain. Returns [] when nothing has to
    go, None when even all of them would not be enough: then nobody is evicted, because an eviction
    that does not help is only an outage. Pinned and leased ones never leave.
    """
    return _enough(need - free, sorted(_may_leave(residents), key=lambda m: _rank(m, now)))


def give_way(
    need: int, free: int, residents: Iterable[Generation], *, now: float, min_residency_s: float
) -> list[Generation] | None:
    """As `victims`, for one that requests wait for: who is in use leaves too, after all that idle,
    then by priority (low first), then who has served the longest. Nobody leaves before `turn_ends`;
    pinned ones and those of which something is loading never do."""
    gens = list(residents)
    idle = {model[0].spec.model for model in _may_leave(gens)}
    staying = {g.spec.model for g in gens if _loads(g) or g.spec.config.pin}
    models: dict[str, Model] = {}
    for gen in gens:
        if _serves(gen) and gen.spec.model not in staying:
            models.setdefault(gen.spec.model, []).append(gen)
    over = [m for m in models.values() if _turn_is_over(m, now, min_residency_s)]
    over.sort(key=lambda m: (m[0].spec.model not in idle, *_turn_rank(m, idle, now)))
    return _enough(need - free, over)


def turn_ends(gen: Generation, min_residency_s: float) -> float:
    """Until then nobody's requests drive it out: it serves at least as long as it took to load, so that
    no more than half of the time goes into loading; and `min_residency_s`, unless nobody has asked for
    it for PAUSE_S, for then its turn would be spent on nothing."""
    if gen.ready_at is None:
        return math.inf
    paid = gen.ready_at + (gen.ready_at - gen.admitted_at)
    asked = gen.ready_at + min_residency_s
    if gen.leases == 0:
        asked = min(asked, gen.last_used + PAUSE_S)
    return max(paid, asked)


def next_turn(
    residents: Iterable[Generation], *, now: float, min_residency_s: float
) -> float | None:
    """The first moment after `now` at which a turn ends; None: no turn will."""
    ends = (turn_ends(g, min_residency_s) for g in residents if _serves(g))
    return min((at for at in ends if now < at < math.inf), default=None)


def _turn_is_over(model: Model, now: float, min_residency_s: float) -> bool:
    return all(turn_ends(g, min_residency_s) <= now for g in model)


def _turn_rank(model: Model, idle: set[str], now: float) -> tuple[bool, int, float, int]:
    if model[0].spec.model in idle:
        return _rank(model, now)
    ready = min(g.ready_at or 0.0 for g in model)
    return (True, max(g.spec.config.priority for g in model), ready, min(g.serial for g in model))


def _enough(short: int, models: Iterable[Model]) -> list[Generation] | None:
    """The first of `models` that free `short` bytes together, without those they make needless."""
    if short <= 0:
        return []
    chosen: list[Model] = []
    for model in models:
        chosen.append(model)
        short -= _bytes(model)
        if short <= 0:
            break
    if short > 0:
        return None
    for model in list(chosen):
        if short + _bytes(model) <= 0:
            chosen.remove(model)
            short += _bytes(model)
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
    if gen.state in RISING:
        return gen.state is not State.QUEUED or gen.trigger.asked
    return gen.state is State.READY and (gen.leases > 0 or gen.spec.config.pin)


def _serves(gen: Generation) -> bool:
    return gen.state is State.READY and not gen.retire_asked.is_set()


def _loads(gen: Generation) -> bool:
    """It is in the middle of it; one that is only queued has cost nothing yet."""
    rising = gen.state in RISING and gen.state is not State.QUEUED
    return rising and not gen.retire_asked.is_set()


def _may_leave(residents: Iterable[Generation]) -> list[Model]:
    gens = list(residents)
    staying = in_use(gens)
    models: dict[str, Model] = {}
    for gen in gens:
        if _serves(gen):
            models.setdefault(gen.spec.model, []).append(gen)
    return [gens for name, gens in models.items() if name not in staying]


def _rank(model: Model, now: float) -> tuple[bool, int, float, int]:
    at = _ttl_ends(model)
    return (
        at is None or at > now,
        max(g.spec.config.priority for g in model),
        max(g.last_used for g in model),
        min(g.serial for g in model),
    )


def _ttl_ends(model: Model) -> float | None:
    """When the last of its versions will have idled too long; None: one of them may idle for ever."""
    ends = [g.last_used + ttl for g in model if (ttl := g.spec.config.ttl_s) is not None]
    return max(ends) if len(ends) == len(model) else None


def _bytes(model: Model) -> int:
    return sum(g.reserved for g in model)
