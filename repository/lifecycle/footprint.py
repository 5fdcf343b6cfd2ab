"""How much of a device a generation has, as far as that can be known, and what others have of it.

Workers are asked now and then, and the driver tells the moment: while a load or an unload is under way
neither says how far it has come. So what one has is told as bounds, and what follows from them is too:
whoever compares two moments learns what is sure, and no more.

A driver may tell what each process has. Its numbers of processes are the machine's: in a container they
are others than ours, so they count only where all of a generation's are found, with figures that can be.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from repository.lifecycle.generation import Generation
from repository.lifecycle.states import HOLDS_MEMORY, State

MOVING = frozenset(HOLDS_MEMORY - {State.READY, State.ASLEEP})  # some of it may not be there (yet)
CREDIBLE = 0.5  # of what the workers said: a process that has less is another one
NOBODY: Mapping[int, int] = MappingProxyType({})


class Bounds(NamedTuple):
    """Bytes."""

    least: int
    most: int

    def plus(self, other: Bounds) -> Bounds:
        return Bounds(self.least + other.least, self.most + other.most)


NOTHING = Bounds(0, 0)


def has(gen: Generation, device: str, told: Mapping[int, int] = NOBODY) -> Bounds:
    """`told`: process -> bytes, as the device's driver says."""
    elsewhere = device not in gen.held and device not in gen.measured
    if elsewhere or gen.state not in HOLDS_MEMORY:
        return NOTHING
    exact = by_process(gen, device, told)
    if exact is not None:
        return Bounds(exact, exact)
    held, measured = gen.held.get(device, 0), said(gen, device)
    if gen.state in MOVING or not gen.measured:
        return Bounds(0, max(held, measured))
    return Bounds(measured, measured)


def all_have(gens: Iterable[Generation], device: str, told: Mapping[int, int] = NOBODY) -> Bounds:
    total = NOTHING
    for gen in gens:
        found = has(gen, device, told)
        if found is not NOTHING:  # nearly all of a large repository are elsewhere
            total = total.plus(found)
    return total


def within_reserved(
    gens: Iterable[Generation], device: str, told: Mapping[int, int] = NOBODY
) -> Bounds:
    """As `all_have`, without what anybody has beyond what it reserved: that is in nobody's books."""
    total = NOTHING
    for gen in gens:
        if held := gen.held.get(device, 0):
            least, most = has(gen, device, told)
            total = total.plus(Bounds(min(least, held), min(most, held)))
    return total


def said(gen: Generation, device: str) -> int:
    """Bytes of the device, as its workers said last."""
    kinds = gen.measured.get(device)
    return sum(kinds.values()) if kinds else 0


def processes(gen: Generation, device: str) -> tuple[int, ...]:
    """Of its workers, those that are placed on that device. None before it is loaded."""
    pids = gen.loaded.details.get("pids", ()) if gen.loaded is not None else ()
    devices = gen.chosen.devices
    if len(pids) != len(devices):
        return ()
    return tuple(pid for pid, where in zip(pids, devices, strict=True) if where == device)


def by_process(gen: Generation, device: str, told: Mapping[int, int]) -> int | None:
    """What the driver says that its processes have; None: not told of all of them, or of others."""
    if not told:
        return None
    pids = processes(gen, device)
    if not pids or not all(pid in told for pid in pids):
        return None
    total = sum(told[pid] for pid in pids)
    return total if total >= CREDIBLE * said(gen, device) else None


def foreign(used: int, ours: Bounds, before: int) -> int:
    """What is used beyond `ours`, never below 0. Between what is possible it stays at what it was
    `before`: a load under way must not look like somebody else's memory coming and going."""
    least, most = max(0, used - ours.most), max(0, used - ours.least)
    return min(max(before, least), most)
