"""A repository without files, hosts or a planner: real generations that are stepped by hand.

Good for what faces show and how they answer. What a repository decides is tested on the real one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from repository.config import ModelConfig
from repository.errors import (
    ConflictError,
    DrainingError,
    LoadFailedError,
    ModelNotFoundError,
    RepositoryError,
)
from repository.events import EventBus
from repository.lifecycle.generation import Generation, Lease, Trigger, first_choice
from repository.lifecycle.placement import HOST, Placement
from repository.lifecycle.refusals import not_serving
from repository.lifecycle.states import TERMINAL, Event, State
from repository.lifecycle.status import ModelStatus, Public, describe
from repository.messages import InferRequest, InferResponse, Loaded
from repository.names import check_name
from repository.reports import (
    AdapterView,
    CacheReport,
    DeviceReport,
    DryRun,
    GpuUse,
    HostReport,
    LoadReport,
    Options,
    PinReport,
    Skill,
    SleepReport,
    StepReport,
    UnloadAllReport,
    UnloadReport,
)
from repository.repository import Repository
from repository.responding import Responses
from repository.snapshot import ModelFolder
from repository.spec import ModelSpec

UP = {
    State.QUEUED: (Event.ADMIT, Event.LOADED, Event.WARMED),
    State.LOADING: (Event.LOADED, Event.WARMED),
    State.WARMING: (Event.WARMED,),
}
DOWN = {
    State.QUEUED: (Event.RETIRE,),
    State.LOADING: (Event.RETIRE, Event.STOPPED),
    State.WARMING: (Event.RETIRE, Event.STOPPED),
    State.READY: (Event.RETIRE, Event.DRAINED, Event.STOPPED),
    State.DRAINING: (Event.DRAINED, Event.STOPPED),
    State.ASLEEP: (Event.RETIRE, Event.STOPPED),
    State.UNLOADING: (Event.STOPPED,),
    State.FAILING: (Event.STOPPED,),
}


def echo(request: InferRequest) -> InferResponse:
    return InferResponse(list(request.inputs))


class FakeRepository(Repository):
    """`add` a model, then load and unload it.

    fail       name -> what its loads raise
    awake      name -> why it cannot sleep
    bedless    name -> why it is unloaded instead of sleeping
    unpinned   name -> why its pins are not honoured
    answers    the model: a response, an error or a future of one for each request
    calls      what was asked for, in order
    load_gate  an Event that loads wait for
    """

    def __init__(self, root: Path = Path("models"), answers: Callable[..., Any] = echo) -> None:
        self.root = root
        self.options = Options(root)
        self.events = EventBus()
        self.answers = answers
        self.folders: dict[str, ModelFolder] = {}
        self.generations: dict[str, list[Generation]] = {}
        self.wanted: set[str] = set()
        self.fail: dict[str, RepositoryError] = {}
        self.awake: dict[str, str] = {}
        self.bedless: dict[str, str] = {}
        self.unpinned: dict[str, str] = {}
        self.unload_errors: dict[str, str] = {}
        self.plans: dict[str, DryRun] = {}
        self.calls: list[tuple[Any, ...]] = []
        self.load_gate: asyncio.Event | None = None
        self.opened: list[Responses] = []  # by `stream`
        self.hold_open = False  # what `stream` gives has not ended by itself
        self.is_ready = True
        self.is_draining = False
        self.entered = self.left = 0
        self.of_models: dict[str, list[AdapterView]] = {}  # model -> its adapters
        self._serial = 0

    @property
    def on_demand(self) -> bool:
        return False

    def loads_on_request(self, model: str) -> bool:
        return False

    def waiting(self, model: str) -> int:
        return 0

    # by the test --------------------------------------------------------------------------------

    def add(
        self,
        name: str,
        *versions: int,
        loaded: bool = False,
        n_bytes: int = 1000,
        config: ModelConfig | None = None,
        sources: dict[str, str] | None = None,
        **folder: Any,
    ) -> ModelFolder:
        numbers = versions or (1,)
        specs = {
            v: ModelSpec(
                name,
                v,
                f"print-{name}-{v}",
                config=config or ModelConfig(),
                sources=sources or {},
                backend="fake",
                bytes_needed=n_bytes,
            )
            for v in sorted(numbers, reverse=True)
        }
        made = ModelFolder(name, f"print-{name}", specs=specs, versions=numbers, **folder)
        self.folders[name] = made
        if loaded:
            self.bring_up(name)
        return made

    def begin(self, name: str, version: int | None = None) -> Generation:
        """A generation that is QUEUED."""
        specs = self.folders[name].specs
        self._serial += 1
        gen = Generation(
            self._serial,
            specs[version if version is not None else max(specs)],
            on_step=self._stepped,
            on_idle=lambda _: None,
            clock=time.monotonic,
            trigger=Trigger.API,
        )
        self.generations.setdefault(name, []).append(gen)
        self.wanted.add(name)
        return gen

    def bring_up(self, name: str, version: int | None = None) -> Generation:
        gen = self.begin(name, version)
        for event in UP[gen.state]:
            gen.step(event)
        gen.loaded = Loaded(platform="fake")
        gen.placement = gen.options[0]
        gen.held = dict(gen.placement.needs)
        return gen

    def bring_down(self, gen: Generation) -> None:
        for event in DOWN.get(gen.state, ()):
            gen.step(event)
        gen.held = {}

    def break_down(self, gen: Generation, error: BaseException) -> None:
        gen.fault(error)
        if gen.state not in TERMINAL:
            gen.step(Event.STOPPED)
        gen.held = {}

    def _stepped(self, gen: Generation, before: State) -> None:
        self.events.publish(
            "model.state", *gen.spec.key, gen.serial, before=str(before), state=str(gen.state)
        )

    # the facade ---------------------------------------------------------------------------------

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        self.entered += 1
        try:
            yield
        finally:
            self.left += 1

    def lease(
        self, model: str, version: int | None = None, parameters: Mapping[str, Any] | None = None
    ) -> Lease:
        folder = self._folder(check_name(model))
        gens = [
            g
            for g in self.generations.get(folder.name, ())
            if version in (None, g.spec.version) and g.state is State.READY
        ]
        if not gens:
            raise not_serving(model, version, self.status(model))
        return max(gens, key=lambda g: (g.spec.version, g.serial)).lease()

    def infer(self, gen: Generation, request: InferRequest) -> Any:
        """`answers` gives a response, an exception to fail with, or a future of its own."""
        found = self.answers(request)
        if isinstance(found, asyncio.Future):
            return found
        future: asyncio.Future[InferResponse] = asyncio.get_running_loop().create_future()
        if isinstance(found, BaseException):
            future.set_exception(found)
        else:
            future.set_result(found)
        return future

    def stream(self, gen: Generation, request: InferRequest) -> Responses:
        """`answers` gives one or a list of them, of which an exception is the last."""
        found = self.answers(request)
        responses = Responses(request)
        self.opened.append(responses)
        for each in found if isinstance(found, list) else [found]:
            if isinstance(each, BaseException):
                responses.end(each)
            else:
                responses.tell(each)
        if not self.hold_open:
            responses.end()
        return responses

    def room(self, model: str, version: int | None, size: int) -> memoryview | None:
        return None

    async def load(
        self,
        model: str,
        *,
        force: bool = False,
        trigger: Trigger = Trigger.API,
        config: Any = None,  # it is all the same to a model that does nothing
    ) -> LoadReport:
        self.calls.append(("load", model, force))
        gens = self.generations.get(self._folder(model).name, ())
        alive = [g for g in gens if g.state not in TERMINAL]
        asleep = any(g.state is State.ASLEEP for g in alive)
        return await self._up(model, force=force or asleep, old=alive)

    async def _up(self, model: str, *, force: bool, old: list[Generation]) -> LoadReport:
        folder = self._folder(model)
        if self.is_draining:
            raise DrainingError("the server is shutting down", retry_after_s=5.0)
        self.wanted.add(folder.name)
        if old and not force:
            return LoadReport(model, tuple(g.spec.version for g in old), True, 0.0)
        if self.load_gate is not None:
            await self.load_gate.wait()
        if error := self.fail.get(folder.name):
            self.break_down(self.begin(folder.name), error)
            raise error
        gen = self.bring_up(folder.name)
        for one in old:
            self.bring_down(one)
        return LoadReport(model, (gen.spec.version,), False, 0.01)

    async def unload(self, model: str) -> UnloadReport:
        self.calls.append(("unload", model))
        name = self._folder(model).name
        self.wanted.discard(name)
        if text := self.unload_errors.get(name):
            raise LoadFailedError(text)
        alive = [g for g in self.generations.get(name, ()) if g.state not in TERMINAL]
        freed = sum(g.reserved for g in alive)
        for gen in alive:
            self.bring_down(gen)
        return UnloadReport(name, len(alive), freed, 0.01)

    async def sleep(self, model: str) -> SleepReport:
        self.calls.append(("sleep", model))
        name = self._folder(model).name
        if self.is_draining:
            raise DrainingError("the server is shutting down", retry_after_s=5.0)
        gens = self.generations.get(name, ())
        alive = [g for g in gens if g.state not in TERMINAL and g.state is not State.ASLEEP]
        if name in self.awake or not any(g.state not in TERMINAL for g in gens):
            why = self.awake.get(name, "it is not loaded")
            raise ConflictError(f"model '{name}' cannot sleep: {why}")
        self.wanted.discard(name)
        freed = {"cpu": sum(g.reserved for g in alive)} if alive else {}
        why = self.bedless.get(name, "")
        for gen in alive:
            if why:
                self.bring_down(gen)
            else:
                for event in (Event.RETIRE, Event.SLEPT):
                    gen.step(event)
                gen.held = {HOST: gen.needed}
        asleep = [g for g in gens if g.state is State.ASLEEP]
        unloaded, held = len(alive) if why else 0, sum(g.reserved for g in asleep)
        return SleepReport(name, len(asleep), unloaded, why, freed, held, 0.25)

    async def wake(self, model: str) -> LoadReport:
        self.calls.append(("wake", model))
        name = self._folder(model).name
        alive = [g for g in self.generations.get(name, ()) if g.state not in TERMINAL]
        asleep = [g for g in alive if g.state is State.ASLEEP]
        report = await self._up(model, force=bool(asleep), old=alive)
        return replace(report, woken=bool(asleep))

    async def pin(self, model: str, pinned: bool) -> PinReport:
        self.calls.append(("pin", model, pinned))
        name = self._folder(model).name
        why = self.unpinned.get(name, "") if pinned else ""
        for gen in self.generations.get(name, ()):
            gen.pinned, gen.pin_refused = pinned and not why, why
        return PinReport(name, pinned, pinned and not why, why)

    async def unload_all(self) -> UnloadAllReport:
        done: list[UnloadReport] = []
        wrong: dict[str, str] = {}
        for name, gens in self.generations.items():
            if all(g.state in TERMINAL for g in gens):
                continue
            try:
                done.append(await self.unload(name))
            except RepositoryError as error:
                wrong[name] = str(error)
        return UnloadAllReport(tuple(done), wrong)

    async def dry_run(self, model: str) -> DryRun:
        name = self._folder(model).name
        return self.plans.get(name) or DryRun(name, True, 1000, 5000, "cpu", (), "it would load")

    def names(self) -> list[str]:
        return sorted(self.folders)

    def status(self, model: str) -> ModelStatus:
        folder = self._folder(model)
        gens = self.generations.get(folder.name, ())
        return describe(folder.name, gens, folder, wanted=folder.name in self.wanted)

    def statuses(self) -> list[ModelStatus]:
        return [self.status(name) for name in self.names()]

    @property
    def unwell(self) -> bool:
        return any(s.wanted and s.state is Public.FAILED for s in self.statuses())

    def steps(self, status: ModelStatus) -> list[StepReport]:
        return []

    def adapters(self, model: str) -> list[AdapterView]:
        return self.of_models.get(self._folder(model).name, [])

    async def adapters_now(self, model: str) -> list[AdapterView]:
        return self.adapters(model)

    async def gpus(self) -> GpuUse:
        return ()

    def host(self) -> HostReport:
        return HostReport(0.25, 16 << 30, 4 << 30)

    def cache(self) -> CacheReport | None:
        return None

    @property
    def skills(self) -> frozenset[Skill]:
        return frozenset()

    @property
    def has_gpu(self) -> bool:
        return False

    @property
    def durable(self) -> bool:
        return True

    def devices(self) -> list[DeviceReport]:
        gens = [g for of in self.generations.values() for g in of]
        held = {device: sum(g.held.get(device, 0) for g in gens) for device in ("cpu", HOST)}
        return [
            DeviceReport("cpu", "cpu", 10_000, held["cpu"]),
            DeviceReport(HOST, HOST, 5_000, held[HOST]),
        ]

    def expects(self, spec: ModelSpec) -> Placement:
        source = "estimate" if spec.config.memory is None else "config"
        return first_choice(spec)[0]._replace(source=source)

    def _folder(self, model: str) -> ModelFolder:
        for name, folder in self.folders.items():
            if model == name or model in folder.aliases:
                return folder
        raise ModelNotFoundError(f"Request for unknown model: '{model}' is not found")

    @property
    def ready(self) -> bool:
        return self.is_ready and not self.is_draining

    @property
    def draining(self) -> bool:
        return self.is_draining

    def drain(self) -> None:
        if not self.is_draining:
            self.is_draining = True
            self.events.publish("server.draining")
            self.events.close()
