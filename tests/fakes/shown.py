"""A repository that only shows: what a test put into it is what it says of itself."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from repository.errors import ModelNotFoundError
from repository.lifecycle.generation import Generation
from repository.lifecycle.status import ModelStatus, describe
from repository.reports import AdapterView, CacheReport, HostReport
from repository.repository import DeviceReport, Repository
from repository.snapshot import ModelFolder


class ShownRepository(Repository):
    def __init__(self) -> None:
        self.root = Path("models")
        self.generations: dict[str, list[Generation]] = {}
        self.folders: dict[str, ModelFolder] = {}
        self.of_models: dict[str, list[AdapterView]] = {}  # model -> its adapters
        self.reports: list[DeviceReport] = []
        self.kept: CacheReport | None = None
        self.is_ready = True

    def put(self, *generations: Generation) -> None:
        for gen in generations:
            name = gen.spec.model
            self.generations.setdefault(name, []).append(gen)
            versions = {g.spec.version for g in self.generations[name]}
            self.folders[name] = ModelFolder(name, "f", versions=tuple(sorted(versions)))

    def remove(self, model: str) -> None:
        self.generations.pop(model, None)
        self.folders.pop(model, None)

    def names(self) -> list[str]:
        return sorted(self.generations.keys() | self.folders.keys())

    def status(self, model: str) -> ModelStatus:
        if model not in self.generations and model not in self.folders:
            raise ModelNotFoundError(f"no model '{model}' in the repository")
        gens: Iterable[Generation] = self.generations.get(model, ())
        return describe(model, gens, self.folders.get(model), wanted=True)

    def statuses(self) -> list[ModelStatus]:
        return [self.status(name) for name in self.names()]

    def loads_on_request(self, model: str) -> bool:
        return self.on_demand

    @property
    def on_demand(self) -> bool:
        return True

    def waiting(self, model: str) -> int:
        return 0

    def adapters(self, model: str) -> list[AdapterView]:
        return self.of_models.get(model, [])

    def devices(self) -> list[DeviceReport]:
        return self.reports

    def host(self) -> HostReport:
        return HostReport(0.25, 8 * 2**30, 2**30)

    def cache(self) -> CacheReport | None:
        return self.kept

    @property
    def ready(self) -> bool:
        return self.is_ready

    @property
    def draining(self) -> bool:
        return not self.is_ready
