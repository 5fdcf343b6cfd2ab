"""How things stand: what the one writer (`reconciler`) looks up before it acts.

It compares what is wanted with what runs and with what is free, and changes nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

from repository.admission import never
from repository.demand import Demand
from repository.errors import ModelNotFoundError, RepositoryError
from repository.lifecycle.generation import Generation
from repository.lifecycle.ledger import MemoryLedger
from repository.lifecycle.pins import Pins
from repository.lifecycle.placement import Placement
from repository.lifecycle.plan import given_up, hopeless
from repository.lifecycle.register import Register
from repository.lifecycle.routes import Routes
from repository.lifecycle.spreading import shared, spreads
from repository.lifecycle.states import RISING, State
from repository.lifecycle.wishes import Wanted, Wishes, Word
from repository.room import replaces
from repository.snapshot import ModelFolder
from repository.spec import ModelSpec

WhyNot = Callable[[str, int | None], RepositoryError]
Needs = Callable[[ModelSpec, str], tuple[int, str]]


def unknown(name: str, version: int | None) -> RepositoryError:
    return ModelNotFoundError(f"'{name}' does not serve")


def as_estimated(spec: ModelSpec, device: str) -> tuple[int, str]:
    """Bytes of all instances together, were they on that device, and how that is known."""
    return spec.bytes_needed, "estimate" if spec.config.memory is None else "config"


class Standing(ABC):
    """What the writer brings. `ledgers`: one per device. `needs`: see `as_estimated`."""

    folders: dict[str, ModelFolder]
    ledgers: Mapping[str, MemoryLedger]
    wishes: Wishes
    register: Register
    routes: Routes
    demand: Demand
    needs: Needs
    pins: Pins
    _queue: list[Generation]
    _crash_limit: int
    _why_not: WhyNot

    @property
    @abstractmethod
    def now(self) -> float:
        """The loop's clock."""

    def options(self, spec: ModelSpec) -> tuple[Placement, ...]:
        """Where it may go, best first, and what it needs there. Of several GPUs its instances take one
        each, as far as there are that many; the CPU only where no GPU could hold it, were it empty.
        Where the config says it of each instance, there and nowhere else."""
        if spec.config.devices and self.ledgers.keys() >= set(spec.config.devices):
            return (self._placement(spec, spec.config.devices),)
        places = [d for d in spec.devices if d in self.ledgers] or [next(iter(self.ledgers))]
        gpus = [d for d in places if d != "cpu"]
        instances = max(1, spec.config.instances)
        found = [self._placement(spec, devices) for devices in spreads(instances, gpus)]
        if "cpu" in places and not any(self._could_hold(spec, where) for where in found):
            found.append(self._placement(spec, ("cpu",) * instances))
        return tuple(found)

    def _placement(self, spec: ModelSpec, devices: tuple[str, ...]) -> Placement:
        needs: dict[str, int] = {}
        sources: set[str] = set()
        for device in dict.fromkeys(devices):
            n_bytes, source = self.needs(spec, device)
            needs[device] = shared(n_bytes, devices)[device]
            if source == "measured":
                needs[device] = self._at_most(spec, device, needs[device], devices)
            sources.add(source)
        return Placement(devices, needs, max(sources))  # measured, if any of them is

    def _at_most(
        self, spec: ModelSpec, device: str, measured: int, devices: tuple[str, ...]
    ) -> int:
        """What once grew beyond what it may have there (caches, a leak) could never come back to it: it
        is given all that it may have, if by its files it can live there."""
        most = self.ledgers[device].most(spec.config.device_share)
        fits = shared(spec.bytes_needed, devices)[device] <= most
        return min(measured, most) if fits else measured

    def _could_hold(self, spec: ModelSpec, where: Placement) -> bool:
        share = spec.config.device_share
        return all(n <= self.ledgers[device].most(share) for device, n in where.needs.items())

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
        room = {device: ledger.usable - ledger.held for device, ledger in self.ledgers.items()}
        if spec.config.reload != "overlap":
            for gen in self._replaced_by(spec):
                for device, n_bytes in gen.held.items():
                    room[device] += n_bytes
        return not self._in_line() and any(
            self._could_hold(spec, where) and all(n <= room[d] for d, n in where.needs.items())
            for where in self.options(spec)
        )

    def _in_line(self) -> list[Generation]:
        """Those in the queue that wait for memory; an ensemble needs none."""
        return [g for g in self._queue if g.spec.config.ensemble is None]

    def _replaced_by(self, spec: ModelSpec) -> list[Generation]:
        return [
            g
            for g in self.register.of(spec.model)
            if g.state is State.READY
            and not g.retire_asked.is_set()
            and replaces(spec, g, self._outgoing)
        ]

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
        refused: RepositoryError | None = None
        for want in self._to_come(self.routes.model(name)):
            spec = want.spec
            if version in (None, spec.version) and not self._is_hopeless(want):
                options = self.options(spec)
                refused = never(spec, options, self._all(), self.ledgers, outgoing=self._outgoing)
                if refused is None:
                    return None
        return refused or self._why_not(name, version)

    def _to_come(self, model: str) -> list[Wanted]:
        """What could serve of it, if it were wanted: also what left for a newer one."""
        folder = self.folders.get(model)
        specs = folder.specs.values() if folder is not None else ()
        older = self.register.fallback.get(model, {}).values()
        return [*(Wanted(spec) for spec in specs), *(back.wanted for back in older)]

    def _is_hopeless(self, want: Wanted) -> bool:
        gens = self._versions(want.spec)
        return hopeless(want, gens, now=self.now, crash_limit=self._crash_limit)

    def _given_up(self, model: str) -> bool:
        folder = self.folders.get(model)
        return any(
            given_up(spec, self._versions(spec), crash_limit=self._crash_limit)
            for spec in (folder.specs.values() if folder is not None else ())
        )

    def _versions(self, spec: ModelSpec) -> list[Generation]:
        return [g for g in self.register.of(spec.model) if g.spec.version == spec.version]

    def _untouched(self, model: str) -> bool:
        """It is wanted for requests alone (or for what needs it), and waits for room: nothing has been
        done for it yet."""
        rising = {g.state for g in self.register.of(model) if g.state in RISING}
        word = self.wishes.word(model)
        return word in (Word.DEMAND, Word.NEEDED) and rising == {State.QUEUED}

    def _all(self) -> list[Generation]:
        return [g for gens in self.register.living.values() for g in gens]
