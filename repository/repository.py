"""The facade: all that the server may ask of the repository.

It puts the parts together (folder, reconciler, hosts, devices) and turns their outcomes into reports
and errors. It decides nothing: what is wanted is in `wishes`, what happens next in `plan` and
`admission`, who acts in `reconciler`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

from repository.adapting import keeping
from repository.adapting.calls import check_adapter, with_adapters
from repository.adapting.desk import Desk
from repository.adapting.shelf import Shelf
from repository.budgeting import ledgers
from repository.demand import Demand, Take
from repository.devices.inventory import Devices
from repository.devices.readings import Readings
from repository.errors import (
    InvalidRequestError,
    ModelNotFoundError,
    RepositoryError,
)
from repository.estimates import Estimates
from repository.events import EventBus
from repository.folder.mounts import is_path
from repository.folder.scan import Scanner
from repository.folder.settle import Settler
from repository.folder.stamps import restat
from repository.folder.watch import Watcher
from repository.gauges import Gauges
from repository.generate import GenerateRequest
from repository.hosts import snapshots
from repository.hosts.choose import make_host
from repository.hosts.visible import ALONE
from repository.hosts.zygotes import Zygotes
from repository.journal import Journal
from repository.life import Means
from repository.lifecycle.generation import Generation, Lease
from repository.lifecycle.pins import Pins
from repository.lifecycle.refusals import not_serving
from repository.lifecycle.status import ModelStatus, describe, has_failed
from repository.lifecycle.wishes import Wishes
from repository.lookout import Lookout
from repository.measuring import Measuring
from repository.messages import InferRequest, InferResponse
from repository.names import check_name, shown
from repository.observer import Guarded, Observer
from repository.overriding import Overrides
from repository.pinning import Pinning
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
from repository.sleeping import Sleeping
from repository.snapshot import Snapshot
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


class Repository(Sleeping, Pinning, Gauges):
    """One repository of models. Everything happens on the event loop that entered `running`."""

    def __init__(
        self, options: Options, observer: Observer | None = None, devices: Devices | None = None
    ) -> None:
        self.options = options
        self.root = options.root
        self.events = EventBus()
        self._observer = observer or Observer()
        self._devices = devices or Devices()
        self._gpu_use = Readings(self._devices.gpu_use)
        self._state_dir = options.state_dir or options.root / ".modeldepot"
        self._zygotes = Zygotes(self._state_dir)
        self._draining = False
        self._looked = False  # what lay in the folder at the start has settled
        self._started = False
        self._seen = Snapshot()  # what was told last of the folder
        self._journal = Journal(self._state_dir, self.events)
        kinds = {info.device: info.name for info in self._devices.devices()}
        self._estimates = Estimates(self._state_dir, kinds)
        books = ledgers(self._devices.devices(), options)
        self._measuring = Measuring(
            lambda: [gen for of in self._models.generations.values() for gen in of],
            books,
            self._estimates,
            gpus=self._gpu_use_now,
            room=lambda: self._models.room_came(),
            bases=self._zygotes.memory,
        )
        shelf = Shelf(self.events, partial(keeping.note, self._journal))
        self._desk = Desk(shelf, self._of, options, kept=self._journal.kept)
        self._models = Reconciler(
            self._means(),
            books,
            _wishes(options, self._journal),
            events=self.events,
            observer=Guarded(self._observer, self._measuring),
            load_slots=options.load_slots,
            room_wait_s=options.room_wait_s,
            crash_limit=options.crash_limit,
            demand=Demand(most=options.demand_queue, patience_s=options.demand_timeout_s),
            min_residency_s=options.min_residency_s,
            why_not=self._why_not,
            pins=Pins(options.pin_cap, note=self._journal.pin),
            needs=self._estimates.needs,
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
            mounts_s=options.poll_s,
        )
        self._overrides = Overrides(options, self._models, self._lookout)
        self._desk.elsewhere = self._overrides.elsewhere

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
                extra={ALONE: self._devices.visible()},
            ),
            rehearse=rehearse,
            unchanged=lambda spec: asyncio.to_thread(restat, spec),
            phase=self._observer.phase,
            end=lambda gen, host, stop_s: self._measuring.end(gen, host, stop_s),
            shelf=self._desk.shelf,
            load_timeout_s=options.load_timeout_s,
            drain_s=options.drain_s,
            stop_s=options.stop_s,
            max_queue=options.max_queue,
        )

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
        """Recalls what was said before, scans, starts what is wanted and watches; at the end unloads
        all and waits for it.

        Returns from its start once the first scan is done; models load meanwhile. Raises OSError if
        the repository cannot be read; ConfigError if the state folder cannot be used, is another
        server's, or holds a journal that cannot be read.
        """
        async with AsyncExitStack() as stack:
            stack.callback(self._devices.close)
            stack.callback(self._lookout.close)
            stack.push_async_callback(self._journal.close)
            await self._journal.open(forget=self.options.forget)
            await self._estimates.open(forget=self.options.forget)
            stack.push_async_callback(self._estimates.write)
            await self._recall()
            await asyncio.to_thread(snapshots.sweep, self._state_dir)
            stack.push_async_callback(self._zygotes.close)
            stack.push_async_callback(self._overrides.over)
            await stack.enter_async_context(self._models.running())
            await self._measuring.look()  # before anything is given away
            measuring = asyncio.create_task(self._measuring.run(), name="measuring")
            stack.push_async_callback(_end, measuring)
            await self._lookout.look()
            eyes = asyncio.create_task(self._keep_looking(), name="lookout")
            stack.push_async_callback(_end, eyes)
            stack.callback(self.drain)
            yield

    async def _recall(self) -> None:
        """What was said by call before this start, as if it had just been said."""
        journal, shelf = self._journal, self._desk.shelf
        self._models.wishes.recall(journal.words)
        self._models.pins.recall(journal.pins)
        await self._overrides.recall(journal.overrides, journal.mounts)
        self._overrides.remembers = journal
        find = partial(keeping.recalled, journal.adapters, self._desk.home, self.options)
        adapters = await asyncio.to_thread(lambda: list(find()))
        for model, name, said in adapters:
            shelf.recall(model, name, said)

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
        if gen is None and is_path(model):
            model = self.named(model)
            gen = self._models.routes.find(model, version)
        if gen is None:
            raise self._why_not(model, version)
        return gen.lease()

    @property
    def on_demand(self) -> bool:
        """May a request load any model that it names? See `loads_on_request`."""
        return self.options.on_demand

    def demand(self, model: str, version: int | None, take: Take) -> asyncio.Future[None]:
        """For a request that could not have a lease: loads the model, waits for it, and gives `take` a
        lease that has begun, in the breath in which the model serves. Then the future is done; who
        cancels it waits no longer. All that wait for a model share one load.

        Raises at once what waiting cannot change (what `lease` raises; NoRoomError for what is too
        large), QueueFullError, DrainingError. The future fails with the same, and with
        StillLoadingError when it has taken too long.
        """
        self._not_draining()
        return self._models.wait_for(model, version, take)

    def waiting(self, model: str) -> int:
        """Requests that wait for it to load."""
        return self._models.demand.count(model)

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

    # truth --------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Every model of the repository (and any that still runs though its folder is gone)."""
        return sorted(self._models.folders.keys() | self._models.generations.keys())

    def status(self, model: str) -> ModelStatus:
        """Raises ModelNotFoundError, InvalidNameError; of a path, also OutOfBoundsError and
        InvalidRequestError."""
        return self._describe(self._model_of(model))

    def _describe(self, name: str) -> ModelStatus:
        models = self._models
        wanted, past = models.wishes.wants(name), models.history.get(name, ())
        return describe(name, self._of(name), models.folders.get(name), wanted=wanted, past=past)

    def statuses(self) -> list[ModelStatus]:
        """Of every model, by name."""
        return [self._describe(name) for name in self.names()]

    @property
    def unwell(self) -> bool:
        """Something that is wanted has failed."""
        models, wants = self._models, self._models.wishes.wants
        names = models.folders.keys() | models.generations.keys()
        return any(wants(n) and has_failed(self._of(n), models.folders.get(n)) for n in names)

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
            self._models.demand.close()
            self.events.publish("server.draining")
            self.events.close()

    def _of(self, name: str) -> list[Generation]:
        return self._models.generations.get(name, [])


def _wishes(options: Options, journal: Journal) -> Wishes:
    return Wishes(
        everything=options.mode != "explicit" or "*" in options.load,
        named=[check_name(name) for name in options.load if name != "*"],
        note=journal.word,
    )


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled() and (error := task.exception()):
        raise error
