"""What the repository holds, as Triton's index lists it: one entry for each version that was ever tried,
and one with a name alone for a model that never was.

The folders are listed anew each time, so what was just dropped is there at once. Beside Triton's own
reasons, an entry that is READY says so when a newer one is on its way, or has failed: Triton keeps that
to itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from repository.lifecycle.generation import Generation
from repository.lifecycle.states import RISING, State
from repository.lifecycle.status import ModelStatus, Public, text_of
from repository.repository import Repository
from repository.snapshot import ModelFolder

TWICE = "model appears in two or more repositories"
UNLOADED = "unloaded"
RELOADING = "a newer one is being loaded"
READY, LOADING, UNLOADING, UNAVAILABLE = "READY", "LOADING", "UNLOADING", "UNAVAILABLE"
ABSENT = RISING | {State.FAILING, State.FAILED}
GOING = frozenset({State.DRAINING, State.UNLOADING})


class Entry(NamedTuple):
    """`version` 0: of the model as a whole; `state` "": nothing was ever tried of it."""

    name: str
    version: int = 0
    state: str = ""
    reason: str = ""

    def shown(self) -> dict[str, Any]:
        found = {"name": self.name, "state": self.state, "reason": self.reason}
        if self.version:
            found["version"] = str(self.version)
        order = ("name", "version", "state", "reason")
        return {key: found[key] for key in order if found.get(key)}


async def index(models: Repository, *, ready: bool = False) -> list[dict[str, Any]]:
    """By name and version. `ready`: only what serves."""
    lying = await models.lying()
    statuses = {status.name: status for status in models.statuses()}
    entries: list[Entry] = []
    for name in sorted(statuses.keys() | lying.models.keys()):
        status = statuses.get(name)
        entries += entries_of(name, status, lying.models.get(name))
    return [entry.shown() for entry in entries if not ready or entry.state == READY]


def entries_of(name: str, status: ModelStatus | None, lies: ModelFolder | None) -> list[Entry]:
    """`lies`: the model's folder as it is at this moment, at rest or not."""
    found = {} if status is None else _versions(status)
    folder = lies or (status.folder if status else None)
    problems = folder.errors if folder is not None else ()
    if any(p.rule == "twice" for p in problems):
        serving = [e._replace(reason=TWICE) for e in found.values() if e.state == READY]
        return serving or [Entry(name, 0, UNAVAILABLE, TWICE)]
    named = any(problem.version is not None for problem in problems)
    for problem in problems:
        if named and problem.rule == "version" and problem.version is None:
            continue  # "none can be served": what is wrong with each is said of each
        known = found.get(problem.version or 0)
        if problem.version is None and any(e.state == READY for e in found.values()):
            found = {v: e._replace(reason=e.reason or str(problem)) for v, e in found.items()}
        elif known is None or known.state == UNAVAILABLE:
            version = problem.version or 0
            found[version] = Entry(name, version, UNAVAILABLE, str(problem))
        elif not known.reason:
            found[known.version] = known._replace(reason=str(problem))
    return [found[version] for version in sorted(found)] or [Entry(name)]


def _versions(status: ModelStatus) -> dict[int, Entry]:
    by_version: dict[int, list[Generation]] = {}
    for gen in (*status.generations, *status.past):
        by_version.setdefault(gen.spec.version, []).append(gen)
    return {
        version: _entry(status.name, version, sorted(gens, key=lambda g: g.serial, reverse=True))
        for version, gens in by_version.items()
    }


def _entry(name: str, version: int, newest_first: list[Generation]) -> Entry:
    newest = newest_first[0]
    serving = next((g for g in newest_first if g.state is State.READY), None)
    if serving is not None:
        return Entry(name, version, READY, _news(newest_first, serving))
    if newest.state in RISING:
        return Entry(name, version, LOADING)
    if any(g.state in GOING for g in newest_first):
        return Entry(name, version, UNLOADING)
    if newest.error is not None:
        return Entry(name, version, UNAVAILABLE, f"Internal: {text_of(newest.error)}")
    return Entry(name, version, UNAVAILABLE, "asleep" if newest.sleeps else UNLOADED)


def _news(newest_first: Iterable[Generation], serving: Generation) -> str:
    """Of what came after the one that serves, or before it where that came back in its place."""
    for gen in newest_first:
        if gen is serving or (gen.serial < serving.serial and not serving.rolled_back):
            continue
        if gen.state in RISING:
            return RELOADING
        if gen.error is not None:
            return f"Internal: {text_of(gen.error)}"
    return ""


def missing(status: ModelStatus) -> bool:
    """Strictly, the server is not ready: something that is wanted does not serve. Of a model that serves
    only those of its versions count that were tried together with the first that did: a reload, or a
    new version, takes nobody out of service while it loads or when it has failed."""
    if not status.wanted:
        return False
    if status.state is not Public.LOADED:
        return True
    since = min(
        (g.ready_at or 0.0 for g in status.generations if g.state is State.READY), default=0.0
    )
    newest: dict[int, Generation] = {}
    for gen in status.generations:  # newest first
        newest.setdefault(gen.spec.version, gen)
    return any(g.state in ABSENT and g.born_at < since for g in newest.values())
