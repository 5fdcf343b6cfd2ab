"""What people are told of a model. Computed from its generations and its folder, never stored."""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

from repository.errors import RepositoryError
from repository.lifecycle.generation import Generation
from repository.lifecycle.states import RISING, State
from repository.snapshot import ModelFolder


class Public(enum.StrEnum):
    LOADED = "loaded"
    LOADING = "loading"
    UNLOADING = "unloading"
    FAILED = "failed"
    UNLOADED = "unloaded"


@dataclass(frozen=True, slots=True)
class LastError:
    code: str
    message: str
    version: int | None
    at: float | None  # seconds since 1970


class ModelStatus(NamedTuple):  # a frozen dataclass takes five times as long to make
    """`generations` newest first. `reloading`: one serves while another is on its way. `asleep`: one
    sleeps.

    serving_version   the version that a request without one goes to now; None if none serves
    changed_at        the last step of any generation, seconds since 1970
    past              a few that have ended and count for nothing any more, newest first
    """

    name: str
    state: Public
    reloading: bool
    serving_version: int | None
    last_error: LastError | None
    wanted: bool
    generations: tuple[Generation, ...]
    folder: ModelFolder | None
    changed_at: float | None
    past: tuple[Generation, ...] = ()
    asleep: bool = False


PUBLIC: dict[State, Public] = {
    State.QUEUED: Public.LOADING,
    State.LOADING: Public.LOADING,
    State.WARMING: Public.LOADING,
    State.READY: Public.LOADED,
    State.DRAINING: Public.UNLOADING,
    State.ASLEEP: Public.UNLOADED,  # it does not serve; that it would be back at once stands beside it
    State.UNLOADING: Public.UNLOADING,
    State.FAILING: Public.FAILED,
    State.FAILED: Public.FAILED,
    State.GONE: Public.UNLOADED,
}
_serial = attrgetter("serial")
PRECEDENCE = (Public.LOADED, Public.LOADING, Public.UNLOADING, Public.FAILED)


def describe(
    name: str,
    generations: Iterable[Generation],
    folder: ModelFolder | None,
    *,
    wanted: bool,
    past: Collection[Generation] = (),
) -> ModelStatus:
    found = tuple(generations)
    if (
        len(found) < 2
        and not (folder and folder.problems)
        and (not found or found[0].error is None)
    ):
        return _calm(name, found, folder, wanted, past)
    newest_first = _newest_first(found)
    words = {PUBLIC[g.state] for g in newest_first}
    error = _last_error(newest_first, folder)
    state = next((p for p in PRECEDENCE if p in words), None) if words else None
    if state is None:
        state = Public.FAILED if wanted and error is not None else Public.UNLOADED
    ready = [g for g in newest_first if g.state is State.READY]
    return ModelStatus(
        name=name,
        state=state,
        reloading=bool(ready) and any(g.state in RISING for g in newest_first),
        serving_version=max((g.spec.version for g in ready), default=None),
        last_error=error,
        wanted=wanted,
        generations=newest_first,
        folder=folder,
        changed_at=max((g.story[-1].at for g in newest_first), default=None),
        past=_newest_first(past),
        asleep=any(g.state is State.ASLEEP for g in newest_first),
    )


def _calm(
    name: str,
    found: tuple[Generation, ...],
    folder: ModelFolder | None,
    wanted: bool,
    past: Collection[Generation],
) -> ModelStatus:
    """The same where there is at most one generation, and nothing is wrong. Nearly all models of a
    large repository are so, people ask for all of them at once, and the loop stands still meanwhile."""
    past = _newest_first(past)
    if not found:
        return ModelStatus(name, Public.UNLOADED, False, None, None, wanted, (), folder, None, past)
    (gen,) = found
    serves = gen.state is State.READY
    state = Public.LOADED if serves else PUBLIC[gen.state]
    version = gen.spec.version if serves else None
    at, asleep = gen.story[-1].at, gen.state is State.ASLEEP
    return ModelStatus(name, state, False, version, None, wanted, found, folder, at, past, asleep)


def _newest_first(generations: Collection[Generation]) -> tuple[Generation, ...]:
    return tuple(sorted(generations, key=_serial, reverse=True)) if generations else ()


def has_failed(generations: Collection[Generation], folder: ModelFolder | None) -> bool:
    """Is a wanted model FAILED? Probes ask this of every model: most have nothing that could be."""
    suspect = folder is not None and bool(folder.problems)
    if not suspect and all(g.error is None for g in generations):
        return False
    return describe("", generations, folder, wanted=True).state is Public.FAILED


def _last_error(
    newest_first: tuple[Generation, ...], folder: ModelFolder | None
) -> LastError | None:
    """The newest fault that no later success has made history, else what is wrong in the folder."""
    if folder is not None and folder.problems and folder.errors:
        problem = folder.errors[0]
        return LastError(f"folder_{problem.rule}", str(problem), problem.version, None)
    settled: set[int] = set()  # versions of which something newer has succeeded
    found: LastError | None = None
    for gen in newest_first:
        if gen.state is State.READY and not gen.rolled_back:
            settled.add(gen.spec.version)
        if gen.error is not None and gen.spec.version not in settled:
            found = LastError(
                code_of(gen.error), text_of(gen.error), gen.spec.version, gen.story[-1].at
            )
            if not gen.rolled_back:  # else what it came back for is the cause, if that is there
                return found
    return found


def code_of(error: BaseException) -> str:
    return error.code if isinstance(error, RepositoryError) else "load_failed"


def text_of(error: BaseException) -> str:
    """In words: our own errors speak for themselves, foreign ones are named by their type."""
    if isinstance(error, RepositoryError):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
