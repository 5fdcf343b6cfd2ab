"""Which adapters of a scan are to be believed? Each settles by itself, as a model does. Pure.

A new one is told as settling until its files are at rest, a changed one as what it was before, and one
that is gone stays for as long. At rest and broken: a new one is told with its problem; of one that was
good, what was good stays and the problem is told beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from repository.adapters.sources import AdapterSource
from repository.folder.rest import Rest

Sources = Mapping[str, AdapterSource]


@dataclass(slots=True)
class _Model:
    """`seen`: what was accepted, as it was seen; `told`: with what was good before in it."""

    rest: Rest
    seen: dict[str, AdapterSource] = field(default_factory=dict)
    good: dict[str, AdapterSource] = field(default_factory=dict)
    told: Sources = field(default_factory=lambda: MappingProxyType({}))
    last: Sources | None = None  # the scan that `told` says all of; None: something is in motion


class AdapterSettler:
    def __init__(self, settle_s: float) -> None:
        self._settle_s = settle_s
        self._models: dict[str, _Model] = {}

    def offer(self, model: str, sources: Sources, now: float) -> tuple[Sources, float | None]:
        """What to tell of the adapters of one model, and in how many seconds there may be more.

        Where all is at rest and good it is `sources` itself; where nothing changed since the last
        time, the same object as then.
        """
        known = self._models.get(model)
        if known is None:
            if not sources:
                return sources, None
            known = self._models[model] = _Model(Rest(self._settle_s))
        if known.last is sources:
            return known.told, None
        waits = []
        settling = {}
        for name in sources.keys() | known.seen.keys():
            wait = _judge(known, name, sources.get(name), now)
            if wait is not None:
                waits.append(wait)
                if name not in known.seen:
                    settling[name] = AdapterSource(name, sources[name].path, "", settling=True)
        known.rest.keep(lambda name: name in sources or name in known.seen)
        told = {**known.good, **settling}
        if told == sources:
            known.told = sources
        elif told != known.told:
            known.told = MappingProxyType(told)
        known.last = None if waits else sources
        return known.told, min(waits, default=None)

    def told(self, model: str) -> Sources | None:
        """The last answer."""
        known = self._models.get(model)
        return known.told if known is not None else None

    def keep(self, models: Mapping[str, object]) -> None:
        """Forgets the adapters of all others."""
        for model in [m for m in self._models if m not in models]:
            del self._models[model]


def _judge(known: _Model, name: str, seen: AdapterSource | None, now: float) -> float | None:
    """Accepts what was seen of one adapter, or says in how many seconds it might."""
    old = known.seen.get(name)
    if seen is not None and old is not None and seen.fingerprint == old.fingerprint:
        known.rest.forget(name)
    else:
        fingerprint = seen.fingerprint if seen is not None else None
        newest = seen.newest_ctime if seen is not None else 0.0
        wait = known.rest.wait(name, fingerprint, newest, now)
        if wait is not None:
            return wait
    if seen is None:
        known.seen.pop(name, None)
        known.good.pop(name, None)
    elif seen is not old:
        known.seen[name] = seen
        known.good[name] = _keeping(seen, known.good.get(name))
    return None


def _keeping(new: AdapterSource, old: AdapterSource | None) -> AdapterSource:
    if new.facts is not None or old is None or old.facts is None:
        return new
    return replace(old, problem=new.problem)
