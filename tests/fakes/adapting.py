"""Models with adapters and without files: hosts that remember what they were told, and the calls of the
facade over a real reconciler."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

from repository.adapters.orders import AdapterOrder, AdapterReport
from repository.adapters.sources import AdapterSource
from repository.adapting.calls import AdapterCalls
from repository.adapting.desk import Desk
from repository.adapting.shelf import Shelf
from repository.errors import AdapterRefusedError, WorkerDiedError
from repository.lifecycle.generation import Generation
from repository.messages import Loaded
from repository.reconciler import Reconciler
from repository.reports import Options
from repository.spec import ModelSpec
from tests.adapters import source
from tests.fakes.heart import folder, reconciler, spec
from tests.fakes.host import FakeHost

ADAPTS = Loaded(abilities=("adapt",))


class AdaptingHost(FakeHost):
    """`applied`: name -> the last order that it took. `refuses`: fingerprints that it does not take;
    `adapt_s`: how long each call takes."""

    def __init__(self, *, adapt_s: float = 0.0, refuses: Iterable[str] = (), **rest: Any) -> None:
        super().__init__(loaded=rest.pop("loaded", ADAPTS), **rest)
        self.adapt_s = adapt_s
        self.refuses = set(refuses)
        self.applied: dict[str, AdapterOrder] = {}
        self._at_once = 0

    async def adapt(self, orders: Sequence[AdapterOrder]) -> list[AdapterReport]:
        self._at_once += 1
        assert self._at_once == 1, "two calls at once"
        try:
            await super().adapt(orders)
            if self.adapt_s:
                await asyncio.wait({self.died}, timeout=self.adapt_s)
            if self.died.done() or "stop" in self.calls:
                raise WorkerDiedError("it has died, or was stopped meanwhile")
        finally:
            self._at_once -= 1
        if not orders:
            return [AdapterReport(name, residence="device") for name in self.applied]
        return [self._carry_out(order) for order in orders]

    def _carry_out(self, order: AdapterOrder) -> AdapterReport:
        if order.remove:
            self.applied.pop(order.name, None)
            return AdapterReport(order.name)
        if order.fingerprint in self.refuses:
            return AdapterReport(order.name, error="no tensor matches a layer")
        self.applied[order.name] = order
        return AdapterReport(order.name, residence="host", rank=4, bytes=256)

    @property
    def has(self) -> dict[str, str]:
        return {name: order.fingerprint for name, order in self.applied.items()}


class _Desk(Desk):
    """`src` is the fingerprint of what lies there; one that begins with "bad" is none."""

    async def _source(self, model: str, name: str, src: str) -> tuple[AdapterSource, str]:
        await asyncio.sleep(0.01)
        if src.startswith("bad"):
            raise AdapterRefusedError(f"{src}: its header lies")
        return AdapterSource(name, source(name).path / src, src, facts=source().facts), src


class Calls(AdapterCalls):
    """`hosts`: all that were made, oldest first; `make` makes the next."""

    def __init__(self, tmp: Any, capacity: int = 1000, **lives: Any) -> None:
        self._desk = _Desk(Shelf(), self._of, Options(tmp))
        self.shelf = self._desk.shelf
        self.hosts: list[AdaptingHost] = []
        self.make = AdaptingHost
        self.models: Reconciler = reconciler(
            self._make_host,
            capacity,
            everything=True,
            lives={"shelf": self.shelf, **lives},
            events=self.shelf.events,
        )
        self.lying: dict[str, dict[str, AdapterSource]] = {}
        self.specs: dict[str, list[ModelSpec]] = {}

    def _make_host(self, what: ModelSpec) -> AdaptingHost:
        self.hosts.append(self.make())
        return self.hosts[-1]

    def drop(
        self,
        *adapters: AdapterSource,
        model: str = "m",
        print_: str = "f1",
        versions: Iterable[int] = (1,),
    ) -> None:
        """The folder of `model` is seen with exactly these adapters."""
        self.specs[model] = [spec(model, version, print_) for version in versions]
        self.lying[model] = {a.name: a for a in adapters}
        self.look()

    def look(self) -> None:
        self.models.observe({n: folder(*s, adapters=self.lying[n]) for n, s in self.specs.items()})

    def serving(self, model: str = "m") -> Generation:
        gen = self.models.routes.find(model)
        assert gen is not None
        return gen

    def states(self, model: str = "m") -> dict[str, str]:
        return {view.name: view.state for view in self.adapters(model)}

    def _model_of(self, name: str) -> str:
        model = self.models.routes.model(name)
        self.models.known(model)
        return model

    def _of(self, name: str) -> list[Generation]:
        return self.models.generations.get(name, [])

    def _not_draining(self) -> None:
        pass
