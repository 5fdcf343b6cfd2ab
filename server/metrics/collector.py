"""Turns what the repository is right now into samples, at the scrape.

Two steps, because the truth may be read on the event loop's thread only and formatting is slow:
`read` copies plain values there, `SnapshotCollector` makes families of the copy in any thread. What
is not in the repository is not in the copy, so a removed model leaves no series.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from repository.lifecycle.generation import Generation
from repository.lifecycle.states import HOLDS_MEMORY, TERMINAL, State
from repository.lifecycle.status import PRECEDENCE, PUBLIC, ModelStatus, Public
from repository.reports import AdapterView
from repository.repository import DeviceReport, Repository
from server.metrics import names
from server.metrics.meter import UNKNOWN_MODEL
from server.metrics.names import Family
from server.metrics.tally import Buckets, Tallies, Tally

ADAPTER_STATES = ("registered", "loading", "loaded", "failed")


@dataclass(frozen=True, slots=True)
class GenerationRow:
    """One generation that has not ended. Bytes."""

    version: int
    serial: int
    backend: str
    device: str
    ready: bool
    estimated: int
    reserved: int
    measured: dict[str, int]
    leases: int
    waiting: int
    executions: int
    samples: int


@dataclass(frozen=True, slots=True)
class ModelRow:
    """`versions`: each version that runs, or was tried last; else the one that could be loaded (0:
    none). `workers`: device -> do they serve. `adapters`: by name. `waiting`: requests, for it to load
    (None: none ever do). `rows`: newest first."""

    name: str
    state: Public
    changed_at: float | None
    versions: dict[int, Public]
    workers: dict[str, bool]
    adapters: tuple[AdapterView, ...]
    waiting: int | None
    rows: tuple[GenerationRow, ...]


@dataclass(frozen=True, slots=True)
class Reading:
    models: tuple[ModelRow, ...] = ()
    devices: tuple[DeviceReport, ...] = ()
    tallies: dict[tuple[str, int], Tally] | None = None
    ready: bool = False
    draining: bool = False


def read(models: Repository, tallies: Tallies) -> Reading:
    """On the event loop's thread. Takes what may change meanwhile, and computes nothing."""
    statuses = models.statuses()
    known = {s.name: _known_versions(s) for s in statuses}
    return Reading(
        models=tuple(_model(s, models.adapters(s.name), _waiting(models, s)) for s in statuses),
        devices=tuple(models.devices()),
        tallies=tallies.copied(known),
        ready=models.ready,
        draining=models.draining,
    )


def _waiting(models: Repository, status: ModelStatus) -> int | None:
    """None where no request ever waits for a load."""
    return models.waiting(status.name) if models.on_demand else None


def _known_versions(status: ModelStatus) -> set[int]:
    alive = {g.spec.version for g in status.generations if g.state not in TERMINAL}
    return alive | set(status.folder.versions if status.folder else ())


def _model(status: ModelStatus, adapters: Iterable[AdapterView], waiting: int | None) -> ModelRow:
    gens = status.generations
    rows = tuple(_generation(g) for g in gens if g.state not in TERMINAL)
    return ModelRow(
        status.name,
        status.state,
        status.changed_at,
        _versions(status),
        _workers(gens),
        tuple(adapters),
        waiting,
        rows,
    )


def _versions(status: ModelStatus) -> dict[int, Public]:
    words: dict[int, set[Public]] = {}
    for gen in status.generations:
        if gen.state is not State.GONE:
            words.setdefault(gen.spec.version, set()).add(PUBLIC[gen.state])
    if not words:
        versions = status.folder.versions if status.folder else ()
        return {max(versions, default=0): status.state}
    return {v: next(p for p in PRECEDENCE if p in found) for v, found in words.items()}


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


def _generation(gen: Generation) -> GenerationRow:
    work = gen.work
    return GenerationRow(
        gen.spec.version,
        gen.serial,
        gen.spec.backend,
        gen.device,
        gen.state is State.READY,
        gen.spec.bytes_needed,
        gen.reserved,
        dict(gen.measured) if gen.state in HOLDS_MEMORY else {},
        gen.leases,
        work.waiting,
        work.executions,
        work.samples,
    )


class Sheet:
    """Samples by family. `add` sums what has the same labels: two generations of one version that
    run side by side during a reload are one series."""

    def __init__(self) -> None:
        self._values: dict[Family, dict[tuple[str, ...], float]] = {}
        self._buckets: dict[Family, dict[tuple[str, ...], Buckets]] = {}

    def add(self, family: Family, value: float, *labels: str) -> None:
        series = self._values.setdefault(family, {})
        series[labels] = series.get(labels, 0) + value

    def add_buckets(self, family: Family, buckets: Buckets, *labels: str) -> None:
        series = self._buckets.setdefault(family, {})
        if labels in series:
            series[labels].add(buckets)
        else:
            series[labels] = buckets.copy()

    def families(self) -> Iterator[Metric]:
        for family, values in self._values.items():
            kind = GaugeMetricFamily if family.kind == "gauge" else CounterMetricFamily
            metric = kind(family.full, family.help, labels=family.labels)
            for labels, value in values.items():
                metric.add_metric(labels, value)
            yield metric
        for family, histograms in self._buckets.items():
            yield _histogram(family, histograms)


def _histogram(family: Family, series: dict[tuple[str, ...], Buckets]) -> Metric:
    metric = HistogramMetricFamily(family.full, family.help, labels=family.labels)
    for labels, buckets in series.items():
        lines: list[tuple[str, float]] = []
        so_far = 0
        edges = [*(repr(b) for b in buckets.bounds), "+Inf"]
        for edge, count in zip(edges, buckets.counts, strict=True):
            so_far += count
            lines.append((edge, so_far))
        metric.add_metric(labels, lines, buckets.total)
    return metric


class SnapshotCollector(Collector):
    """Set `reading` before each collection."""

    def __init__(self) -> None:
        self.reading = Reading()
        self._build = build_info()

    def describe(self) -> Iterable[Metric]:
        return ()  # else registering would collect once

    def collect(self) -> Iterable[Metric]:
        sheet = Sheet()
        reading = self.reading
        sheet.add(names.BUILD_INFO, 1, *self._build)
        sheet.add(names.SERVER_READY, reading.ready)
        sheet.add(names.SERVER_DRAINING, reading.draining)
        for word in Public:
            sheet.add(names.MODELS, 0, word)
        for model in reading.models:
            _put_model(sheet, model)
        for key, tally in (reading.tallies or {}).items():
            _put_tally(sheet, *key, tally)
        for device in reading.devices:
            _put_device(sheet, device, reading.models)
        return sheet.families()


def _put_model(sheet: Sheet, model: ModelRow) -> None:
    sheet.add(names.MODELS, 1, model.state)
    for version, state in model.versions.items():
        for word in Public:
            sheet.add(names.MODEL_STATE, word is state, model.name, str(version), word)
    if model.changed_at is not None:
        sheet.add(names.MODEL_CHANGED, model.changed_at, model.name)
    for device, up in model.workers.items():
        sheet.add(names.WORKER_UP, up, model.name, device)
    if model.waiting is not None:
        sheet.add(names.DEMAND_WAITING, model.waiting, model.name)
    _put_adapters(sheet, model)
    told: set[int] = set()
    for row in sorted(model.rows, key=lambda r: not r.ready):  # what serves is what people join on
        if row.version not in told:
            told.add(row.version)
            where = (row.backend, row.device, str(row.serial))
            sheet.add(names.MODEL_INFO, 1, model.name, str(row.version), *where)
        _put_generation(sheet, model.name, row)


def _put_adapters(sheet: Sheet, model: ModelRow) -> None:
    for at, view in enumerate(model.adapters):
        one = at < names.MOST_ADAPTERS
        labels = (model.name, view.name if one else names.OTHERS)
        for word in ADAPTER_STATES:
            sheet.add(names.ADAPTER_STATE, word == view.state, *labels, word)
        sheet.add(names.ADAPTER_MEMORY, view.bytes, *labels)
        sheet.add(names.ADAPTER_REQUESTS, view.requests, *labels)
        sheet.add(names.ADAPTER_LOAD, view.loads, *labels, "success")
        sheet.add(names.ADAPTER_LOAD, view.failures, *labels, "failure")


def _put_generation(sheet: Sheet, model: str, row: GenerationRow) -> None:
    version = str(row.version)
    sheet.add(names.MODEL_ESTIMATED, row.estimated, model, version, row.device)
    sheet.add(names.MODEL_RESERVED, row.reserved, model, version, row.device)
    for kind, size in row.measured.items():
        sheet.add(names.MODEL_MEMORY, size, model, version, row.device, kind)
    sheet.add(names.IN_FLIGHT, row.leases, model, version)
    sheet.add(names.QUEUE_LENGTH, row.waiting, model, version)
    sheet.add(names.EXECUTIONS, row.executions, model, version)
    sheet.add(names.SAMPLES, row.samples, model, version)


def _put_tally(sheet: Sheet, model: str, version: int, tally: Tally) -> None:
    number = str(version) if version else ""
    for (protocol, outcome), count in tally.requests.items():
        sheet.add(names.REQUESTS, count, model, number, protocol, outcome)
    if model == UNKNOWN_MODEL:
        return
    sheet.add(names.EXECUTIONS, tally.executions, model, number)
    sheet.add(names.SAMPLES, tally.samples, model, number)
    for kind, tokens in tally.tokens.items():
        sheet.add(names.TOKENS, tokens, model, number, kind)
    if tally.first is not None:
        sheet.add_buckets(names.FIRST_TOKEN, tally.first, model, number)
    if not sum(tally.duration.counts):
        return
    sheet.add(names.PHASES, tally.queue_s, model, number, "queue")
    sheet.add(names.PHASES, tally.compute_s, model, number, "compute")
    sheet.add_buckets(names.DURATION, tally.duration, model, number)
    if tally.queue is not None and tally.batch is not None:
        sheet.add_buckets(names.QUEUED, tally.queue, model, number)
        sheet.add_buckets(names.BATCH_SIZE, tally.batch, model)


def _put_device(sheet: Sheet, device: DeviceReport, models: Iterable[ModelRow]) -> None:
    sheet.add(names.DEVICE_BUDGET, device.budget, device.device)
    sheet.add(names.DEVICE_RESERVED, device.reserved, device.device)
    kind, _, index = device.device.partition(":")
    if kind != "cuda":
        return
    which = (index or "0", device.uuid)
    up = device.total is not None and device.used is not None
    sheet.add(names.GPU_INFO, 1, *which, device.name)
    sheet.add(names.GPU_UP, up, *which)
    sheet.add(names.GPU_BUDGET, device.budget, *which)
    sheet.add(names.GPU_RESERVED, device.reserved, *which)
    ours = sum(
        sum(row.measured.values())
        for model in models
        for row in model.rows
        if row.device == device.device
    )
    sheet.add(names.GPU_ATTRIBUTED, ours, *which)
    if device.total is not None and device.used is not None:
        sheet.add(names.GPU_TOTAL, device.total, *which)
        sheet.add(names.GPU_USED, device.used, *which)
        sheet.add(names.GPU_FREE, device.total - device.used, *which)
        sheet.add(names.GPU_UNATTRIBUTED, max(0, device.used - ours), *which)
    if device.utilization is not None:
        sheet.add(names.GPU_UTILIZATION, device.utilization, *which)
    if device.power_w is not None:
        sheet.add(names.GPU_POWER, device.power_w, *which)


def build_info() -> tuple[str, str, str, str, str]:
    """From the installed packages' own records: importing torch here would cost a second and
    hundreds of megabytes."""
    torch = _version_of("torch")
    _, _, tag = torch.partition("+")
    cuda = tag if tag.startswith("cu") else ""
    onnxruntime = _version_of("onnxruntime-gpu") or _version_of("onnxruntime")
    return _version_of("modeldepot"), platform.python_version(), torch, onnxruntime, cuda


def _version_of(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""
