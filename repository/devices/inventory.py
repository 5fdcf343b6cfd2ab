"""What devices there are, how full they are, and how much of each may be used.

A device is called as torch calls it: "cpu" is host memory, "cuda:N" the Nth GPU that
CUDA_VISIBLE_DEVICES leaves, in its order. Figures are the devices' own and count everybody's use;
what this program reserved is the ledger's business, not known here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from repository.devices.cpu import Cpu
from repository.devices.nvml import Gpus
from repository.devices.ram import Ram
from repository.errors import ConfigError
from repository.reports import DeviceReport, GpuReport, GpuUse, HostReport
from repository.sizes import parse_bytes

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


class Inventory(Protocol):
    def devices(self) -> list[DeviceInfo]:
        """Measured now, "cpu" first. Blocks for milliseconds; a device that is lost is left out."""
        ...

    def gpus(self) -> tuple[str, ...]:
        """("cuda:0", "cuda:1"), as found at the start."""
        ...


class Devices:
    """This machine, or the part of it that the process was given."""

    def __init__(
        self, ram: Ram | None = None, gpus: Gpus | None = None, cpu: Cpu | None = None
    ) -> None:
        self._ram = ram or Ram()
        self._gpus = gpus or Gpus.of_this_process()
        self._cpu = cpu or Cpu()

    def gpus(self) -> tuple[str, ...]:
        return tuple(f"cuda:{index}" for index in range(self._gpus.count))

    def devices(self) -> list[DeviceInfo]:
        memory = self._ram.read()
        used = memory.total - memory.free
        found = [DeviceInfo("cpu", "host memory", memory.total, used, memory.free)]
        for index in range(self._gpus.count):
            gpu = self._gpus.read(index)
            if gpu is not None:
                found.append(
                    DeviceInfo(
                        device=f"cuda:{index}",
                        name=gpu.name,
                        total=gpu.total,
                        used=gpu.total - gpu.free,
                        free=gpu.free,
                        uuid=gpu.uuid,
                        utilization=gpu.utilization,
                        power_w=gpu.power_w,
                        temperature_c=gpu.temperature_c,
                    )
                )
        return found

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
                )
            )
        return tuple(found)

    def close(self) -> None:
        self._gpus.close()


def reports(
    devices: Iterable[DeviceInfo], held: Mapping[str, tuple[int, int]]
) -> list[DeviceReport]:
    """What each device says of itself, beside our own: `held` is (budget, reserved) of each that
    models may use. (What is free to us is the budget's business.)"""
    infos = {info.device: info for info in devices}
    found = []
    for device, (budget, reserved) in held.items():
        told: dict[str, Any] = {"device": device, "name": device}
        if device in infos:
            told = asdict(infos[device])
            del told["free"]
        found.append(DeviceReport(budget=budget, reserved=reserved, **told))
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
