"""When is what a scan saw to be believed? Pure: scans and times in, a settled snapshot out.

Rules: new content counts once two scans at least `settle_s` apart saw the same, or when its newest
change is `settle_s` old already. Until then what was accepted before stands, and a model that is
gone stays for as long (a swap by two renames must not unload it). Content that has been accepted
and is broken changes the problems, not what serves: see `keeping`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType

from repository.folder.aliases import settle_aliases
from repository.folder.rest import Rest
from repository.folder.settle_adapters import AdapterSettler
from repository.folder.versions import choose
from repository.snapshot import ModelFolder, Snapshot

SOONEST_S = 0.01  # a timer that fires a hair too early must not become a busy loop


@dataclass(frozen=True, slots=True)
class Settled:
    """`changed`: names whose folder is new, different or gone since the last time. `look_again_s`:
    something is in motion and may be accepted then; None if all is at rest."""

    snapshot: Snapshot
    changed: set[str]
    look_again_s: float | None


class Settler:
    """Offer it every scan, in order."""

    def __init__(self, settle_s: float) -> None:
        self._rest = Rest(settle_s)
        self._adapters = AdapterSettler(settle_s)
        self._accepted: dict[str, ModelFolder] = {}
        self._told: dict[str, ModelFolder] = {}  # the same, with each alias given to one model

    def put(self, name: str, folder: ModelFolder | None) -> None:
        """It is at rest as it is, and accepted: nothing of its files has changed, only what was said of
        it by call. None: it is none of the repository's models any more."""
        for held in (self._accepted, self._told):
            held.pop(name, None)
            if folder is not None:
                held[name] = folder
        self._rest.forget(name)

    def offer(self, snapshot: Snapshot, now: float) -> Settled:
        """`now`: wall seconds, as ctimes are."""
        waits: list[float] = []
        for name in snapshot.models.keys() | self._accepted.keys():
            wait = self._judge(name, snapshot, now)
            if wait is not None:
                waits.append(max(wait, SOONEST_S))
        self._rest.keep(lambda name: name in snapshot.models or name in self._accepted)
        models = self._with_adapters(snapshot, now, waits)
        before, self._told = self._told, settle_aliases(dict(sorted(models.items())))
        names = before.keys() | self._told.keys()
        changed = {n for n in names if _differ(before.get(n), self._told.get(n))}
        settled = Snapshot(MappingProxyType(self._told), snapshot.problems)
        return Settled(settled, changed, min(waits, default=None))

    def _with_adapters(
        self, snapshot: Snapshot, now: float, waits: list[float]
    ) -> dict[str, ModelFolder]:
        """What was accepted, with the adapters that have settled. Of a model that is not to be seen
        now they are what they were."""
        models = dict(self._accepted)
        for name, folder in self._accepted.items():
            seen = snapshot.models.get(name)
            if seen is None:
                told = self._adapters.told(name)
            else:
                told, wait = self._adapters.offer(name, seen.adapters, now)
                if wait is not None:
                    waits.append(max(wait, SOONEST_S))
            if told is not None and told is not folder.adapters:
                before = self._told.get(name)
                same = before is not None and before.adapters is told and before == folder
                models[name] = (
                    before if before is not None and same else replace(folder, adapters=told)
                )
        self._adapters.keep(self._accepted)
        return models

    def _judge(self, name: str, snapshot: Snapshot, now: float) -> float | None:
        """Accepts what was seen of one model, or says in how many seconds it might."""
        seen, old = snapshot.models.get(name), self._accepted.get(name)
        if seen is None and snapshot.hides(name):
            return None  # nobody knows what is there
        if seen is not None and old is not None and seen.fingerprint == old.fingerprint:
            self._rest.forget(name)
            if seen is not old:
                self._accepted[name] = keeping(seen, old)
            return None
        fingerprint = seen.fingerprint if seen is not None else None
        newest = seen.newest_ctime if seen is not None else 0.0
        wait = self._rest.wait(name, fingerprint, newest, now)
        if wait is not None:
            return wait
        if seen is None:
            del self._accepted[name]
        else:
            self._accepted[name] = seen if old is None else keeping(seen, old)
        return None


def keeping(new: ModelFolder, old: ModelFolder) -> ModelFolder:
    """`new`, with what served before in place of what is broken now. The problems are new's.

    A model that is broken as a whole keeps all that it had; a broken version keeps its old spec,
    and the new policy chooses again with it.
    """
    if new.broken:
        return replace(new, specs=old.specs, aliases=old.aliases)
    kept = {p.version for p in new.errors if p.version in old.specs}
    specs = {v: s for v, s in old.specs.items() if v in kept and v not in new.specs}
    if not specs:
        return new
    specs.update(new.specs)
    policy = next(iter(new.specs.values())).config.version_policy if new.specs else None
    chosen = choose(policy, specs) if policy else sorted(specs, reverse=True)
    return replace(new, specs=MappingProxyType({v: specs[v] for v in chosen}))


def _differ(one: ModelFolder | None, other: ModelFolder | None) -> bool:
    """In more than when it was last touched."""
    if one is other:
        return False
    if one is None or other is None:
        return True
    return replace(one, newest_ctime=0.0) != replace(other, newest_ctime=0.0)
