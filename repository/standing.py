"""How things stand: what the one writer (`reconciler`) looks up before it acts.

It compares what is wanted with what runs and with what is free, and changes nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

from repository.admission import never, replaces
from repository.demand import Demand
from repository.errors import ModelNotFoundError, RepositoryError
from repository.lifecycle.generation import Generation
from repository.lifecycle.ledger import MemoryLedger
from repository.lifecycle.plan import given_up, hopeless
from repository.lifecycle.register import Register
from repository.lifecycle.routes import Routes
from repository.lifecycle.states import RISING, State
from repository.lifecycle.wishes import Wishes, Word
from repository.snapshot import ModelFolder
from repository.spec import ModelSpec

WhyNot = Callable[[str, int | None], RepositoryError]


def unknown(name: str, version: int | None) -> RepositoryError:
    return ModelNotFoundError(f"'{name}' does not serve")


class Standing(ABC):
    """What the writer brings. `ledgers`: one per device."""

    folders: dict[str, ModelFolder]
    ledgers: Mapping[str, MemoryLedger]
    wishes: Wishes
    register: Register
    routes: Routes
    demand: Demand
    _queue: list[Generation]
    _crash_limit: int
    _why_not: WhyNot

    @property
    @abstractmethod
    def now(self) -> float:
        """The loop's clock."""

    def place(self, spec: ModelSpec) -> str:
        """The first device of the spec that has a ledger. `spec.devices` has the best one first."""
        return next((d for d in spec.devices if d in self.ledgers), next(iter(self.ledgers)))

    def known(self, model: str) -> ModelFolder | None:
        """Its folder; None if the folder is gone and something of it still runs."""
        if model not in self.folders and model not in self.register.living:
            raise ModelNotFoundError(f"no model '{model}' in the repository")
        return self.folders.get(model)

    def _outgoing(self, gen: Generation) -> bool:
        """Its version is not wanted any more: it serves until one that is does."""
        return gen.spec.version not in self.wishes.wanted(self.folders.get(gen.spec.model))

    def _fits(self, spec: ModelSpec) -> bool:
        """Could what found no room have it now, from what is free and what it would replace?"""
        device = self.place(spec)
        ledger = self.ledgers[device]
        room = ledger.free
        if spec.config.reload != "overlap":
            room += sum(
                g.reserved
                for g in self.register.of(spec.model)
                if g.device == device
                and g.state is State.READY
                and not g.retire_asked.is_set()
                and replaces(spec, g, self._outgoing)
            )
        room = min(room, ledger.most(spec.config.device_share))
        return not self._queue and spec.bytes_needed <= room

    def _on_its_way(self, model: str) -> bool:
        """A forced load joins one that is rising for the same files."""
        wanted = self.wishes.wanted(self.folders.get(model))
        rising = {
            (g.spec.version, g.spec.fingerprint)
            for g in self.register.of(model)
            if g.state in RISING and not g.retire_asked.is_set()
        }
        return bool(wanted) and all((v, w.spec.fingerprint) in rising for v, w in wanted.items())

    def _in_vain(self, name: str, version: int | None) -> RepositoryError | None:
        """What to say to a request that waits for what will never come as things stand: there is no
        such version, its newest attempt has failed in itself, or it is too large for its device."""
        folder = self.folders.get(self.routes.model(name))
        specs = folder.specs if folder is not None else {}
        refused: RepositoryError | None = None
        for number, spec in specs.items():
            if version in (None, number) and not self._is_hopeless(spec):
                ledger = self.ledgers[self.place(spec)]
                refused = never(spec, self._all(), ledger, outgoing=self._outgoing)
                if refused is None:
                    return None
        return refused or self._why_not(name, version)

    def _is_hopeless(self, spec: ModelSpec) -> bool:
        gens = self._versions(spec)
        return hopeless(spec, gens, now=self.now, crash_limit=self._crash_limit)

    def _given_up(self, model: str) -> bool:
        folder = self.folders.get(model)
        return any(
            given_up(spec, self._versions(spec), crash_limit=self._crash_limit)
            for spec in (folder.specs.values() if folder is not None else ())
        )

    def _versions(self, spec: ModelSpec) -> list[Generation]:
        return [g for g in self.register.of(spec.model) if g.spec.version == spec.version]

    def _untouched(self, model: str) -> bool:
        """It is wanted for requests alone, and waits for room: nothing has been done for it yet."""
        rising = {g.state for g in self.register.of(model) if g.state in RISING}
        return self.wishes.word(model) is Word.DEMAND and rising == {State.QUEUED}

    def _all(self) -> list[Generation]:
        return [g for gens in self.register.living.values() for g in gens]
