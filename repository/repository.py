"""The facade: all that the server may ask of the repository.

It puts the parts together (folder, reconciler, hosts, devices) and turns their outcomes into reports
and errors. It decides nothing: what is wanted is in `wishes`, what happens next in `plan` and
`admission`, who acts in `reconciler`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

from repository.adapting.calls import AdapterCalls, check_adapter, with_adapters
from repository.adapting.desk import Desk
from repository.adapting.shelf import Shelf
from repository.devices.inventory import Devices, budgets, reports
from repository.dry_run import foresee
from repository.errors import (
    DrainingError,
    InvalidRequestError,
    ModelNotFoundError,
    RepositoryError,
    SupersededError,
)
from repository.events import EventBus
from repository.folder.scan import Scanner
from repository.folder.settle import Settler
from repository.folder.stamps import restat
from repository.folder.watch import Watcher
from repository.generate import GenerateRequest
from repository.hosts import snapshots
from repository.hosts.choose import make_host
from repository.hosts.zygotes import Zygotes
from repository.life import Means
from repository.lifecycle.generation import Generation, Lease, Trigger
from repository.lifecycle.ledger import MemoryLedger
from repository.lifecycle.refusals import not_serving, of_folder, of_generation
from repository.lifecycle.status import ModelStatus, describe, has_failed, text_of
from repository.lifecycle.wishes import Wishes
from repository.lookout import Lookout
from repository.messages import InferRequest, InferResponse
from repository.names import check_name, shown
from repository.observer import Observer
from repository.reconciler import Reconciler
from repository.rehearsal import rehearse
from repository.reports import (
    DeviceReport,
    DryRun,
    LoadReport,
    Options,
    UnloadAllReport,
    UnloadReport,
)
from repository.snapshot import ModelFolder, Snapshot
from repository.streaming import TokenStream

__all__ = [
    "DeviceReport",
    "DryRun",
    "LoadReport",
    "ModelStatus",
    "Options",
    "Repository",
    "UnloadAllReport",
    "UnloadReport",
]

log = logging.getLogger("modeldepot.folder")

SETTLES_AT_START = 3  # settle times; what is still being copied after them is left to the watcher


class Repository(AdapterCalls):
    """One repository of models. Everything happens on the event loop that entered `running`."""

    def __init__(
        self, options: Options, observer: Observer | None = None, devices: Devices | None = None
    ) -> None:
        self.options = options
        self.root = options.root
        self.events = EventBus()
        self._observer = observer or Observer()
        self._devices = devices or Devices()
        self._state_dir = options.state_dir or options.root / ".modeldepot"
        self._zygotes = Zygotes()
        self._draining = False
        self._looked = False  # what lay in the folder at the start has settled
        self._started = False
        self._seen = Snapshot()  # what was told last of the folder
        self._desk = Desk(Shelf(self.events), self._of, options)
        self._models = Reconciler(
            self._means(),
            self._ledgers(),
            _wishes(options),
            events=self.events,
            observer=self._observer,
            load_slots=options.load_slots,
            room_wait_s=options.room_wait_s,
            crash_limit=options.crash_limit,
        )
        self._lookout = Lookout(
            Scanner(
                options.root,
                trust_code=options.trust_code,
                gpus=self._devices.gpus(),
            ),
            Settler(options.settle_s),
            self._tell,
            self._observer,
            settle_s=options.settle_s,
            follows=self._watches,
        )

    def _means(self) -> Means:
        options = self.options
        return Means(
            make_host=partial(
                make_host,
                default_host=options.default_host,
                zygotes=self._zygotes,
                state_dir=self._state_dir,
                cpu_fallback=options.cpu_fallback,
                trust_code=options.trust_code,
            ),
            rehearse=rehearse,
            unchanged=lambda spec: asyncio.to_thread(restat, spec),
            phase=self._observer.phase,
            shelf=self._desk.shelf,
            load_timeout_s=options.load_timeout_s,
            drain_s=options.drain_s,
            stop_s=options.stop_s,
            max_queue=options.max_queue,
        )

    def _ledgers(self) -> dict[str, MemoryLedger]:
        found = budgets(self._devices.devices(), self.options.memory_budget)
        return {device: MemoryLedger(device, n_bytes) for device, n_bytes in found.items()}

    @property
    def _watches(self) -> bool:
        return self.options.mode != "none" and self.options.watch != "off"

    def _tell(self, snapshot: Snapshot) -> None:
        for problem in snapshot.problems:
            if problem not in self._seen.problems:
                log.warning("%s: %s", problem.rule, problem)
                self.events.publish("repository.problem", rule=problem.rule, message=str(problem))
        self._seen = snapshot
        self._models.observe(snapshot.models, starting=not self._looked)

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """Scans, starts what is wanted and watches; at the end unloads all and waits for it.

        Returns from its start once the first scan is done; models load meanwhile. Raises OSError if
        the repository cannot be read.
        """
        async with AsyncExitStack() as stack:
            stack.callback(self._devices.close)
            stack.callback(self._lookout.close)
            await asyncio.to_thread(snapshots.sweep, self._state_dir)
            stack.push_async_callback(self._zygotes.close)
            await stack.enter_async_context(self._models.running())
            await self._lookout.look()
            eyes = asyncio.create_task(self._keep_looking(), name="lookout")
            stack.push_async_callback(_end, eyes)
            stack.callback(self.drain)
            yield

    async def _keep_looking(self) -> None:
        options = self.options
        async with asyncio.TaskGroup() as eyes:
            eyes.create_task(self._start_up())
            if self._watches:
                watcher = Watcher(options.root, options.watch, options.poll_s)
                eyes.create_task(self._lookout.watch(watcher))

    async def _start_up(self) -> None:
        """Ready is when all that lay in the folder at the start has settled, and its loads too."""
        await self._lookout.settle(SETTLES_AT_START * self.options.settle_s)
        self._looked = True
        for gen in [g for of in self._models.generations.values() for g in of]:
            await gen.settled.wait()
        self._started = True
        self.events.publish("server.ready", models=len(self._models.folders))

    # use ----------------------------------------------------------------------------------------

    def lease(self, model: str, version: int | None = None) -> Lease:
        """A lease, not yet begun, on the newest READY generation; without a version, of the highest
        version that is READY. Aliases are followed.

        Raises ModelNotFoundError, InvalidNameError, VersionNotFoundError, ModelNotReadyError.
        """
        gen = self._models.routes.find(model, version)
        if gen is None:
            raise self._why_not(model, version)
        return gen.lease()

    def infer(self, gen: Generation, request: InferRequest) -> asyncio.Future[InferResponse]:
        """Call it between a lease's begin and end.

        Raises at once, before any device work: InvalidTensorError for a request that does not fit
        the model, InvalidRequestError, AdapterNotFoundError and AdapterRefusedError for the adapters
        that it names, QueueFullError. The future fails with InferenceFailedError, WorkerDiedError.
        """
        assert gen.signature is not None and gen.batcher is not None
        gen.signature.accept(request)
        if gen.rows is not None or request.parameters or not gen.signature.inputs:
            request = with_adapters(gen, request)
        return gen.batcher.submit(request)

    def generate(self, gen: Generation, request: GenerateRequest) -> TokenStream:
        """One sequence, as it is written. Call it between a lease's begin and end; close the stream
        when nobody reads it any more.

        Raises at once: InvalidRequestError where the model does not generate, QueueFullError. What
        the model says of the request (AdapterNotFoundError, ...) the stream raises.
        """
        if gen.streams is None:
            raise InvalidRequestError(
                f"model '{gen.spec.model}' does not generate text; its backend is "
                f"'{gen.spec.backend}'"
            )
        if request.adapter:
            check_adapter(gen, request.adapter)
        return gen.streams.open(request)

    def room(self, model: str, version: int | None, size: int) -> memoryview | None:
        """A place near where the model runs for a request's body of `size` bytes, given back when the
        last view of it dies. None: there is none, keep the body yourself.

        It is no lease: if the generation has ended when the body is there, the place is memory like
        any other.
        """
        gen = self._models.routes.find(model, version)
        return None if gen is None or gen.batcher is None else gen.batcher.room(size)

    def _why_not(self, name: str, version: int | None) -> RepositoryError:
        model = self._models.routes.model(name)
        if model in self._models.folders or self._of(model):
            return not_serving(name, version, self.status(model))
        check_name(name)
        why = self._seen.near(name)
        return ModelNotFoundError(
            f"Request for unknown model: '{shown(name)}' is not found{f': {why}' if why else ''}"
        )

    # wishes -------------------------------------------------------------------------------------

    async def load(
        self, model: str, *, force: bool = False, trigger: Trigger = Trigger.API
    ) -> LoadReport:
        """Wants `model`; returns once every version that its policy chooses serves.

        Looks at the files first. Joins a load in flight. `force` builds a new generation beside the
        old one even where nothing changed. Raises ModelNotFoundError, LoadFailedError (or a leaf),
        NoRoomError, SupersededError, ModelNotReadyError while its files are still being written.
        """
        began = time.perf_counter()
        name, known = await self._look_at(model)
        folder = self._loadable(name, known)  # from here on no await until it is wanted
        serving = [self._models.routes.find(name, v) for v in folder.specs]
        gens = self._models.want(name, force=force, trigger=trigger)
        for gen in gens:
            await gen.settled.wait()
        for gen in gens:
            if gen.error is not None and gen.ready_at is None:
                raise of_generation(gen, gen.error)
        if folder.errors:
            raise of_folder(folder)  # of a version that cannot even be tried
        if not gens or any(gen.ready_at is None for gen in gens):
            self._not_draining()
            raise SupersededError(
                f"the load of '{name}' was overtaken: it was unloaded, or its files changed again"
            )
        versions = tuple(gen.spec.version for gen in gens)
        return LoadReport(name, versions, serving == gens, time.perf_counter() - began)

    async def unload(self, model: str) -> UnloadReport:
        """Stops wanting it; returns once every generation of now has ended. Idempotent.

        Raises ModelNotFoundError.
        """
        return await self._end_of(self._model_of(model))

    async def unload_all(self) -> UnloadAllReport:
        """Every model. What cannot be unloaded is named in `errors`; the others go all the same."""
        names = self.names()
        running = [n for n in names if any(not g.ended.is_set() for g in self._of(n))]
        reports = await asyncio.gather(*map(self._end_of, names), return_exceptions=True)
        found = dict(zip(names, reports, strict=True))
        errors = {n: text_of(r) for n, r in found.items() if isinstance(r, BaseException)}
        unloaded = [r for n, r in found.items() if isinstance(r, UnloadReport) and n in running]
        return UnloadAllReport(tuple(unloaded), errors)

    async def dry_run(self, model: str) -> DryRun:
        """What a load would do now; it does nothing. Raises as `load` does before it starts."""
        name, known = await self._look_at(model, act=False)
        return foresee(self._models, self._loadable(name, known))

    async def _look_at(self, model: str, *, act: bool = True) -> tuple[str, ModelFolder | None]:
        """The model's own name, and its folder as it is now. `act` false: only to know of it."""
        self._not_draining()
        name = self._models.routes.model(check_name(model))
        folder = await self._lookout.fresh(name, act=act)
        self._not_draining()  # the look may have taken seconds
        return name, folder

    def _not_draining(self) -> None:
        if self._draining:
            raise DrainingError("the server is shutting down", retry_after_s=5.0)

    def _loadable(self, name: str, folder: ModelFolder | None) -> ModelFolder:
        if folder is None:
            self._known(name)
            raise ModelNotFoundError(f"the folder of model '{name}' is gone from the repository")
        # What served before is kept as long as its successor is broken: no reason to load that anew.
        if not folder.specs or any(p.version in (None, *folder.specs) for p in folder.errors):
            raise of_folder(folder)
        return folder

    async def _end_of(self, name: str) -> UnloadReport:
        began = time.perf_counter()
        going = self._models.unwant(name)
        held = sum(gen.reserved for gen in going)
        for gen in going:
            await gen.ended.wait()
        freed = held - sum(gen.reserved for gen in going)
        return UnloadReport(name, len(going), freed, time.perf_counter() - began)

    # truth --------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Every model of the repository (and any that still runs though its folder is gone)."""
        return sorted(self._models.folders.keys() | self._models.generations.keys())

    def status(self, model: str) -> ModelStatus:
        """Raises ModelNotFoundError, InvalidNameError."""
        return self._describe(self._model_of(model))

    def _describe(self, name: str) -> ModelStatus:
        models = self._models
        wanted, past = models.wishes.wants(name), models.history.get(name, ())
        return describe(name, self._of(name), models.folders.get(name), wanted=wanted, past=past)

    def _known(self, name: str) -> ModelFolder | None:
        """Its folder; None if that is gone and something of it still runs."""
        try:
            return self._models.known(name)
        except ModelNotFoundError:
            check_name(name)
            why = self._seen.near(name) or "is there a folder of that name with a model in it?"
            raise ModelNotFoundError(f"no model '{name}' in the repository: {why}") from None

    def statuses(self) -> list[ModelStatus]:
        """Of every model, by name."""
        return [self._describe(name) for name in self.names()]

    @property
    def unwell(self) -> bool:
        """Something that is wanted has failed."""
        models, wants = self._models, self._models.wishes.wants
        names = models.folders.keys() | models.generations.keys()
        return any(wants(n) and has_failed(self._of(n), models.folders.get(n)) for n in names)

    def devices(self) -> list[DeviceReport]:
        """Budget and reservations beside what each device says of itself."""
        held = {d: (of.capacity, of.held) for d, of in self._models.ledgers.items()}
        return reports(self._devices.devices(), held)

    @property
    def ready(self) -> bool:
        """The first scan is done and what was wanted at start has settled."""
        return self._started and not self._draining

    @property
    def draining(self) -> bool:
        return self._draining

    def drain(self) -> None:
        """Stops being ready and ends the event streams; `running` ends later."""
        if not self._draining:
            self._draining = True
            self.events.publish("server.draining")
            self.events.close()

    def _of(self, name: str) -> list[Generation]:
        return self._models.generations.get(name, [])

    def _model_of(self, name: str) -> str:
        model = self._models.routes.model(check_name(name))
        self._known(model)
        return model


def _wishes(options: Options) -> Wishes:
    return Wishes(
        everything=options.mode != "explicit" or "*" in options.load,
        named=[check_name(name) for name in options.load if name != "*"],
    )


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled() and (error := task.exception()):
        raise error
