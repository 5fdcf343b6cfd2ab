"""Where a generation may go, what it needs there, and what it has there. Plain words; nothing decides.

Bytes are always told by device, as the ledgers are called: "cpu", "cuda:0", and "host" for the tier of
host memory in which models sleep.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

HOST = "host"  # the ledger of those who sleep

Bytes: TypeAlias = Mapping[str, int]  # device -> bytes
Memory: TypeAlias = dict[str, dict[str, int]]  # device -> kind -> bytes
NOTHING: Bytes = MappingProxyType({})


def summed(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Key by key: kinds, or devices."""
    total: dict[str, int] = {}
    for part in parts:
        for key, n_bytes in part.items():
            total[key] = total.get(key, 0) + n_bytes
    return total


def by_kind(memory: Memory) -> dict[str, int]:
    """Of all devices together."""
    return summed(memory.values())


def all_memory(parts: Iterable[Memory]) -> Memory:
    total: Memory = {}
    for part in parts:
        for device, kinds in part.items():
            total[device] = summed([total.get(device, {}), kinds])
    return total


class Placement(NamedTuple):
    """`devices`: one for each instance. `needs`: for all of them together. `source`: how that is known:
    config, measured (remembered of an earlier load), estimate."""

    devices: tuple[str, ...] = ()
    needs: Bytes = NOTHING
    source: str = "estimate"


NOWHERE = Placement()


class Credit(NamedTuple):
    """GreedyDual-Size (`lifecycle.worth`): where the clock stood at its last use, and when that was. Its
    cost per byte is added where it is compared, for that depends on the device that is short."""

    clock: float = 0.0
    at: float = 0.0


NO_CREDIT = Credit()
