"""Which models leave when memory is short, and which have idled too long. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from repository.lifecycle.generation import Generation
from repository.lifecycle.states import State


def victims(
    need: int, free: int, residents: Iterable[Generation], *, now: float
) -> list[Generation] | None:
    """The idle generations to evict so that `need - free` bytes come free. All sizes in bytes.

    First those past their TTL, then by priority (low first), then the longest unused; a member that
    the others make needless is given back, so no eviction is in vain. Returns [] when nothing has to
    go, None when even all of them would not be enough: then nobody is evicted, because an eviction
    that does not help is only an outage. Pinned and leased ones never leave.
    """
    short = need - free
    if short <= 0:
        return []
    chosen: list[Generation] = []
    for gen in sorted(
        (g for g in residents if _may_leave(g)),
        key=lambda g: (not _past_ttl(g, now), g.spec.config.priority, g.last_used, g.serial),
    ):
        chosen.append(gen)
        short -= gen.reserved
        if short <= 0:
            break
    if short > 0:
        return None
    for gen in list(chosen):
        if short + gen.reserved <= 0:
            chosen.remove(gen)
            short += gen.reserved
    return chosen


def expired(
    residents: Iterable[Generation], *, now: float
) -> tuple[list[Generation], float | None]:
    """Those idle for their `ttl_s` or longer, and when the next one will be (None: nobody has one)."""
    timed = [g for g in residents if _may_leave(g) and g.spec.config.ttl_s is not None]
    over = [g for g in timed if _past_ttl(g, now)]
    ahead = [g.last_used + (g.spec.config.ttl_s or 0.0) for g in timed if g not in over]
    return over, min(ahead, default=None)


def _may_leave(gen: Generation) -> bool:
    return (
        gen.state is State.READY
        and not gen.leases
        and not gen.retire_asked.is_set()
        and not gen.spec.config.pin
    )


def _past_ttl(gen: Generation, now: float) -> bool:
    ttl_s = gen.spec.config.ttl_s
    return ttl_s is not None and now >= gen.last_used + ttl_s
