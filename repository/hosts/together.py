"""What the workers of one generation say, as one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce

import msgspec

from repository.adapters.orders import AdapterReport, Residence
from repository.lifecycle.placement import HOST, Memory, summed
from repository.messages import Loaded

HERE = ("cpu", HOST)  # both are memory of the machine
NEARNESS: tuple[Residence, ...] = ("registered", "host", "device")


def loaded(each: Sequence[Loaded], pids: Sequence[int] = ()) -> Loaded:
    """All have loaded the same; only what they hold is summed. `details` are of one."""
    details = {k: v for k, v in each[0].details.items() if k != "pid"}
    if pids:
        details["pids"] = list(pids)
    return msgspec.structs.replace(each[0], memory=summed(e.memory for e in each), details=details)


def with_the_rest(known: Memory, resident: int) -> Memory:
    """One worker's memory: what its backend knows, and of the CPU what it has beside that, so that what
    lies there and what sleeps there are together what the process has (`resident`)."""
    found = {device: dict(kinds) for device, kinds in known.items()}
    left = resident
    for device in HERE:
        for kind, size in found.get(device, {}).items():
            found[device][kind] = taken = min(size, left)
            left -= taken
    cpu = found.setdefault("cpu", {})
    cpu["workspace"] = cpu.get("workspace", 0) + left
    return found


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
