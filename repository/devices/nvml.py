"""NVIDIA GPUs through NVML, which needs no CUDA context: the front process never makes one.

A machine without the library, the driver or a GPU has no GPUs: said once in the log, never an
error. The order is CUDA_VISIBLE_DEVICES' (indices and UUIDs, MIG instances by UUID). Indices count
as NVML does, by PCI bus; CUDA does so only under CUDA_DEVICE_ORDER=PCI_BUS_ID, which whoever starts
a worker has to set for it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from repository.reports import GpuProcess

T = TypeVar("T")

log = logging.getLogger(__name__)


class Nvml(Protocol):
    """What is used of the pynvml module; its functions raise `NVMLError`."""

    NVMLError: type[Exception]

    def nvmlInit(self) -> None: ...  # noqa: N802 - NVML's names
    def nvmlShutdown(self) -> None: ...  # noqa: N802
    def nvmlDeviceGetCount(self) -> int: ...  # noqa: N802
    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any: ...  # noqa: N802
    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Any: ...  # noqa: N802
    def nvmlDeviceGetUUID(self, handle: Any) -> str: ...  # noqa: N802
    def nvmlDeviceGetName(self, handle: Any) -> str: ...  # noqa: N802
    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any: ...  # noqa: N802
    def nvmlDeviceGetUtilizationRates(self, handle: Any) -> Any: ...  # noqa: N802
    def nvmlDeviceGetPowerUsage(self, handle: Any) -> int: ...  # noqa: N802
    def nvmlDeviceGetTemperature(self, handle: Any, sensor: int) -> int: ...  # noqa: N802
    def nvmlDeviceGetComputeRunningProcesses(self, handle: Any) -> list[Any]: ...  # noqa: N802
    def nvmlSystemGetProcessName(self, pid: int) -> str: ...  # noqa: N802


CORE_SENSOR = 0  # NVML_TEMPERATURE_GPU


@dataclass(frozen=True, slots=True)
class Gpu:
    """Bytes; `free` is what NVML calls free, so what the driver keeps counts as used."""

    uuid: str
    name: str
    total: int
    free: int
    utilization: float | None
    power_w: float | None
    temperature_c: float | None
    memory_utilization: float | None = None  # 0..1: of the time, memory was read or written


class Gpus:
    """The visible GPUs, found once; `read` asks NVML each time and may block for milliseconds."""

    def __init__(self, nvml: Nvml | None, visible: str | None = None) -> None:
        """`visible` is the value of CUDA_VISIBLE_DEVICES, None where it is not set."""
        self._nvml = nvml
        self._handles: list[Any] = []
        self._lost: set[int] = set()
        self._open = False
        if nvml is None:
            return
        try:
            nvml.nvmlInit()
            self._open = True
            self._handles = _visible(nvml, visible)
        except nvml.NVMLError as error:
            log.info("no GPUs: NVML says %s", error)

    @classmethod
    def of_this_process(cls) -> Gpus:
        try:
            import pynvml
        except ImportError:
            log.info("no GPUs: nvidia-ml-py is not installed")
            return cls(None)
        return cls(pynvml, os.environ.get("CUDA_VISIBLE_DEVICES"))

    @property
    def count(self) -> int:
        return len(self._handles)

    def read(self, index: int) -> Gpu | None:
        """None while NVML cannot read it (fallen off the bus), which is logged once."""
        nvml = self._nvml
        assert nvml is not None
        handle = self._handles[index]
        try:
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            uuid, name = nvml.nvmlDeviceGetUUID(handle), nvml.nvmlDeviceGetName(handle)
        except nvml.NVMLError as error:
            if index not in self._lost:
                log.warning("cuda:%d cannot be read: NVML says %s", index, error)
            self._lost.add(index)
            return None
        self._lost.discard(index)
        rates = self._told(lambda: nvml.nvmlDeviceGetUtilizationRates(handle))
        power_mw = self._told(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
        celsius = self._told(lambda: nvml.nvmlDeviceGetTemperature(handle, CORE_SENSOR))
        return Gpu(
            uuid=uuid,
            name=name,
            total=int(memory.total),
            free=int(memory.free),
            utilization=None if rates is None else rates.gpu / 100,
            power_w=None if power_mw is None else power_mw / 1000,
            temperature_c=None if celsius is None else float(celsius),
            memory_utilization=None if rates is None else rates.memory / 100,
        )

    def processes(self, index: int) -> list[GpuProcess]:
        """Those that compute on it; none where NVML does not tell. Blocks as `read` does."""
        nvml = self._nvml
        assert nvml is not None
        handle = self._handles[index]
        running = self._told(lambda: nvml.nvmlDeviceGetComputeRunningProcesses(handle)) or []
        found = []
        for one in running:
            pid = int(one.pid)
            name = self._told(partial(nvml.nvmlSystemGetProcessName, pid))
            used = None if one.usedGpuMemory is None else int(one.usedGpuMemory)
            found.append(GpuProcess(pid, os.path.basename(name) if name else None, used))
        return found

    def close(self) -> None:
        """Hands NVML back. Safe twice."""
        if self._open and self._nvml is not None:
            self._open = False
            self._handles = []
            try:
                self._nvml.nvmlShutdown()
            except self._nvml.NVMLError as error:
                log.debug("NVML did not shut down: %s", error)

    def _told(self, ask: Callable[[], T]) -> T | None:
        """Not every GPU tells everything: a MIG instance has no power figure of its own."""
        assert self._nvml is not None
        try:
            return ask()
        except self._nvml.NVMLError:
            return None


def _visible(nvml: Nvml, visible: str | None) -> list[Any]:
    """Handles in CUDA's order. As CUDA does, the list ends at the first entry that is no GPU."""
    every = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    if visible is None:
        return every
    uuids = [nvml.nvmlDeviceGetUUID(handle) for handle in every]
    found: list[Any] = []
    seen: set[str] = set()
    for entry in (part.strip() for part in visible.split(",")):
        handle = _named(nvml, entry, every, uuids)
        if handle is None:
            if entry not in ("", "-1", "NoDevFiles"):
                log.warning(
                    "CUDA_VISIBLE_DEVICES: no GPU is '%s'; it and what follows is left out", entry
                )
            break
        uuid = nvml.nvmlDeviceGetUUID(handle)
        if uuid in seen:
            break
        seen.add(uuid)
        found.append(handle)
    return found


def _named(nvml: Nvml, entry: str, every: list[Any], uuids: list[str]) -> Any | None:
    if entry.isascii() and entry.isdigit():
        return every[int(entry)] if int(entry) < len(every) else None
    if entry.startswith("MIG-"):
        try:
            return nvml.nvmlDeviceGetHandleByUUID(entry)
        except nvml.NVMLError:
            return None
    alike = [handle for handle, uuid in zip(every, uuids, strict=True) if uuid.startswith(entry)]
    return alike[0] if entry.startswith("GPU-") and len(alike) == 1 else None
