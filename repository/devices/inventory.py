"""What devices there are, how full they are, and how much of each may be used.

A device is called as torch calls it: "cpu" is host memory, "cuda:N" the Nth GPU (or MIG instance) that
CUDA_VISIBLE_DEVICES leaves, in its order. Figures are the devices' own and count everybody's use;
what this program reserved is the ledger's business, not known here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Protocol

from repository.devices.cpu import Cpu
from repository.devices.nvml import Gpus
from repository.devices.ram import Ram
from repository.devices.readings import within
from repository.errors import ConfigError, DeviceSilentError
from repository.reports import DeviceReport, GpuReport, GpuUse, HostReport
from repository.sizes import parse_bytes

log = logging.getLogger(__name__)

NAMES = {"cpu": "host memory", "host": "host memory of models that sleep"}
START_S = 60.0  # how long a driver may take at the start
CPU_SHARE, GPU_SHARE = 0.8, 0.9  # of a device's memory, where nobody sets a budget


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """Sizes in bytes, used + free = total. None: the device does not tell."""

    device: str
    name: str
    total: int
    used: int
    free: int
    uuid: str = ""
    utilization: float | None = None  # 0..1
    power_w: float | None = None
    temperature_c: float | None = None
    driver: str = ""
    power_limit_w: float | None = None


class Inventory(Protocol):
    def devices(self) -> list[DeviceInfo]:
        """Measured now, "cpu" first. Blocks for milliseconds; a device that is lost is left out."""
        ...

    def gpus(self) -> tuple[str, ...]:
        """("cuda:0", "cuda:1"), as found at the start."""
        ...


class Devices:
    """This machine, or the part of it that the process was given. Where nobody says which GPUs, it looks
    for them, START_S seconds at the longest."""

    def __init__(
        self, ram: Ram | None = None, gpus: Gpus | None = None, cpu: Cpu | None = None
    ) -> None:
        self._ram = ram or Ram()
        self._gpus = gpus or _gpus_of_this_process()
        self._cpu = cpu or Cpu()

    def gpus(self) -> tuple[str, ...]:
        return tuple(f"cuda:{index}" for index in range(self._gpus.count))

    def visible(self) -> dict[str, str]:
        """Device -> what CUDA_VISIBLE_DEVICES must be in a worker that is to use it, which then finds
        it as cuda:0. Devices that are not in it have the same name in a worker."""
        found = {f"cuda:{index}": self._gpus.visible(index) for index in range(self._gpus.count)}
        return {device: visible for device, visible in found.items() if visible}

    def devices(self) -> list[DeviceInfo]:
        """GPUs whose driver hangs are left out."""
        gpus: GpuUse = ()
        if self._gpus.count:
            try:
                gpus = within(self.gpu_use, START_S)
            except DeviceSilentError as error:
                log.error("%s; until the next start nothing is loaded on a GPU", error)
        return self.beside(gpus)

    def beside(self, gpus: GpuUse) -> list[DeviceInfo]:
        """Host memory, measured now, and the GPUs as they told of themselves."""
        memory = self._ram.read()
        used = memory.total - memory.free
        host = DeviceInfo("cpu", NAMES["cpu"], memory.total, used, memory.free)
        return [host, *map(_info, gpus)]

    def host(self) -> HostReport:
        """Measured now, from /proc alone: a millisecond at most."""
        memory = self._ram.read()
        return HostReport(self._cpu.busy(), memory.total, memory.total - memory.free)

    def gpu_use(self) -> GpuUse:
        """All that NVML tells of each GPU, and who computes on it. Blocks; where a driver hangs, for
        ever (`readings`)."""
        found: list[GpuReport] = []
        for index in range(self._gpus.count):
            gpu = self._gpus.read(index)
            if gpu is None:
                continue
            found.append(
                GpuReport(
                    index=index,
                    name=gpu.name,
                    uuid=gpu.uuid,
                    total=gpu.total,
                    used=gpu.total - gpu.free,
                    free=gpu.free,
                    utilization=gpu.utilization,
                    memory_utilization=gpu.memory_utilization,
                    temperature_c=gpu.temperature_c,
                    processes=tuple(self._gpus.processes(index)),
                    power_w=gpu.power_w,
                    power_limit_w=gpu.power_limit_w,
                    driver=self._gpus.driver,
                )
            )
        return tuple(found)

    def close(self) -> None:
        self._gpus.close()


def _gpus_of_this_process() -> Gpus:
    """Where many GPUs sleep, the driver takes seconds to wake them; one that hangs takes for ever."""
    try:
        return within(Gpus.of_this_process, START_S)
    except DeviceSilentError as error:
        log.error("no GPUs until the next start: %s", error)
        return Gpus(None)


def _info(gpu: GpuReport) -> DeviceInfo:
    return DeviceInfo(
        device=f"cuda:{gpu.index}",
        name=gpu.name,
        total=gpu.total,
        used=gpu.used,
        free=gpu.free,
        uuid=gpu.uuid,
        utilization=gpu.utilization,
        power_w=gpu.power_w,
        temperature_c=gpu.temperature_c,
        driver=gpu.driver,
        power_limit_w=gpu.power_limit_w,
    )


def reports(
    devices: Iterable[DeviceInfo],
    held: Mapping[str, tuple[int, int]],
    ours: Mapping[str, int] = MappingProxyType({}),
) -> list[DeviceReport]:
    """What each device says of itself, beside our own: `held` is (budget, reserved) of each that
    models may use, `ours` the bytes that our processes have there. (What is free to us is the
    budget's business.)"""
    infos = {info.device: info for info in devices}
    found = []
    for device, (budget, reserved) in held.items():
        told: dict[str, Any] = {"device": device, "name": NAMES.get(device, device)}
        has = ours.get(device, 0)
        if device in infos:
            told = asdict(infos[device])
            del told["free"]
            if device != "cpu":
                told["unattributed"] = max(0, infos[device].used - has)
        found.append(DeviceReport(budget=budget, reserved=reserved, attributed=has, **told))
    return found


def default_budgets(devices: Iterable[DeviceInfo]) -> dict[str, int]:
    """Bytes that may be used of each device where nobody says: a share of its memory."""
    return {
        info.device: int(info.total * (CPU_SHARE if info.device == "cpu" else GPU_SHARE))
        for info in devices
    }


def budgets(devices: Iterable[DeviceInfo], wanted: Mapping[str, int]) -> dict[str, int]:
    """What is `wanted`, else the default. Raises ConfigError for a device that is not there."""
    found = default_budgets(devices)
    for device in wanted:
        if device not in found:
            raise ConfigError(
                f"memory budget for '{device}', which this machine does not have",
                hint=f"it has {', '.join(found)}",
            )
    return found | dict(wanted)


def parse_budgets(text: str) -> dict[str, int]:
    """Of "cpu=2GiB,cuda:0=70GiB", the bytes by device. Raises ConfigError for anything else."""
    found: dict[str, int] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        device, equals, size = (piece.strip() for piece in part.partition("="))
        if not equals or not _is_device(device):
            raise ConfigError(
                f"memory budget '{part}' is not DEVICE=SIZE; write cpu=2GiB or cuda:0=70GiB"
            )
        if device in found:
            raise ConfigError(f"memory budget for '{device}' is given twice")
        try:
            found[device] = parse_bytes(size)
        except ConfigError as error:
            raise ConfigError(
                f"memory budget for '{device}': {error.message}", hint=error.hint
            ) from error
    return found


def _is_device(name: str) -> bool:
    kind, _, index = name.partition(":")
    return name == "cpu" or (kind == "cuda" and index.isascii() and index.isdigit())
