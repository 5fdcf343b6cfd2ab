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
from repository.adapting.desk import Desk
from repository.adapting.shelf import Shelf
from repository.brought import BroughtFiles
from repository.budgeting import ledgers
from repository.cache import ResponseCache
from repository.demand import Demand
from repository.devices.inventory import Devices
from repository.devices.readings import Readings
from repository.estimates import Estimates
from repository.events import EventBus
from repository.folder.scan import Scanner
from repository.folder.settle import Settler
from repository.folder.stamps import restat
from repository.folder.watch import Watcher
from repository.gauges import Gauges
from repository.hosts import snapshots
from repository.hosts.choose import make_host
from repository.hosts.visible import ALONE
from repository.hosts.zygotes import Zygotes
from repository.journal import Journal
from repository.life import Means
from repository.lifecycle.generation import Generation
from repository.lifecycle.pins import Pins
from repository.lifecycle.status import ModelStatus, describe, has_failed
from repository.lifecycle.wishes import Wishes
from repository.lookout import Lookout
from repository.measuring import Measuring
from repository.names import check_name
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
from repository.serving import Serving
from repository.sleeping import Sleeping
from repository.snapshot import Snapshot

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


class Repository(Sleeping, Pinning, Serving, Gauges):
    """One repository of models. Everything happens on the event loop that entered `running`."""

    def __init__(
        self, options: Options, observer: Observer | None = None, devices: Devices | None = None
    ) -> None:
        self.options = options
        self.root = options.root
        self.events = EventBus()
        self._observer = observer or Observer()
        self._cache = ResponseCache(options.response_cache) if options.response_cache else None
        self._devices = devices or Devices()
        self._gpu_use = Readings(self._devices.gpu_use)
        self._state_dir = options.state_dir or options.root / ".modeldepot"
        self._zygotes = Zygotes(self._state_dir)
        self._draining = False
        self._unloading = set()
        self._calls = set()
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
                options.roots,
                trust_code=options.trust_code,
                gpus=self._devices.gpus(),
                config_name=options.config_name,
                completes=options.completes,
                caches=self._cache is not None,
            ),
            Settler(options.settle_s),
            self._tell,
            self._observer,
            settle_s=options.settle_s,
            follows=self._watches,
            mounts_s=options.poll_s,
        )
        brought = BroughtFiles(self._state_dir)
        self._overrides = Overrides(options, self._models, self._lookout, brought)
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
                extra={ALONE: self._devices.visible(), "auto_complete": options.completes},
                caller=self,
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
            retries=options.load_retries,
            cache=self._cache,
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
            stack.push_async_callback(self._unloads_over)
            await stack.enter_async_context(self._models.running())
            await self._measuring.look()  # before anything is given away
            measuring = asyncio.create_task(self._measuring.run(), name="measuring")
            stack.push_async_callback(_end, measuring)
            await self._lookout.look()
            eyes = asyncio.create_task(self._keep_looking(), name="lookout")
            stack.push_async_callback(_end, eyes)
            stack.callback(self.drain)
            yield

    async def _unloads_over(self) -> None:
        if self._unloading:
            await asyncio.wait(self._unloading)

    async def _recall(self) -> None:
        """What was said by call before this start, as if it had just been said."""
        journal, shelf = self._journal, self._desk.shelf
        self._models.wishes.recall(journal.words)
        self._models.pins.recall(journal.pins)
        await self._overrides.recall(journal.overrides, journal.mounts, journal.words)
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
                watchers = [Watcher(r, options.watch, options.poll_s) for r in options.roots]
                eyes.create_task(self._lookout.watch(*watchers))

    async def _start_up(self) -> None:
        """Ready is when all that lay in the folder at the start has settled, and its loads too."""
        await self._lookout.settle(SETTLES_AT_START * self.options.settle_s)
        self._looked = True
        for gen in [g for of in self._models.generations.values() for g in of]:
            await gen.settled.wait()
        self._started = True
        self.events.publish("server.ready", models=len(self._models.folders))

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
