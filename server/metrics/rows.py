"""What a reading means as samples: one function for each kind of row. Pure; no text is made here.

Histograms and counters that were counted elsewhere are put as they are.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from importlib import metadata

from repository.lifecycle.placement import HOST
from repository.lifecycle.status import Public
from repository.reports import CacheReport, DeviceReport, Lookups
from server.metrics import names
from server.metrics.counts import Values
from server.metrics.lines import Sheet
from server.metrics.meter import UNKNOWN_MODEL
from server.metrics.reading import GenerationRow, ModelRow, Reading, WorkRow
from server.metrics.tally import Tally

ADAPTER_STATES = ("registered", "loading", "loaded", "failed")


def put_model(sheet: Sheet, model: ModelRow) -> None:
    for version, state in model.versions.items():
        for word in Public:
            sheet.add(names.MODEL_STATE, word is state, model.name, str(version), word)
    if model.changed_at is not None:
        sheet.add(names.MODEL_CHANGED, model.changed_at, model.name)
    for device, up in model.workers.items():
        sheet.add(names.WORKER_UP, up, model.name, device)
    _put_what_some_have(sheet, model)
    told: set[int] = set()
    for row in sorted(model.rows, key=lambda r: not r.ready):  # what serves is what people join on
        if row.version not in told:
            told.add(row.version)
            where = (row.backend, row.device, str(row.serial))
            sheet.add(names.MODEL_INFO, 1, model.name, str(row.version), *where)
        _put_generation(sheet, model.name, row)


def _put_what_some_have(sheet: Sheet, model: ModelRow) -> None:
    if model.waiting is not None:
        sheet.add(names.DEMAND_WAITING, model.waiting, model.name)
    if model.asleep is not None:
        sheet.add(names.MODEL_ASLEEP, model.asleep, model.name)
    if model.pinned:
        sheet.add(names.MODEL_PINNED, 1, model.name)
    if model.adapters:
        _put_adapters(sheet, model)


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
    version, add = str(row.version), sheet.add
    for device, size in row.estimated.items():
        add(names.MODEL_ESTIMATED, size, model, version, device)
    for device, size in (row.reserved or {row.device: 0}).items():
        add(names.MODEL_RESERVED, size, model, version, device)
    for device, kinds in row.measured.items():
        for kind, size in kinds.items():
            add(names.MODEL_MEMORY, size, model, version, device, kind)
    if row.measured:
        add(names.WORKER_MEMORY, _on_host(row), model, row.device)


def put_work(sheet: Sheet, model: str, work: Iterable[WorkRow]) -> None:
    for version, leases, waiting, executions, samples, lookups in work:
        labels = (model, str(version))
        sheet.add(names.IN_FLIGHT, leases, *labels)
        sheet.add(names.QUEUE_LENGTH, waiting, *labels)
        sheet.add(names.EXECUTIONS, executions, *labels)
        sheet.add(names.SAMPLES, samples, *labels)
        if lookups is not None:
            _put_lookups(sheet, lookups, *labels)


def _put_lookups(sheet: Sheet, lookups: Lookups, *labels: str) -> None:
    sheet.add(names.CACHE_HITS, lookups.hits, *labels)
    sheet.add(names.CACHE_MISSES, lookups.misses, *labels)


def _on_host(row: GenerationRow) -> int:
    """Whatever it is for, and in whose ledger."""
    return sum(sum(row.measured.get(device, {}).values()) for device in ("cpu", HOST))


def put_tally(sheet: Sheet, model: str, version: int, tally: Tally) -> None:
    number = str(version) if version else ""
    for (protocol, outcome), count in tally.requests.items():
        sheet.add(names.REQUESTS, count, model, number, protocol, outcome)
    if model == UNKNOWN_MODEL:
        return
    sheet.add(names.EXECUTIONS, tally.executions, model, number)
    sheet.add(names.SAMPLES, tally.samples, model, number)
    if tally.lookups is not None:
        _put_lookups(sheet, tally.lookups, model, number)
    for kind, tokens in tally.tokens.items():
        sheet.add(names.TOKENS, tokens, model, number, kind)
    if tally.first is not None:
        sheet.add_buckets(names.FIRST_TOKEN, tally.first, model, number)
    if not sum(tally.duration.counts):
        return
    sheet.add(names.PHASES, tally.queue_s, model, number, "queue")
    sheet.add(names.PHASES, tally.input_s, model, number, "input")
    sheet.add(names.PHASES, tally.compute_s, model, number, "compute")
    sheet.add(names.PHASES, tally.output_s, model, number, "output")
    sheet.add_buckets(names.DURATION, tally.duration, model, number)
    if tally.queue is not None and tally.batch is not None:
        sheet.add_buckets(names.QUEUED, tally.queue, model, number)
        sheet.add_buckets(names.BATCH_SIZE, tally.batch, model)


def put_counts(sheet: Sheet, counts: Values) -> None:
    for family, values in counts.items():
        sheet.put(family, values)


def put_server(sheet: Sheet, reading: Reading, build: tuple[str, ...]) -> None:
    """All that is of no model in particular."""
    sheet.add(names.BUILD_INFO, 1, *build)
    sheet.add(names.SERVER_READY, reading.ready)
    sheet.add(names.SERVER_DRAINING, reading.draining)
    for word in Public:
        sheet.add(names.MODELS, 0, word)
    for model in reading.models:
        sheet.add(names.MODELS, 1, model.state)
    put_counts(sheet, reading.server)
    for family, histograms in reading.buckets.items():
        for labels, buckets in histograms.items():
            sheet.add_buckets(family, buckets, *labels)
    if reading.cache is not None:
        _put_cache(sheet, reading.cache)
    used = _used(reading.models) if reading.devices else {}
    for device in reading.devices:
        _put_device(sheet, device, used)


def _put_cache(sheet: Sheet, cache: CacheReport) -> None:
    sheet.add(names.CACHE_LIMIT, cache.limit)
    sheet.add(names.CACHE_SIZE, cache.size)
    sheet.add(names.CACHE_ENTRIES, cache.entries)
    sheet.add(names.CACHE_EVICTIONS, cache.evictions)


def _used(models: Iterable[ModelRow]) -> dict[str, int]:
    """device -> bytes, as workers say."""
    found: dict[str, int] = {}
    for model in models:
        for row in model.rows:
            for device, kinds in row.measured.items():
                found[device] = found.get(device, 0) + sum(kinds.values())
    return found


def gpu_of(device: str) -> str | None:
    """ "cuda:1" is GPU "1"; what is no GPU is None."""
    kind, _, index = device.partition(":")
    return (index or "0") if kind == "cuda" else None


def _put_device(sheet: Sheet, device: DeviceReport, used: Mapping[str, int]) -> None:
    sheet.add(names.DEVICE_BUDGET, device.budget, device.device)
    sheet.add(names.DEVICE_RESERVED, device.reserved, device.device)
    gpu = gpu_of(device.device)
    if gpu is None:
        return
    which = (gpu, device.uuid)
    up = device.total is not None and device.used is not None
    sheet.add(names.GPU_INFO, 1, *which, device.name, device.driver)
    sheet.add(names.GPU_UP, up, *which)
    sheet.add(names.GPU_BUDGET, device.budget, *which)
    sheet.add(names.GPU_RESERVED, device.reserved, *which)
    told = device.unattributed is not None
    ours = device.attributed if told else used.get(device.device, 0)
    sheet.add(names.GPU_ATTRIBUTED, ours, *which)
    if device.total is not None and device.used is not None:
        sheet.add(names.GPU_TOTAL, device.total, *which)
        sheet.add(names.GPU_USED, device.used, *which)
        sheet.add(names.GPU_FREE, device.total - device.used, *which)
        rest = device.unattributed
        rest = max(0, device.used - ours) if rest is None else rest
        sheet.add(names.GPU_UNATTRIBUTED, rest, *which)
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
