"""What is said to whom there is no room for: the numbers, and what can be done about them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from repository.errors import NoRoomError
from repository.lifecycle.placement import Placement
from repository.room import Room
from repository.sizes import human
from repository.spec import ModelSpec

NAMED = 8  # models that the text of a refusal names; all of them are in its data


def refusal(room: Room, spec: ModelSpec, options: Sequence[Placement]) -> NoRoomError:
    """Of the place where the least is missing."""
    where = min(options, key=lambda o: (not room.allows(spec, o), _missing(room, o)))
    device = max(where.needs, key=lambda d: where.needs[d] - room.free[d], default="")
    needed = where.needs.get(device, 0)
    residents = {str(g): n for g in room.holders if (n := g.held.get(device, 0))}
    coming = {str(g): n for g, to in room.coming if (n := to.needs.get(device, 0))}
    asleep = {str(g): n for g in room.asleep if (n := g.held.get(device, 0))}
    pinned = sorted(str(g) for g in room.ready if g.pinned and device in g.held)
    ledger = room.ledgers[device]
    why = _share(room, spec, device, needed) or _full(
        room, device, needed, residents | coming, asleep, pinned
    )
    places = {d for o in options for d in o.needs} - where.needs.keys()
    if places:
        why = f"{why} ({_free(room, sorted(places))})"
    return NoRoomError(
        f"'{spec.model}' version {spec.version} needs {_needs(where)}; {why}",
        needed=needed,
        free=room.free[device],
        device=device,
        residents=residents | coming,
        pinned=pinned,
        asleep=asleep,
        foreign=ledger.ceiling - ledger.usable,
    )


def _missing(room: Room, where: Placement) -> int:
    return sum(max(0, n - room.free[d]) for d, n in where.needs.items())


def _needs(where: Placement) -> str:
    return " and ".join(f"{human(n)} on {device}" for device, n in where.needs.items())


def _share(room: Room, spec: ModelSpec, device: str, needed: int) -> str:
    most, share = room.most(spec, device), spec.config.device_share
    if needed <= most or share is None:
        return ""
    return (
        f"its device_share of {share:g} is {human(most)} of {human(room.ledgers[device].capacity)}. "
        f"Raise device_share (gpu_memory_utilization), or make the model smaller"
    )


def _full(
    room: Room,
    device: str,
    needed: int,
    residents: Mapping[str, int],
    asleep: Mapping[str, int],
    pinned: Sequence[str],
) -> str:
    ledger = room.ledgers[device]
    parts = [
        f"{human(room.free[device])} of {human(ledger.capacity)} are free",
        f"resident: {_largest(residents)}",
    ]
    if asleep:
        parts.append(f"asleep: {_some(sorted(asleep))}")
    if ledger.usable < ledger.ceiling:
        parts.append(f"used by others than this server: {human(ledger.foreign)}")
    busy = [str(g) for g in room.ready if g.leases and device in g.held]
    loading = [str(g) for g in room.rising if device in g.held]
    for what, names in (("busy", busy), ("loading", loading)):
        if names:
            parts.append(f"{what}: {_some(sorted(names))}")
    parts.append(f"pinned: {_some(pinned) or 'none'}")
    if needed > ledger.capacity:
        return (
            f"{'; '.join(parts)}. It never fits: raise --memory-budget, or make the model smaller"
        )
    return f"{'; '.join(parts)}. Unload or unpin one, or raise --memory-budget"


def _free(room: Room, devices: Iterable[str]) -> str:
    return "nor is there room elsewhere: " + ", ".join(
        f"{human(room.free[d])} free on {d}" for d in devices
    )


def _largest(residents: Mapping[str, int]) -> str:
    by_size = sorted(residents.items(), key=lambda r: (-r[1], r[0]))
    return _some([f"{name} {human(n_bytes)}" for name, n_bytes in by_size]) or "nothing"


def _some(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
