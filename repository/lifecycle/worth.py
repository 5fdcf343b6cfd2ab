"""How dear a model is to those who look for somebody to evict: GreedyDual-Size. Pure.

    credit = the clock at its last use + seconds to bring it back / bytes that it frees

The lowest credit leaves first, and the clock rises to it. So what was not used for long falls behind as
others come and go, however dear it is, and of two that were used alike the one leaves that is back
sooner for what it frees. (P. Cao and S. Irani, "Cost-Aware WWW Proxy Caching Algorithms", 1997.)

Costs per byte are rounded down to powers of two: between near equals the one that was not used for
longer leaves, and not the one whose load happened to be measured a little faster.

A use costs nothing here: the clock stands still between two evictions, so it is enough to look at
`last_used` just before it moves (`settle`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping

from repository.lifecycle.generation import Generation
from repository.lifecycle.placement import NO_CREDIT, Credit
from repository.lifecycle.states import State

GIB = 1 << 30
LOAD_S = 0.5  # of a load whose time is not known: a process, its imports
LOAD_BYTES_PER_S = 1 << 30  # and its reading
WAKE_S = 0.05
WAKE_BYTES_PER_S = 8 << 30  # host memory to a device
LEAST_S = 2.0  # of quick ones the time says more about what else ran than about the model


def seconds_back(gen: Generation) -> float:
    """Until it would serve again, had it left: as its load was measured, else by its bytes."""
    n_bytes = sum(gen.chosen.needs.values())
    took_s = 0.0 if gen.ready_at is None else gen.ready_at - gen.admitted_at
    if may_sleep(gen):
        took_s = WAKE_S + n_bytes / WAKE_BYTES_PER_S
    elif took_s <= 0:
        took_s = LOAD_S + n_bytes / LOAD_BYTES_PER_S
    return max(LEAST_S, took_s)


def may_sleep(gen: Generation) -> bool:
    """Driven out it would fall asleep, if the tier had a place for it: its host can, and its config
    says so (auto: what is on a GPU)."""
    config = gen.spec.config
    if gen.loaded is None or "sleep" not in gen.loaded.abilities or config.evict_to == "disk":
        return False
    return config.evict_to == "host" or any(d != "cpu" for d in gen.chosen.devices)


def settled(gen: Generation, clock: float) -> Credit:
    """Its credit, with its uses since the clock moved last."""
    if gen.credit is not NO_CREDIT and gen.last_used <= gen.credit.at:
        return gen.credit
    return Credit(clock, gen.last_used)


def settle(generations: Iterable[Generation], clock: float) -> None:
    """Just before the clock moves."""
    for gen in generations:
        if gen.state in (State.READY, State.ASLEEP):
            gen.credit = settled(gen, clock)


def credit(model: Collection[Generation], devices: Mapping[str, int], clock: float) -> float:
    """Of generations that would leave together, to somebody who is short on these devices."""
    size = sum(gen.held.get(device, 0) for gen in model for device in devices)
    cost = sum(seconds_back(gen) for gen in model)
    return max(settled(gen, clock).clock for gen in model) + per_byte(cost, size)


def per_byte(cost_s: float, size: int) -> float:
    """Seconds for each GiB, rounded down to a power of two. What frees nothing is beyond price."""
    if size <= 0:
        return math.inf
    return float(2.0 ** math.floor(math.log2(cost_s * GIB / size)))
