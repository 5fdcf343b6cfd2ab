"""An NVML with the GPUs that a test gives it, to be changed while it runs; and one that plays back what
a driver said (`tests/data/nvml`, made by `tests/fakes/record_nvml.py`)."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
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
    limit_mw: int | None = 700_000
    divided: bool | None = None  # in MIG mode; None: a GPU that cannot be
    parts: list[FakeGpu | None] = field(default_factory=list)  # its instances, None: an empty slot


@dataclass
class FakeNvml:
    """`broken` is what nvmlInit says instead of working. `opened` counts inits minus shutdowns."""

    gpus: list[FakeGpu] = field(default_factory=list)
    mig: list[FakeGpu] = field(default_factory=list)
    broken: str = ""
    opened: int = 0
    names: dict[int, str] = field(default_factory=dict)  # of processes, where NVML can tell
    driver: str = "550.54.15"
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

    def nvmlDeviceGetMigMode(self, handle: FakeGpu) -> list[int]:  # noqa: N802
        divided = _told(handle.divided)
        return [int(divided), int(divided)]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: FakeGpu) -> int:  # noqa: N802
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: FakeGpu, index: int) -> FakeGpu:  # noqa: N802
        part = handle.parts[index] if index < len(handle.parts) else None
        if part is None:
            raise FakeNvmlError("Not Found")
        return part

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return self.driver

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: FakeGpu) -> int:  # noqa: N802
        return _told(handle.limit_mw)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> FakeGpu:  # noqa: N802
        parts = [part for gpu in self.gpus for part in gpu.parts if part is not None]
        for gpu in (*self.gpus, *self.mig, *parts):
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


RECORDINGS = Path(__file__).resolve().parents[1] / "data" / "nvml"


class Replayed:
    """What a driver said, again, in its order; the last answer to a question is given for ever.

    A line of a recording: {"call", "args", "answer" or "error"}. A handle is the text by which the
    recorder named it: "gpu0", "gpu0/mig1", or the UUID that was asked for.
    """

    NVMLError: type[Exception] = FakeNvmlError

    def __init__(self, name: str) -> None:
        self._said: dict[str, deque[dict[str, Any]]] = {}
        for line in (RECORDINGS / f"{name}.jsonl").read_text().splitlines():
            entry = json.loads(line)
            self._said.setdefault(_question(entry["call"], entry["args"]), deque()).append(entry)

    def __getattr__(self, call: str) -> Callable[..., Any]:
        if not call.startswith("nvml"):
            raise AttributeError(call)
        return lambda *args: self._answer(call, list(args))

    def _answer(self, call: str, args: list[Any]) -> Any:
        question = _question(call, args)
        assert question in self._said, f"nobody recorded {question}"
        said = self._said[question]
        entry = said.popleft() if len(said) > 1 else said[0]
        if "error" in entry:
            raise FakeNvmlError(entry["error"])
        return _object(entry["answer"])


def _question(call: str, args: list[Any]) -> str:
    return f"{call}({', '.join(map(str, args))})"


def _object(said: Any) -> Any:
    if isinstance(said, dict):
        return SimpleNamespace(**said)
    return [_object(one) for one in said] if isinstance(said, list) else said
