"""From what is wanted of one model and what runs of it to what to do next.

`plan` is pure: same arguments, same answer, no I/O, no clock of its own. It is asked again after every
change, so it only proposes the next step and never has to remember what it proposed before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from repository.errors import FilesChangedError, NoDiskError, NoRoomError, WorkerDiedError
from repository.lifecycle.generation import Generation
from repository.lifecycle.states import RISING, State
from repository.lifecycle.wishes import Wanted
from repository.spec import ModelSpec

STABLE_S = 60.0  # a generation that served this long had not been the cause of its restart
BACKOFF_S = 0.5  # the second restart in a row waits this long, each further one twice as long
BACKOFF_MAX_S = 30.0
REST_S = 2.0  # after files that changed under a load: time for a scan to see what they are now
LONGEST_ROW = 8  # crashes that are told apart; the wait is at its longest by then
PASSING = (WorkerDiedError, FilesChangedError, NoDiskError)  # may be gone at the next try


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


def plan(
    wanted: Mapping[int, Wanted],
    generations: Iterable[Generation],
    *,
    now: float,
    crash_limit: int = 3,
    fits: Callable[[ModelSpec], bool] = lambda spec: True,
) -> Plan:
    """The next step for one model. `wanted` and the versions of `generations` belong to that model.

    Guarantees:
    - a READY generation is retired only once a newer READY one of its version exists, or its version
      is no longer wanted and every version that is wanted serves, or the model is not wanted at all;
    - at most one generation of a version is rising;
    - what failed in itself is not tried again until its files change or somebody asks;
    - a worker that died is started again, later each time, and so is a load under which the files
      changed (they may be back: a scan that sees others makes it another wish); what fails so
      `crash_limit` times in a row while loading is left alone;
    - what found no room on the disk is tried again, later each time, as long as it is wanted;
    - what found no room is tried again when `fits` says so.
    """
    by_version: dict[int, list[Generation]] = {}
    for gen in sorted(generations, key=lambda g: g.serial):
        by_version.setdefault(gen.spec.version, []).append(gen)
    all_serve = all(_serves(by_version.get(v, ())) for v in wanted)

    retire: list[Retire] = []
    start: list[Start] = []
    again: list[float] = []
    for version in sorted(by_version.keys() | wanted.keys()):
        gens = by_version.get(version, [])
        want = wanted.get(version)
        if want is None:
            retire += _farewell(gens, keep_ready=not all_serve)
            continue
        retire += _outdated(gens, want)
        if any(answers(g, want) for g in staying(gens)):
            continue
        at = _may_start(gens, want, crash_limit, fits)
        if at is not None and at <= now:
            start.append(Start(want))
        elif at is not None:
            again.append(at)
    return Plan(tuple(retire), tuple(start), min(again, default=None))


def answers(gen: Generation, want: Wanted) -> bool:
    return gen.spec.fingerprint == want.spec.fingerprint and gen.epoch >= want.epoch


def staying(gens: Iterable[Generation]) -> list[Generation]:
    return [
        g
        for g in gens
        if (g.state in RISING or g.state is State.READY) and not g.retire_asked.is_set()
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
    may pass, those in a row with it. Older ones and the forgiven count for nothing."""
    faults = [
        g
        for g in gens
        if answers(g, want) and g.state in (State.FAILING, State.FAILED) and not g.forgiven
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
    gens: list[Generation], want: Wanted, crash_limit: int, fits: Callable[[ModelSpec], bool]
) -> float | None:
    """When a new generation may start (0.0: at once); None: not before something changes."""
    row = counting(gens, want, crash_limit=crash_limit)
    if not row:
        return 0.0
    last = row[-1]
    if last.state is not State.FAILED or last.ended_at is None:
        return None  # still stopping: its end wakes the planner
    if isinstance(last.error, NoRoomError):
        return 0.0 if fits(want.spec) else None
    if not isinstance(last.error, PASSING):
        return None
    return None if _lost(row, crash_limit) else last.ended_at + _pause_s(row)


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


def hopeless(spec: ModelSpec, gens: Iterable[Generation], *, now: float, crash_limit: int) -> bool:
    """Nothing comes of a request that waits for it: its newest attempt has failed in itself (until its
    files change or somebody asks for a load), or in a way in which it had better not be tried again
    yet. `gens`: of its version, oldest first."""
    found = list(gens)
    row = counting(found, Wanted(spec), crash_limit=crash_limit)
    if not row or any(g.state in RISING for g in found):
        return False
    last = row[-1]
    if isinstance(last.error, NoRoomError):
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
