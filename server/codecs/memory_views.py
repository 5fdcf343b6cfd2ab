"""What is told of a model's memory: what it was thought to need, what it holds of the ledgers, what its
workers say that they use. Bytes; devices as the ledgers are called ("cpu", "cuda:0", "host").
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from repository.lifecycle.generation import Generation
from repository.lifecycle.placement import Placement, by_kind
from repository.lifecycle.states import HOLDS_MEMORY, TERMINAL, State
from repository.lifecycle.status import ModelStatus


class DeviceMemory(msgspec.Struct):
    """On one device. `measured`: by kind (weights, kv, adapters, workspace, context)."""

    reserved: int = 0
    measured: dict[str, int] = msgspec.field(default_factory=dict)


class MemoryView(msgspec.Struct):
    """`estimated`: before the load, of what runs (else of what would be loaded), and its `source`:
    config, measured (of an earlier load), estimate. `reserved`: held in the ledgers; `measured`: as the
    workers reported, by kind. `devices`: the last two by device; of what sleeps, "host"."""

    estimated: int
    source: str
    reserved: int
    measured: dict[str, int]
    devices: dict[str, DeviceMemory]


def memory_of(status: ModelStatus, expected: Placement | None) -> MemoryView:
    """Of all generations that live. `expected`: of what would be loaded, where none does."""
    alive = [gen for gen in status.generations if gen.state not in TERMINAL]
    counted = [gen for gen in alive if gen.state is not State.ASLEEP] or alive
    if counted:
        sources = {gen.chosen.source for gen in counted}
        source = sources.pop() if len(sources) == 1 else "estimate"
        return _view(sum(gen.needed for gen in counted), source, alive)
    if expected is None:
        return _view(0, "estimate", ())
    return _view(sum(expected.needs.values()), expected.source, ())


def memory_of_one(gen: Generation) -> MemoryView:
    holds = (gen,) if gen.state in HOLDS_MEMORY else ()
    found = _view(gen.needed, gen.chosen.source, holds)
    found.measured = by_kind(gen.measured)  # of one that has ended, as it was last
    return found


def _view(estimated: int, source: str, gens: Iterable[Generation]) -> MemoryView:
    found = MemoryView(estimated, source, 0, {}, {})
    for gen in gens:
        found.reserved += gen.reserved
        for device, n_bytes in gen.held.items():
            found.devices.setdefault(device, DeviceMemory()).reserved += n_bytes
        for device, kinds in gen.measured.items():
            here = found.devices.setdefault(device, DeviceMemory()).measured
            for kind, n_bytes in kinds.items():
                here[kind] = here.get(kind, 0) + n_bytes
                found.measured[kind] = found.measured.get(kind, 0) + n_bytes
    return found
