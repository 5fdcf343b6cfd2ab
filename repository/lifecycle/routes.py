"""Which generation a request goes to. Kept ready-made, because every request asks.

There is no swap step: a route is computed from the generations at each of their steps, so the moment a
newer one is READY it takes the new leases, and the moment it is not it takes none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from repository.lifecycle.generation import Generation
from repository.lifecycle.states import State


class Routes:
    def __init__(self) -> None:
        self._newest: dict[str, Generation] = {}  # model -> READY, highest version, newest
        self._versions: dict[str, dict[int, Generation]] = {}
        self._aliases: Mapping[str, str] = {}
        self._keeping: dict[str, list[Generation]] = {}  # where sequences may be open; newest first

    def rename(self, aliases: Mapping[str, str]) -> bool:
        """alias -> model, for all models at once. Are they others than before?"""
        before, self._aliases = self._aliases, dict(aliases)
        return before != self._aliases

    def model(self, name: str) -> str:
        """What `name` stands for; itself, unless it is an alias."""
        return self._aliases.get(name, name)

    def update(self, model: str, generations: Iterable[Generation]) -> None:
        generations = list(generations)
        self._keep(model, generations)
        ready = [g for g in generations if g.state is State.READY]
        ready.sort(key=lambda g: (g.spec.version, g.serial))
        if not ready:
            self._versions.pop(model, None)
            self._newest.pop(model, None)
            return
        self._versions[model] = {g.spec.version: g for g in ready}
        self._newest[model] = ready[-1]

    def find(self, name: str, version: int | None = None) -> Generation | None:
        """READY, or None. Without a version: the highest one that serves."""
        if version is None:
            gen = self._newest.get(name)
            return gen if gen is not None else self._newest.get(self._aliases.get(name, ""))
        return self._versions.get(self._aliases.get(name, name), {}).get(version)

    def begun(self, name: str, version: int | None, sequence: int | str) -> Generation | None:
        """The one in which that sequence has begun and not ended: READY, or draining while a newer one
        serves. Without a version: of the highest that has one."""
        for gen in self._keeping.get(self._aliases.get(name, name), ()):
            if version in (None, gen.spec.version) and sequence in gen.sequences:
                return gen
        return None

    def _keep(self, model: str, generations: Iterable[Generation]) -> None:
        keeping = [
            g
            for g in generations
            if g.spec.config.sequences is not None and g.state in (State.READY, State.DRAINING)
        ]
        keeping.sort(key=lambda g: (g.spec.version, g.serial), reverse=True)
        if keeping:
            self._keeping[model] = keeping
        else:
            self._keeping.pop(model, None)
