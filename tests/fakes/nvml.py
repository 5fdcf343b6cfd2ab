"""An NVML with the GPUs that a test gives it, to be changed while it runs."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any


class FakeNvmlError(Exception):
    pass


@dataclass
class FakeGpu:
    uuid: str
    name: str = "NVIDIA H200"
    total: int = 100
    free: int = 60
    busy_percent: int | None = 25
    power_mw: int | None = 70_500
    celsius: int | None = 41
    memory_percent: int = 12
    processes: list[tuple[int, int | None]] | None = field(default_factory=list)  # pid, bytes
    lost: bool = False


@dataclass
class FakeNvml:
    """`broken` is what nvmlInit says instead of working. `opened` counts inits minus shutdowns."""

    gpus: list[FakeGpu] = field(default_factory=list)
    mig: list[FakeGpu] = field(default_factory=list)
    broken: str = ""
    opened: int = 0
    names: dict[int, str] = field(default_factory=dict)  # of processes, where NVML can tell
    hangs: threading.Event | None = None  # a driver that answers once this is set
    NVMLError: type[Exception] = FakeNvmlError

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's names
        if self.broken:
            raise FakeNvmlError(self.broken)
        self.opened += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.opened -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:  # noqa: N802
        return self.gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> FakeGpu:  # noqa: N802
        for gpu in (*self.gpus, *self.mig):
            if gpu.uuid == uuid:
                return gpu
        raise FakeNvmlError("Not Found")

    def nvmlDeviceGetUUID(self, handle: FakeGpu) -> str:  # noqa: N802
        return handle.uuid

    def nvmlDeviceGetName(self, handle: FakeGpu) -> str:  # noqa: N802
        return handle.name

    def nvmlDeviceGetMemoryInfo(self, handle: FakeGpu) -> Any:  # noqa: N802
        if self.hangs is not None:
            self.hangs.wait()
        if handle.lost:
            raise FakeNvmlError("GPU is lost")
        return SimpleNamespace(
            total=handle.total, free=handle.free, used=handle.total - handle.free
        )

    def nvmlDeviceGetUtilizationRates(self, handle: FakeGpu) -> Any:  # noqa: N802
        return SimpleNamespace(gpu=_told(handle.busy_percent), memory=handle.memory_percent)

    def nvmlDeviceGetPowerUsage(self, handle: FakeGpu) -> int:  # noqa: N802
        return _told(handle.power_mw)

    def nvmlDeviceGetTemperature(self, handle: FakeGpu, sensor: int) -> int:  # noqa: N802
        assert sensor == 0
        return _told(handle.celsius)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: FakeGpu) -> list[Any]:  # noqa: N802
        if handle.processes is None:
            raise FakeNvmlError("Not Supported")
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in handle.processes]

    def nvmlSystemGetProcessName(self, pid: int) -> str:  # noqa: N802
        if pid not in self.names:
            raise FakeNvmlError("Not Found")
        return self.names[pid]


def _told(value: int | None) -> int:
    if value is None:
        raise FakeNvmlError("Not Supported")
    return value
