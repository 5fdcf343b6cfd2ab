"""What devices there are, how full, and how much of each may be used."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from repository.devices.inventory import Devices, budgets, parse_budgets
from repository.devices.nvml import Gpus
from repository.devices.ram import Memory, Ram
from repository.errors import ConfigError
from repository.reports import GpuProcess
from tests.fakes.nvml import FakeGpu, FakeNvml

GIB = 1 << 30
UNLIMITED_V1 = 9223372036854771712


def machine(
    root: Path, *, total: int = 16 * GIB, available: int = 12 * GIB, groups: str = ""
) -> Ram:
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "meminfo").write_text(
        f"MemTotal: {total // 1024} kB\nMemFree: 1 kB\nMemAvailable: {available // 1024} kB\n"
        f"HugePages_Total: 0\n"
    )
    (root / "proc" / "self" / "cgroup").write_text(groups)
    return Ram(root / "proc", root / "cgroup")


def v2(folder: Path, limit: int | str, used: int, cache: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cache}\nactive_file 7\n")


def v1(folder: Path, limit: int, used: int, cache: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"inactive_file 1\ntotal_inactive_file {cache}\n")


# host memory --------------------------------------------------------------------------------------


def test_without_control_groups_the_machine_is_the_limit(tmp_path: Path):
    ram = machine(tmp_path)
    assert ram.read() == Memory(16 * GIB, 12 * GIB)
    (tmp_path / "proc" / "self" / "cgroup").unlink()
    assert ram.read() == Memory(16 * GIB, 12 * GIB)


def test_a_version_2_limit_counts_and_its_cache_is_free(tmp_path: Path):
    ram = machine(tmp_path, groups="0::/pod/box\n")
    v2(tmp_path / "cgroup" / "pod" / "box", 4 * GIB, 3 * GIB, cache=GIB)
    assert ram.read() == Memory(4 * GIB, 2 * GIB)


def test_where_a_group_is_slowed_down_is_its_limit(tmp_path: Path):
    ram = machine(tmp_path, groups="0::/pod\n")
    v2(tmp_path / "cgroup" / "pod", 4 * GIB, GIB)
    (tmp_path / "cgroup" / "pod" / "memory.high").write_text(f"{3 * GIB}\n")
    assert ram.read() == Memory(3 * GIB, 2 * GIB)
    (tmp_path / "cgroup" / "pod" / "memory.max").write_text("max\n")
    assert ram.read() == Memory(3 * GIB, 2 * GIB)
    (tmp_path / "cgroup" / "pod" / "memory.high").write_text("max\n")
    assert ram.read() == Memory(16 * GIB, 12 * GIB)


def test_the_tightest_ancestor_decides(tmp_path: Path):
    ram = machine(tmp_path, groups="0::/pod/box/job\n")
    v2(tmp_path / "cgroup" / "pod", 3 * GIB, int(2.5 * GIB))
    v2(tmp_path / "cgroup" / "pod" / "box", "max", GIB)
    v2(tmp_path / "cgroup" / "pod" / "box" / "job", 8 * GIB, GIB)
    assert ram.read() == Memory(3 * GIB, GIB // 2)


def test_a_version_1_limit_counts_also_beside_version_2(tmp_path: Path):
    ram = machine(tmp_path, groups="9:name=systemd:/\n4:cpu,memory:/box\n0::/\n")
    v1(tmp_path / "cgroup" / "memory", UNLIMITED_V1, 10 * GIB)
    v1(tmp_path / "cgroup" / "memory" / "box", 2 * GIB, 2 * GIB, cache=GIB)
    assert ram.read() == Memory(2 * GIB, GIB)


def test_in_a_container_the_mounted_root_is_the_own_group(tmp_path: Path):
    ram = machine(tmp_path, groups="4:memory:/docker/0123abc\n")
    v1(tmp_path / "cgroup" / "memory", GIB, GIB // 4)
    assert ram.read() == Memory(GIB, 3 * GIB // 4)


def test_a_group_outside_of_the_namespace_is_looked_for_inside_only(tmp_path: Path):
    ram = machine(tmp_path, groups="0::/../../other\n")
    v2(tmp_path / "cgroup", GIB, 0)
    v2(tmp_path / "other", 1, 0)
    assert ram.read() == Memory(GIB, GIB)


def test_a_group_above_its_limit_has_nothing_free(tmp_path: Path):
    ram = machine(tmp_path, groups="0::/\n")
    v2(tmp_path / "cgroup", GIB, 2 * GIB)
    assert ram.read() == Memory(GIB, 0)


def test_this_machine_has_memory():
    memory = Ram().read()
    assert 0 < memory.free <= memory.total


# GPUs ---------------------------------------------------------------------------------------------

A, B, C = (FakeGpu(f"GPU-{letter}0-1", total=100 + at) for at, letter in enumerate("abc"))
MIG = FakeGpu("MIG-7", total=10, free=9, busy_percent=None, power_mw=None)


@pytest.mark.parametrize(
    ("visible", "uuids"),
    [
        (None, ["GPU-a0-1", "GPU-b0-1", "GPU-c0-1"]),
        ("2,0", ["GPU-c0-1", "GPU-a0-1"]),
        (" 1 , GPU-a0 ", ["GPU-b0-1", "GPU-a0-1"]),
        ("GPU-c0-1", ["GPU-c0-1"]),
        ("MIG-7", ["MIG-7"]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("0,-1,1", ["GPU-a0-1"]),
        ("0,9,1", ["GPU-a0-1"]),
        ("0,GPU-", ["GPU-a0-1"]),
        ("1,MIG-8,0", ["GPU-b0-1"]),
        ("1,1,0", ["GPU-b0-1"]),
    ],
)
def test_gpus_come_in_the_order_of_cuda_visible_devices(visible: str | None, uuids: list[str]):
    gpus = Gpus(FakeNvml([A, B, C], [MIG]), visible)
    found = [gpus.read(index) for index in range(gpus.count)]
    assert [gpu.uuid for gpu in found if gpu] == uuids


def test_a_gpu_is_reported_as_nvml_says(tmp_path: Path):
    devices = Devices(machine(tmp_path), Gpus(FakeNvml([A], [MIG]), "0,MIG-7"))
    assert devices.gpus() == ("cuda:0", "cuda:1")
    cpu, gpu, mig = devices.devices()
    assert (cpu.device, cpu.total, cpu.used, cpu.free) == ("cpu", 16 * GIB, 4 * GIB, 12 * GIB)
    assert (gpu.device, gpu.name, gpu.uuid) == ("cuda:0", "NVIDIA H200", "GPU-a0-1")
    assert (gpu.total, gpu.used, gpu.free) == (100, 40, 60)
    assert (gpu.utilization, gpu.power_w, gpu.temperature_c) == (0.25, 70.5, 41)
    assert (mig.device, mig.utilization, mig.power_w) == ("cuda:1", None, None)


def test_no_driver_means_no_gpus_and_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    devices = Devices(machine(tmp_path), Gpus(FakeNvml(broken="Driver Not Loaded")))
    for _ in range(3):
        assert devices.gpus() == () and [d.device for d in devices.devices()] == ["cpu"]
    assert [r.getMessage() for r in caplog.records] == ["no GPUs: NVML says Driver Not Loaded"]
    devices.close()


def test_this_process_can_look_for_its_gpus():
    gpus = Gpus.of_this_process()
    assert gpus.count >= 0
    gpus.close()


def test_a_gpu_that_falls_off_the_bus_keeps_the_names_of_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    first, second = FakeGpu("GPU-x"), FakeGpu("GPU-y")
    devices = Devices(machine(tmp_path), Gpus(FakeNvml([first, second])))
    first.lost = True
    assert [d.device for d in devices.devices()] == ["cpu", "cuda:1"]
    devices.devices()
    assert len(caplog.records) == 1
    first.lost = False
    assert [d.device for d in devices.devices()] == ["cpu", "cuda:0", "cuda:1"]


class OldDriver(FakeNvml):
    """It lacks what the library asks for, and the library says so in its own way."""

    class NVMLLibraryMismatchError(Exception):
        pass

    def nvmlDeviceGetComputeRunningProcesses(self, handle: FakeGpu) -> list[Any]:  # noqa: N802
        raise self.NVMLLibraryMismatchError


def test_a_driver_that_is_too_old_to_list_processes_tells_the_rest():
    gpus = Gpus(OldDriver([FakeGpu("GPU-a")]))
    assert gpus.processes(0) == [] and gpus.read(0) is not None


def test_a_process_whose_name_is_no_text_has_none():
    class Strange(FakeNvml):
        def nvmlSystemGetProcessName(self, pid: int) -> str:  # noqa: N802
            return b"/opt/m\xf6dell".decode()

    gpus = Gpus(Strange([FakeGpu("GPU-a", processes=[(7, 10)])]))
    assert gpus.processes(0) == [GpuProcess(7, None, 10)]


def test_closing_hands_nvml_back_once(tmp_path: Path):
    nvml = FakeNvml([A])
    devices = Devices(machine(tmp_path), Gpus(nvml))
    devices.close()
    devices.close()
    assert nvml.opened == 0 and devices.gpus() == ()


# budgets ------------------------------------------------------------------------------------------


def test_a_device_that_nobody_limits_gives_most_of_its_memory(tmp_path: Path):
    devices = Devices(machine(tmp_path, total=10 * GIB), Gpus(FakeNvml([A])))
    assert budgets(devices.devices(), {}) == {"cpu": 8 * GIB, "cuda:0": 90}
    assert budgets(devices.devices(), {"cuda:0": 50}) == {"cpu": 8 * GIB, "cuda:0": 50}
    with pytest.raises(ConfigError, match="'cuda:1', which this machine") as info:
        budgets(devices.devices(), {"cuda:1": 1})
    assert info.value.hint == "it has cpu, cuda:0"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("cpu=2GiB,cuda:0=70GiB", {"cpu": 2 * GIB, "cuda:0": 70 * GIB}),
        (" cpu = 512MiB , ", {"cpu": GIB // 2}),
        ("", {}),
    ],
)
def test_budgets_are_written_device_by_device(text: str, found: dict[str, int]):
    assert parse_budgets(text) == found


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("2GiB", "'2GiB' is not DEVICE=SIZE"),
        ("gpu=2GiB", "write cpu=2GiB or cuda:0=70GiB"),
        ("cuda=2GiB", "is not DEVICE=SIZE"),
        ("cuda:x=2GiB", "is not DEVICE=SIZE"),
        ("cpu=much", "memory budget for 'cpu': 'much'"),
        ("cpu=", "memory budget for 'cpu'"),
        ("cpu=1GiB,cpu=2GiB", "'cpu' is given twice"),
    ],
)
def test_a_budget_that_cannot_be_read_says_how_to_write_it(text: str, reason: str):
    with pytest.raises(ConfigError, match=reason):
        parse_budgets(text)
