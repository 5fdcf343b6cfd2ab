"""What the repository is right now, as plain values that another thread may look at.

The truth may be read on the event loop's thread only, and nobody else is served meanwhile: a thousand
models are read in slices, between which the loop does its other work. A model is read in one go; two
models may be told of two moments a few milliseconds apart.

What is not in the repository is not in the reading, so a removed model leaves no series.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from repository.errors import ModelNotFoundError
from repository.lifecycle.generation import Generation
from repository.lifecycle.placement import Memory
from repository.lifecycle.states import HOLDS_MEMORY, TERMINAL, State
from repository.lifecycle.status import PRECEDENCE, PUBLIC, ModelStatus, Public
from repository.reports import AdapterView, CacheReport, DeviceReport, HostReport, Lookups
from repository.repository import Repository
from server.metrics.buckets import Buckets
from server.metrics.counts import Labels, Values
from server.metrics.names import Family
from server.metrics.observer import MetricsObserver
from server.metrics.own import Told
from server.metrics.tally import Frozen, Tallies

SLICE_S = 0.0002  # of reading in one go


@dataclass(frozen=True, slots=True)
class GenerationRow:
    """One generation that has not ended. Bytes by device; `measured` also by kind. `load_s`: how long
    its load took, None before it served."""

    version: int
    serial: int
    backend: str
    device: str
    ready: bool
    estimated: dict[str, int]
    reserved: dict[str, int]
    measured: Memory
    load_s: float | None


class WorkRow(NamedTuple):
    """What it does: of one generation, and what changes all the time."""

    version: int
    leases: int
    waiting: int
    executions: int
    samples: int
    lookups: Lookups | None = None  # a copy; None where no answers are kept


@dataclass(frozen=True, slots=True)
class ModelRow:
    """`versions`: each version that runs, or was tried last; else the one that could be loaded (0:
    none). `workers`: device -> do they serve. `adapters`: by name. `waiting`: requests, for it to load
    (None: none ever do). `asleep`: None where it cannot. `rows`: newest first. `work`: of the same; two
    rows are alike whatever it is. `tags`: further labels of what has Triton's names."""

    name: str
    state: Public
    changed_at: float | None
    versions: dict[int, Public]
    workers: dict[str, bool]
    adapters: tuple[AdapterView, ...]
    waiting: int | None
    asleep: bool | None
    pinned: bool
    rows: tuple[GenerationRow, ...]
    work: tuple[WorkRow, ...] = field(default=(), compare=False)
    tags: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Reading:
    """`counts` and `tallies` by model; what has not changed since the last one is the same object.
    `own`: what models count themselves."""

    models: tuple[ModelRow, ...] = ()
    devices: tuple[DeviceReport, ...] = ()
    host: HostReport | None = None
    tallies: Mapping[str, Frozen] = field(default_factory=dict)
    counts: Mapping[str, Values] = field(default_factory=dict)
    server: Values = field(default_factory=dict)
    buckets: Mapping[Family, Mapping[Labels, Buckets]] = field(default_factory=dict)
    ready: bool = False
    draining: bool = False
    cache: CacheReport | None = None
    own: tuple[Told, ...] = ()


async def read(models: Repository, observer: MetricsObserver, tallies: Tallies) -> Reading:
    """On the event loop's thread. Takes what may change meanwhile, and computes nothing."""
    rows: list[ModelRow] = []
    own: list[Told] = []
    versions: dict[str, set[int]] = {}
    began = time.perf_counter()
    for name in models.names():
        if time.perf_counter() - began >= SLICE_S:
            await asyncio.sleep(0)
            began = time.perf_counter()
        try:
            status = models.status(name)
        except ModelNotFoundError:
            continue  # it has gone meanwhile
        versions[name] = _known_versions(status)
        rows.append(_model(status, models.adapters(name), _waiting(models, name)))
        own += _own(status)
    await asyncio.sleep(0)
    observer.keep(set(models.names()))

    def exists(model: str, version: int) -> bool:
        return version in versions.get(model, ()) or version in _versions_now(models, model)

    return Reading(
        models=tuple(rows),
        devices=tuple(models.devices()),
        host=models.host(),
        tallies=tallies.copied(exists),
        counts=observer.models(),
        server=observer.server.frozen(),
        buckets=observer.server.frozen_buckets(),
        own=tuple(own),
        ready=models.ready,
        draining=models.draining,
        cache=models.cache(),
    )


def _own(status: ModelStatus) -> list[Told]:
    """Of all that lives of it."""
    hosts = [g.host for g in status.generations if g.host is not None]
    return [Told(status.name, told) for host in hosts for told in host.figures()]


def _waiting(models: Repository, name: str) -> int | None:
    """None where no request ever waits for a load."""
    return models.waiting(name) if models.loads_on_request(name) else None


def _known_versions(status: ModelStatus) -> set[int]:
    alive = {g.spec.version for g in status.generations if g.state not in TERMINAL}
    return alive | set(status.folder.versions if status.folder else ())


def _versions_now(models: Repository, name: str) -> set[int]:
    """Of one that was not there when it was its turn."""
    try:
        return _known_versions(models.status(name))
    except ModelNotFoundError:
        return set()


def _model(status: ModelStatus, adapters: Iterable[AdapterView], waiting: int | None) -> ModelRow:
    gens = status.generations
    alive = [g for g in gens if g.state not in TERMINAL]
    return ModelRow(
        status.name,
        status.state,
        status.changed_at,
        _versions(status),
        _workers(gens),
        tuple(adapters),
        waiting,
        _asleep(alive),
        any(g.pinned for g in alive),
        tuple([_generation(g) for g in alive]),
        tuple([_work(g) for g in alive]),
        tuple(alive[0].spec.config.metric_tags.items()) if alive else (),
    )


def _asleep(alive: Sequence[Generation]) -> bool | None:
    if any(g.state is State.ASLEEP for g in alive):
        return not any(g.state is State.READY for g in alive)
    can = [g for g in alive if g.loaded is not None and "sleep" in g.loaded.abilities]
    return False if can else None


def _versions(status: ModelStatus) -> dict[int, Public]:
    words: dict[int, set[Public]] = {}
    for gen in status.generations:
        if gen.state is not State.GONE:
            words.setdefault(gen.spec.version, set()).add(PUBLIC[gen.state])
    if not words:
        versions = status.folder.versions if status.folder else ()
        return {max(versions, default=0): status.state}
    order = (*PRECEDENCE, Public.UNLOADED)
    return {v: next(p for p in order if p in found) for v, found in words.items()}


def _workers(newest_first: Sequence[Generation]) -> dict[str, bool]:
    """1 where something serves; 0 where the newest attempt of a version has failed."""
    up: dict[str, bool] = {}
    judged: set[int] = set()
    for gen in newest_first:
        if gen.state is State.READY:
            up[gen.device] = True
        elif gen.state in (State.FAILING, State.FAILED) and gen.spec.version not in judged:
            up.setdefault(gen.device, False)
        judged.add(gen.spec.version)
    return up


def _work(gen: Generation) -> WorkRow:
    work, lookups = gen.work, gen.lookups
    return WorkRow(
        gen.spec.version,
        gen.leases,
        work.waiting,
        work.executions,
        work.samples,
        None if lookups is None else replace(lookups),
    )


def _generation(gen: Generation) -> GenerationRow:
    holds = gen.state in HOLDS_MEMORY
    return GenerationRow(
        gen.spec.version,
        gen.serial,
        gen.spec.backend,
        gen.device,
        gen.state is State.READY,
        dict(gen.chosen.needs),
        dict(gen.held),
        {device: dict(kinds) for device, kinds in gen.measured.items()} if holds else {},
        None if gen.ready_at is None else gen.ready_at - gen.born_at,
    )
