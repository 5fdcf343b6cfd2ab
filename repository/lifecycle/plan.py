"""From what is wanted of one model and what runs of it to what to do next.

`plan` is pure: same arguments, same answer, no I/O, no clock of its own. It is asked again after every
change, so it only proposes the next step and never has to remember what it proposed before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from repository.errors import (
    ComposingModelError,
    FilesChangedError,
    NoDiskError,
    NoRoomError,
    WorkerDiedError,
)
from repository.lifecycle.generation import Generation
from repository.lifecycle.states import RISING, TERMINAL, State
from repository.lifecycle.wishes import Wanted
from repository.spec import ModelSpec

STABLE_S = 60.0  # a generation that served this long had not been the cause of its restart
BACKOFF_S = 0.5  # the second restart in a row waits this long, each further one twice as long
BACKOFF_MAX_S = 30.0
REST_S = 2.0  # after files that changed under a load: time for a scan to see what they are now
REFUSED_S = 0.1  # after a refusal: where `fits` is mistaken, the loop does not spin
LONGEST_ROW = 8  # crashes that are told apart; the wait is at its longest by then
PASSING = (WorkerDiedError, FilesChangedError, NoDiskError)  # may be gone at the next try
NOTHING: Mapping[int, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Start:
    wanted: Wanted


@dataclass(frozen=True, slots=True)
class Retire:
    serial: int
    why: str


@dataclass(frozen=True, slots=True)
class Plan:
    """`again_at`: ask again then, on the clock that `now` came from; None: only after a change."""

    retire: tuple[Retire, ...] = ()
    start: tuple[Start, ...] = ()
    again_at: float | None = None


@dataclass(frozen=True, slots=True)
class Footing:
    """What an ensemble stands on: the models of its steps. `why` they cannot carry it, and with what the
    first of them failed; "": all serve and fit together, or (`coming`) some are on their way."""

    coming: bool = False
    why: str = ""
    error: BaseException | None = None

    @property
    def firm(self) -> bool:
        return not self.coming and not self.why


FIRM = Footing()


@dataclass(frozen=True, slots=True)
class Fallback:
    """What served until it left for a newer one, `heir`'s version, that does not serve yet."""

    wanted: Wanted
    heir: int


def plan(
    wanted: Mapping[int, Wanted],
    generations: Iterable[Generation],
    *,
    now: float,
    crash_limit: int = 3,
    fits: Callable[[ModelSpec], bool] = lambda spec: True,
    resting: Mapping[int, Wanted] = NOTHING,
    fallback: Mapping[int, Fallback] = NOTHING,
    footing: Callable[[ModelSpec], Footing] = lambda spec: FIRM,
) -> Plan:
    """The next step for one model. `wanted` and the versions of `generations` belong to that model.
    `resting`: what may be asleep of it; `fallback`: by its version; `footing`: of an ensemble.

    Guarantees:
    - a READY generation is retired only once a newer READY one of its version exists, or its version
      is no longer wanted and every version that is wanted serves, or the model is not wanted at all;
    - at most one generation of a version is rising;
    - what failed in itself is not tried again until its files change or somebody asks;
    - a worker that died is started again, later each time, and so is a load under which the files
      changed (they may be back: a scan that sees others makes it another wish); what fails so
      `crash_limit` times in a row while loading is left alone;
    - what found no room on the disk is tried again, later each time, as long as it is wanted;
    - what found no room is tried again when `fits` says so, and not in the same breath;
    - where the old one left for a new one that will not serve, the old one is wanted in its place, and
      the new one not tried again until its files change or somebody asks;
    - an ensemble is retired, whatever else, when a model that it needs does not serve any more, and
      tried again when those models are back or on their way;
    - what sleeps is retired when nothing could wake it: it is neither what may rest nor what may come
      back, or a newer one serves.
    """
    by_version: dict[int, list[Generation]] = {}
    for gen in sorted(generations, key=lambda g: g.serial):
        by_version.setdefault(gen.spec.version, []).append(gen)
    all_serve = all(_serves(by_version.get(v, ())) for v in wanted)
    fallback = {
        version: back
        for version, back in fallback.items()
        if not _dead(by_version.get(version, []), back.wanted, crash_limit)
    }
    heirs = {back.heir for back in fallback.values()} & wanted.keys()
    stuck = {v for v in heirs if _stuck(by_version.get(v, []), wanted[v], crash_limit, fits)}
    if any(g.rolled_back for gens in by_version.values() for g in staying(gens)):
        stuck |= {
            v for v in heirs if counting(by_version.get(v, []), wanted[v], crash_limit=crash_limit)
        }

    retire: list[Retire] = []
    start: list[Start] = []
    again: list[float] = []
    for version in sorted(by_version.keys() | wanted.keys() | fallback.keys()):
        gens = by_version.get(version, [])
        back = fallback.get(version)
        want = _instead(version, wanted.get(version), back, stuck)
        may_rest = (wanted.get(version), resting.get(version), back.wanted if back else None)
        retire += _overslept(gens, [w for w in may_rest if w is not None])
        retire += _baseless(gens, footing)
        if want is None:
            retire += _farewell(gens, keep_ready=not all_serve)
            continue
        retire += _outdated(gens, want)
        if any(answers(g, want) for g in staying(gens)) or (want.back and _serves(gens)):
            continue
        if version in stuck and not want.back:  # an older version serves in its place
            continue
        at = _may_start(gens, want, crash_limit, fits, footing)
        if at is not None and at <= now:
            start.append(Start(want))
        elif at is not None:
            again.append(at)
    return Plan(tuple(retire), tuple(start), min(again, default=None))


def _instead(
    version: int, want: Wanted | None, back: Fallback | None, stuck: Collection[int]
) -> Wanted | None:
    """What is to serve: what is wanted, or what left for it where that will not serve."""
    if back is None or back.heir not in stuck or (want is not None and version not in stuck):
        return want
    return back.wanted


def _stuck(
    gens: list[Generation],
    want: Wanted,
    crash_limit: int,
    fits: Callable[[ModelSpec], bool],
) -> bool:
    """It has failed, and will not serve by itself before something changes, or nobody knows when."""
    row = counting(gens, want, crash_limit=crash_limit)
    if not row or any(answers(g, want) for g in staying(gens)):
        return False
    error = row[-1].error
    if isinstance(error, NoRoomError):
        return not fits(want.spec)
    return isinstance(error, NoDiskError) or _dead(gens, want, crash_limit)


def _dead(gens: list[Generation], want: Wanted, crash_limit: int) -> bool:
    """It has failed in itself, or too often."""
    row = counting(gens, want, crash_limit=crash_limit)
    if not row or isinstance(row[-1].error, NoRoomError):
        return False
    return not isinstance(row[-1].error, PASSING) or _lost(row, crash_limit)


def answers(gen: Generation, want: Wanted) -> bool:
    if gen.spec.fingerprint != want.spec.fingerprint:
        return False
    return gen.epoch == want.epoch if want.back else gen.epoch >= want.epoch


def sleeping(gens: Iterable[Generation]) -> list[Generation]:
    """They sleep, or are on their way to it."""
    return [g for g in gens if g.sleeps and g.state not in TERMINAL]


def asleep_for(want: Wanted, gens: Iterable[Generation]) -> Generation | None:
    """Who could be woken for it: the newest, if there are several."""
    found = [g for g in sleeping(gens) if g.state is State.ASLEEP and answers(g, want)]
    return max(found, key=lambda g: g.serial, default=None)


def _overslept(gens: list[Generation], may_rest: list[Wanted]) -> list[Retire]:
    """Those asleep whom nobody would wake."""
    ready = max((g.serial for g in staying(gens) if g.state is State.READY), default=0)
    orders: list[Retire] = []
    seen: set[tuple[str, int]] = set()
    for gen in reversed(sleeping(gens)):
        who = (gen.spec.fingerprint, gen.epoch)
        if not any(answers(gen, want) for want in may_rest):
            orders.append(Retire(gen.serial, "nobody would wake it"))
        elif gen.serial < ready or who in seen:
            orders.append(Retire(gen.serial, "a newer one is there"))
        seen.add(who)
    return orders


def staying(gens: Iterable[Generation]) -> list[Generation]:
    return [
        g
        for g in gens
        if (g.state in RISING or g.state is State.READY) and not g.retire_asked.is_set()
    ]


def _baseless(gens: list[Generation], footing: Callable[[ModelSpec], Footing]) -> list[Retire]:
    """Those that have begun, and stand on nothing any more. (What is queued waits for it.)"""
    return [
        Retire(g.serial, found.why or "a model that it needs is loading again")
        for g in staying(gens)
        if g.state is not State.QUEUED and not (found := footing(g.spec)).firm
    ]


def _serves(gens: Iterable[Generation]) -> bool:
    return any(g.state is State.READY for g in staying(gens))


def _farewell(gens: list[Generation], *, keep_ready: bool) -> list[Retire]:
    """A version that is not wanted. Its READY one stays while a wanted version does not serve yet."""
    return [
        Retire(g.serial, "not wanted")
        for g in staying(gens)
        if not (keep_ready and g.state is State.READY)
    ]


def _outdated(gens: list[Generation], want: Wanted) -> list[Retire]:
    ready = [g for g in staying(gens) if g.state is State.READY]
    stale = [g for g in staying(gens) if g.state in RISING and not answers(g, want)]
    return [Retire(g.serial, f"replaced by #{ready[-1].serial}") for g in ready[:-1]] + [
        Retire(g.serial, "overtaken by a newer wish") for g in stale
    ]


def counting(gens: Iterable[Generation], want: Wanted, *, crash_limit: int) -> list[Generation]:
    """The faults that decide when `want` may be tried again, oldest first: the newest one and, if it
    may pass, those in a row with it. Older ones and the forgiven count for nothing, and those of one
    that was to come back count only for its coming back: its files were not there then."""
    faults = [
        g
        for g in gens
        if answers(g, want) and g.state in (State.FAILING, State.FAILED) and not g.forgiven
        if want.back or not g.rolled_back
    ]
    row: list[Generation] = []
    for gen in reversed(faults):
        if row and not isinstance(gen.error, PASSING):
            break
        row.insert(0, gen)
        if not isinstance(gen.error, PASSING) or _served_long(gen):
            break
    return row[-max(crash_limit, LONGEST_ROW) :]


def _served_long(gen: Generation) -> bool:
    return gen.ready_at is not None and (gen.ended_at or 0.0) - gen.ready_at >= STABLE_S


def _may_start(
    gens: list[Generation],
    want: Wanted,
    crash_limit: int,
    fits: Callable[[ModelSpec], bool],
    footing: Callable[[ModelSpec], Footing],
) -> float | None:
    """When a new generation may start (0.0: at once); None: not before something changes."""
    row = counting(gens, want, crash_limit=crash_limit)
    if not row:
        return 0.0
    last = row[-1]
    if last.state is not State.FAILED or last.ended_at is None:
        return None  # still stopping: its end wakes the planner
    if isinstance(last.error, NoRoomError):
        return last.ended_at + REFUSED_S if fits(want.spec) else None
    if isinstance(last.error, ComposingModelError):
        return None if footing(want.spec).why else last.ended_at
    if not isinstance(last.error, PASSING):
        return None
    return None if _lost(row, crash_limit) else last.ended_at + _pause_s(row)


def fault_of(
    want: Wanted,
    gens: Iterable[Generation],
    *,
    crash_limit: int,
    fits: Callable[[ModelSpec], bool],
    footing: Callable[[ModelSpec], Footing],
) -> BaseException | None:
    """Why nothing comes of it by itself; None: it will be tried, or tried again. `gens`: of its
    version, oldest first."""
    found = list(gens)
    row = counting(found, want, crash_limit=crash_limit)
    if not row or _may_start(found, want, crash_limit, fits, footing) is not None:
        return None
    last = row[-1]
    dying = last.state is State.FAILING and isinstance(last.error, PASSING)
    return None if dying and not _lost(row, crash_limit) else last.error


def _lost(row: list[Generation], crash_limit: int) -> bool:
    """Too many in a row died before they had served."""
    return (
        len(row) >= crash_limit
        and not isinstance(row[-1].error, NoDiskError)
        and all(g.ready_at is None for g in row[-crash_limit:])
    )


def _pause_s(row: list[Generation]) -> float:
    """After the last of those in a row, before the next try."""
    if isinstance(row[-1].error, (FilesChangedError, NoDiskError)):
        return min(BACKOFF_MAX_S, REST_S * 2.0 ** (len(row) - 1))
    return 0.0 if len(row) == 1 else min(BACKOFF_MAX_S, BACKOFF_S * 2.0 ** (len(row) - 2))


def hopeless(want: Wanted, gens: Iterable[Generation], *, now: float, crash_limit: int) -> bool:
    """Nothing comes of a request that waits for it: its newest attempt has failed in itself (until its
    files change or somebody asks for a load), or in a way in which it had better not be tried again
    yet. `gens`: of its version, oldest first."""
    found = list(gens)
    row = counting(found, want, crash_limit=crash_limit)
    if not row or any(g.state in RISING for g in found):
        return False
    last = row[-1]
    if isinstance(last.error, (NoRoomError, ComposingModelError)):
        return False
    if not isinstance(last.error, PASSING):
        return True
    lost = _lost(row, crash_limit)
    if last.ended_at is None:  # it is still stopping
        return lost
    if lost:
        return now < last.ended_at + BACKOFF_MAX_S
    return isinstance(last.error, NoDiskError) and now < last.ended_at + _pause_s(row)


def given_up(spec: ModelSpec, gens: Iterable[Generation], *, crash_limit: int) -> bool:
    """It has crashed too often while loading to be tried again by itself."""
    return _lost(counting(gens, Wanted(spec), crash_limit=crash_limit), crash_limit)
