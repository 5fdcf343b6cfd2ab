"""What Marqo's clients read: texts where others have numbers, and devices in Marqo's words.

"cpu" is "cpu", the first GPU ("cuda:0" everywhere else) is "cuda", another one "cuda:1" and so on.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

from repository.lifecycle.states import State
from repository.lifecycle.status import ModelStatus
from repository.reports import GpuReport, HostReport

GIB = 1 << 30
# The oldest server that pip's newest clients do not warn of.
SPEAKS = "2.23.1"
FIRST_GPU = "cuda:0"
UNKNOWN = "unknown"


class Greeting(msgspec.Struct):
    """`version`: of Marqo, whose clients compare it; `server_version`: our own."""

    message: str
    server: str
    server_version: str
    version: str = SPEAKS


class LoadedModel(msgspec.Struct):
    model_name: str
    model_device: str


class LoadedModels(msgspec.Struct):
    """One row for each model and each device that it is loaded on."""

    models: list[LoadedModel]


class Ejected(msgspec.Struct):
    message: str
    result: Literal["success"] = "success"


class CpuInfo(msgspec.Struct):
    cpu_usage_percent: str
    memory_used_percent: str
    memory_used_gb: str


class CudaDevice(msgspec.Struct):
    device_id: int
    device_name: str
    memory_used: str
    total_memory: str
    utilization: str
    memory_used_percent: str


class CudaInfo(msgspec.Struct):
    cuda_devices: list[CudaDevice]


def word_of(device: str) -> str:
    """Marqo's word for one of our devices."""
    return "cuda" if device == FIRST_GPU else device


def devices_of(status: ModelStatus) -> list[str]:
    """Marqo's words for the devices on which it serves now."""
    return sorted({word_of(g.device) for g in status.generations if g.state is State.READY})


def loaded_models(statuses: Iterable[ModelStatus]) -> LoadedModels:
    return LoadedModels([LoadedModel(s.name, device) for s in statuses for device in devices_of(s)])


def ejected(model: str, device: str) -> Ejected:
    """`model`, `device` as they were asked for; without a device: from all."""
    where = f" from device `{device}`" if device else ""
    return Ejected(f"successfully eject model_name `{model}`{where}")


def cpu_info(host: HostReport) -> CpuInfo:
    return CpuInfo(
        cpu_usage_percent=_percent(host.busy),
        memory_used_percent=_percent(host.used / host.total if host.total else 0.0),
        memory_used_gb=f"{host.used / GIB:.1f}",
    )


def cuda_info(gpus: Iterable[GpuReport]) -> CudaInfo:
    return CudaInfo(
        [
            CudaDevice(
                device_id=gpu.index,
                device_name=gpu.name,
                memory_used=f"{gpu.used / GIB:.1f} GiB",
                total_memory=f"{gpu.total / GIB:.1f} GiB",
                utilization=UNKNOWN if gpu.utilization is None else _percent(gpu.utilization),
                memory_used_percent=_percent(gpu.used / gpu.total if gpu.total else 0.0),
            )
            for gpu in gpus
        ]
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
