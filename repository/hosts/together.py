"""What the workers of one generation say, as one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce

import msgspec

from repository.adapters.orders import AdapterReport, Residence
from repository.messages import Loaded

NEARNESS: tuple[Residence, ...] = ("registered", "host", "device")


def loaded(each: Sequence[Loaded], pids: Sequence[int] = ()) -> Loaded:
    """All have loaded the same; only what they hold is summed. `details` are of one."""
    details = {k: v for k, v in each[0].details.items() if k != "pid"}
    if pids:
        details["pids"] = list(pids)
    return msgspec.structs.replace(each[0], memory=summed(e.memory for e in each), details=details)


def summed(parts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in parts:
        for kind, size in part.items():
            total[kind] = total.get(kind, 0) + size
    return total


def answers(each: Iterable[Sequence[AdapterReport]]) -> list[AdapterReport]:
    """To the same orders: the error is the first that any worker has, the residence the nearest to
    the model that it has anywhere."""
    return [reduce(_both, same) for same in zip(*each, strict=True)]


def whereabouts(each: Iterable[Sequence[AdapterReport]]) -> list[AdapterReport]:
    """As `answers`, of all that any of them knows, by name."""
    found: dict[str, AdapterReport] = {}
    for report in (report for of in each for report in of):
        before = found.get(report.name)
        found[report.name] = report if before is None else _both(before, report)
    return list(found.values())


def _both(one: AdapterReport, other: AdapterReport) -> AdapterReport:
    return AdapterReport(
        one.name,
        one.error or other.error,
        max(one.residence, other.residence, key=NEARNESS.index),
        max(one.rank, other.rank),
        max(one.bytes, other.bytes),
    )
