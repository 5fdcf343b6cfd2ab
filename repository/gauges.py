"""The part of the facade that measures (`repository.repository` is the whole): devices, and what the
models that serve now can be asked for. Nothing here changes anything.
"""

from __future__ import annotations

from repository.cache import ResponseCache
from repository.devices.inventory import Devices, reports
from repository.devices.readings import Readings
from repository.journal import Journal
from repository.lifecycle.placement import Placement
from repository.lifecycle.states import State
from repository.measuring import Measuring
from repository.reconciler import Reconciler
from repository.reports import CacheReport, DeviceReport, GpuUse, HostReport, Skill
from repository.spec import ModelSpec

SKILLS: dict[str, Skill] = {"generate": "text_generation", "embed": "embeddings"}


class Gauges:
    """What the facade brings: its devices, and the one writer."""

    _devices: Devices
    _gpu_use: Readings[GpuUse]
    _measuring: Measuring
    _models: Reconciler
    _journal: Journal
    _cache: ResponseCache | None

    def devices(self) -> list[DeviceReport]:
        """Budget and reservations beside what each device says of itself: GPUs some seconds ago, so
        that a driver that hangs holds up nobody; one that has been silent for longer tells nothing."""
        held = {d: (of.capacity, of.held) for d, of in self._models.ledgers.items()}
        told = self._devices.beside(self._measuring.gpu_use)
        return reports(told, held, self._measuring.ours())

    async def gpus(self) -> GpuUse:
        """What each GPU and its processes use now. Raises DeviceSilentError where a driver hangs."""
        return await self._measuring.read()

    async def _gpu_use_now(self) -> GpuUse:
        return await self._gpu_use.now() if self._devices.gpus() else ()

    def expects(self, spec: ModelSpec) -> Placement:
        """Where it would rather go, and what it is thought to need there."""
        return self._models.options(spec)[0]

    @property
    def has_gpu(self) -> bool:
        """As found at the start."""
        return bool(self._devices.gpus())

    @property
    def durable(self) -> bool:
        """What is said by call outlasts a restart; false while the state folder cannot be written."""
        return self._journal.well

    def host(self) -> HostReport:
        """How busy this machine is, and its memory."""
        return self._devices.host()

    def cache(self) -> CacheReport | None:
        """The answers that are kept; None where none are."""
        return self._cache.report() if self._cache is not None else None

    @property
    def skills(self) -> frozenset[Skill]:
        """What can be asked for now, of one model or another."""
        found: set[Skill] = set()
        for gens in self._models.generations.values():
            for gen in gens:
                if gen.state is not State.READY or gen.loaded is None:
                    continue
                found.update(SKILLS[word] for word in gen.loaded.abilities if word in SKILLS)
                if gen.fitting is not None:
                    found.add("adapters")
        return frozenset(found)
