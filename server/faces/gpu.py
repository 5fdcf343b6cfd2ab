"""GET /v1/gpu/status, /v1/gpu/memory, POST /v1/gpu/purge: as PolarGrid documents them.

An MB is 2^20 bytes and a GB 2^30, as nvidia-smi counts. What a GPU does not tell is null. Without a
GPU the lists are empty; the driver is asked beside the event loop, and where it hangs the answer is
503 (device_silent).
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
from litestar import Router, get, post
from litestar.di import NamedDependency
from litestar.params import JSONBody

from repository.reports import GpuProcess, GpuReport
from repository.repository import Repository
from server.codecs.unloaded import Success, UnloadAllReply, unloaded_all

MB, GB = 1 << 20, 1 << 30


class GpuMemory(msgspec.Struct):
    total_mb: float
    used_mb: float
    free_mb: float
    total_gb: float
    used_gb: float
    free_gb: float
    percent_used: float


class Utilization(msgspec.Struct):
    """Percent of the time, of late, in which it computed, and in which its memory was in use."""

    gpu_percent: float | None
    memory_percent: float | None


class GpuView(msgspec.Struct):
    """`index`: N of the device "cuda:N"."""

    index: int
    name: str
    uuid: str
    memory: GpuMemory
    utilization: Utilization
    temperature_c: float | None


class ProcessView(msgspec.Struct):
    """`pid`: the machine's; inside a container it means nothing. `gpu`: the index of its GPU."""

    pid: int
    name: str | None
    memory_mb: float | None
    gpu: int


class GpuStatus(msgspec.Struct):
    timestamp: str
    gpus: list[GpuView]
    processes: list[ProcessView]
    total_gpus: int
    status: Success = "success"


class MemoryRow(msgspec.Struct):
    index: int
    total_gb: float
    used_gb: float
    free_gb: float
    percent_used: float
    percent_free: float


class MemoryReply(msgspec.Struct):
    """One row for each GPU, in their order."""

    timestamp: str
    memory: list[MemoryRow]
    status: Success = "success"


class PurgeRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`force`: also while requests run or wait."""

    force: bool = False


@get("/status", summary="What each GPU and its processes use", tags=["gpu"])
async def status(models: NamedDependency[Repository]) -> GpuStatus:
    """All that the driver tells of each GPU that this server may use, and who computes on them: also
    processes of others. Without a GPU the lists are empty."""
    gpus = await models.gpus()
    return GpuStatus(
        timestamp=_now(),
        gpus=[_gpu(gpu) for gpu in gpus],
        processes=[_process(one, gpu.index) for gpu in gpus for one in gpu.processes],
        total_gpus=len(gpus),
    )


@get("/memory", summary="How full each GPU is", tags=["gpu"])
async def memory(models: NamedDependency[Repository]) -> MemoryReply:
    """The driver's own figures, which count everybody's use. Without a GPU the list is empty."""
    return MemoryReply(_now(), [_row(gpu) for gpu in await models.gpus()])


@post("/purge", status_code=200, summary="Unload every model", tags=["gpu"])
async def purge(
    models: NamedDependency[Repository], data: JSONBody[PurgeRequest | None] = None
) -> UnloadAllReply:
    """Unloads every model, on every device, and answers when their memory is back. While a request
    runs or waits: 409, and nothing is unloaded; with `force` those that run may end first, as at any
    unload. A load in flight is given up. The body may be left out."""
    return unloaded_all(await models.purge(force=data is not None and data.force))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _gpu(gpu: GpuReport) -> GpuView:
    return GpuView(
        index=gpu.index,
        name=gpu.name,
        uuid=gpu.uuid,
        memory=GpuMemory(
            total_mb=_in(MB, gpu.total),
            used_mb=_in(MB, gpu.used),
            free_mb=_in(MB, gpu.free),
            total_gb=_in(GB, gpu.total),
            used_gb=_in(GB, gpu.used),
            free_gb=_in(GB, gpu.free),
            percent_used=_percent(gpu.used, gpu.total),
        ),
        utilization=Utilization(_part(gpu.utilization), _part(gpu.memory_utilization)),
        temperature_c=gpu.temperature_c,
    )


def _process(one: GpuProcess, index: int) -> ProcessView:
    return ProcessView(one.pid, one.name, None if one.used is None else _in(MB, one.used), index)


def _row(gpu: GpuReport) -> MemoryRow:
    used = _percent(gpu.used, gpu.total)
    return MemoryRow(
        index=gpu.index,
        total_gb=_in(GB, gpu.total),
        used_gb=_in(GB, gpu.used),
        free_gb=_in(GB, gpu.free),
        percent_used=used,
        percent_free=round(100 - used, 2),
    )


def _in(unit: int, n_bytes: int) -> float:
    return round(n_bytes / unit, 2)


def _percent(part: int, whole: int) -> float:
    return round(100 * part / whole, 2) if whole else 0.0


def _part(share: float | None) -> float | None:
    return None if share is None else round(100 * share, 2)


HANDLERS: list[Any] = [status, memory, purge]
router = Router("/v1/gpu", route_handlers=HANDLERS)
