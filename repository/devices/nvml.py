"""NVIDIA GPUs through NVML, which needs no CUDA context: the front process never makes one.

A machine without the library, the driver or a GPU has no GPUs: said once in the log, never an
error. The order is CUDA_VISIBLE_DEVICES' (indices and UUIDs, MIG instances by UUID). Indices count
as NVML does, by PCI bus; CUDA does so only under CUDA_DEVICE_ORDER=PCI_BUS_ID, which whoever starts
a worker has to set for it.

A GPU in MIG mode is not a device, its instances are: CUDA can use nothing else of it, and of them only
one in a process. So a worker must see its own alone (`Gpus.visible`), and finds it as cuda:0.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

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
    def nvmlDeviceGetEnforcedPowerLimit(self, handle: Any) -> int: ...  # noqa: N802
    def nvmlDeviceGetMigMode(self, handle: Any) -> Any: ...  # noqa: N802
    def nvmlDeviceGetMaxMigDeviceCount(self, handle: Any) -> int: ...  # noqa: N802
    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: Any, index: int) -> Any: ...  # noqa: N802
    def nvmlSystemGetProcessName(self, pid: int) -> str: ...  # noqa: N802
    def nvmlSystemGetDriverVersion(self) -> str: ...  # noqa: N802


CORE_SENSOR = 0  # NVML_TEMPERATURE_GPU


@dataclass(frozen=True, slots=True)
class Gpu:
    """Bytes; `free` is what NVML calls free, so what the driver keeps counts as used. None: it does
    not tell, as a MIG instance does of what belongs to the whole GPU."""

    uuid: str
    name: str
    total: int
    free: int
    utilization: float | None
    power_w: float | None
    temperature_c: float | None
    memory_utilization: float | None = None  # 0..1: of the time, memory was read or written
    power_limit_w: float | None = None


class Found(NamedTuple):
    """`handle` is NVML's."""

    handle: Any
    uuid: str
    mig: bool = False


class Gpus:
    """The visible GPUs, found once; `read` asks NVML each time and may block for milliseconds."""

    def __init__(self, nvml: Nvml | None, visible: str | None = None) -> None:
        """`visible` is the value of CUDA_VISIBLE_DEVICES, None where it is not set."""
        self._nvml = nvml
        self._found: list[Found] = []
        self._alone = False  # each worker is to see its own GPU and no other
        self._lost: set[int] = set()
        self._open = False
        self.driver = ""  # its version, "" where it does not tell
        if nvml is None:
            return
        try:
            nvml.nvmlInit()
            self._open = True
            every = _every(nvml)
            self._found = _visible(nvml, every, visible)
        except nvml.NVMLError as error:
            log.info("no GPUs: NVML says %s", error)
            return
        self._alone = None in every or any(found.mig for found in self._found)
        self.driver = self._told(nvml.nvmlSystemGetDriverVersion) or ""

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
        return len(self._found)

    def visible(self, index: int) -> str:
        """What CUDA_VISIBLE_DEVICES must be, before it starts CUDA, in a worker that is to use this
        GPU; there it is cuda:0. "": it may stay as it is, and the GPU has the same name there."""
        return self._found[index].uuid if self._alone else ""

    def read(self, index: int) -> Gpu | None:
        """None while NVML cannot read it (fallen off the bus), which is logged once, and after
        `close`, which does not wait for a thread that reads."""
        nvml, found = self._nvml, self._found
        if nvml is None or index >= len(found):
            return None
        handle, uuid, mig = found[index]
        try:
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            name = nvml.nvmlDeviceGetName(handle)
        except nvml.NVMLError as error:
            if index not in self._lost and self._open:
                log.warning("cuda:%d cannot be read: NVML says %s", index, error)
            self._lost.add(index)
            return None
        if index in self._lost:
            log.info("cuda:%d can be read again", index)
        self._lost.discard(index)
        rates = None if mig else self._told(lambda: nvml.nvmlDeviceGetUtilizationRates(handle))
        celsius = self._told(lambda: nvml.nvmlDeviceGetTemperature(handle, CORE_SENSOR))
        return Gpu(
            uuid=uuid,
            name=name,
            total=int(memory.total),
            free=int(memory.free),
            utilization=None if rates is None else rates.gpu / 100,
            power_w=None if mig else self._watts(lambda: nvml.nvmlDeviceGetPowerUsage(handle)),
            temperature_c=None if celsius is None else float(celsius),
            memory_utilization=None if rates is None else rates.memory / 100,
            power_limit_w=(
                None if mig else self._watts(lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle))
            ),
        )

    def processes(self, index: int) -> list[GpuProcess]:
        """Those that compute on it; none where NVML does not tell. Blocks as `read` does."""
        nvml, devices = self._nvml, self._found
        if nvml is None or index >= len(devices):
            return []
        handle = devices[index].handle
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
            self._found = []
            try:
                self._nvml.nvmlShutdown()
            except self._nvml.NVMLError as error:
                log.debug("NVML did not shut down: %s", error)

    def _watts(self, ask: Callable[[], int]) -> float | None:
        milliwatts = self._told(ask)
        return None if milliwatts is None else milliwatts / 1000

    def _told(self, ask: Callable[[], T]) -> T | None:
        """Not every GPU tells everything."""
        assert self._nvml is not None
        try:
            return ask()
        except (self._nvml.NVMLError, *_errors_beside(self._nvml)):
            return None


def _errors_beside(nvml: Nvml) -> tuple[type[Exception], ...]:
    """What the library raises that is no NVMLError: where a driver is too old for a call, and of a
    process whose name is no UTF-8."""
    mismatch = getattr(nvml, "NVMLLibraryMismatchError", None)
    known = (mismatch,) if isinstance(mismatch, type) else ()
    return (UnicodeDecodeError, *known)


def _every(nvml: Nvml) -> list[Found | None]:
    """By NVML's index; None: it is lost, and CUDA may count without it."""
    every: list[Found | None] = []
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            every.append(Found(handle, nvml.nvmlDeviceGetUUID(handle)))
        except nvml.NVMLError as error:
            log.warning("GPU %d is left out: NVML says %s", index, error)
            every.append(None)
    return every


def _visible(nvml: Nvml, every: list[Found | None], visible: str | None) -> list[Found]:
    """In CUDA's order. As CUDA does, the list ends at the first entry that is no GPU."""
    if visible is None:
        return [part for gpu in every if gpu is not None for part in _usable(nvml, gpu)]
    found: list[Found] = []
    for entry in (part.strip() for part in visible.split(",")):
        gpu = _named(nvml, entry, every)
        if gpu is None:
            if entry not in ("", "-1", "NoDevFiles"):
                log.warning(
                    "CUDA_VISIBLE_DEVICES: no GPU is '%s'; it and what follows is left out", entry
                )
            break
        parts = _usable(nvml, gpu)
        if {part.uuid for part in parts} & {one.uuid for one in found}:
            break
        found += parts
    return found


def _named(nvml: Nvml, entry: str, every: list[Found | None]) -> Found | None:
    if entry.isascii() and entry.isdigit():
        return every[int(entry)] if int(entry) < len(every) else None
    if entry.startswith("MIG-"):
        try:
            handle = nvml.nvmlDeviceGetHandleByUUID(entry)
            return Found(handle, nvml.nvmlDeviceGetUUID(handle), mig=True)
        except nvml.NVMLError:
            return None
    alike = [gpu for gpu in every if gpu is not None and gpu.uuid.startswith(entry)]
    return alike[0] if entry.startswith("GPU-") and len(alike) == 1 else None


def _usable(nvml: Nvml, gpu: Found) -> list[Found]:
    """Itself, or in MIG mode the instances that it is divided into."""
    if gpu.mig:
        return [gpu]
    try:
        divided, _ = nvml.nvmlDeviceGetMigMode(gpu.handle)
        slots = nvml.nvmlDeviceGetMaxMigDeviceCount(gpu.handle) if divided else 0
    except nvml.NVMLError:  # a GPU that cannot be divided says so by an error
        return [gpu]
    if not divided:
        return [gpu]
    found: list[Found] = []
    for slot in range(slots):
        try:
            handle = nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu.handle, slot)
            found.append(Found(handle, nvml.nvmlDeviceGetUUID(handle), mig=True))
        except nvml.NVMLError:  # nothing is in this slot
            continue
    if not found:
        log.warning("%s is in MIG mode and has no instance: nothing can run on it", gpu.uuid)
    return found
