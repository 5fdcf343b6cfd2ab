"""Devices as drivers tell of them (tests/data/nvml), and GPUs in MIG mode."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from repository.devices import inventory
from repository.devices.inventory import Devices, budgets, reports
from repository.devices.nvml import Gpus
from repository.devices.readings import within
from tests.fakes.nvml import RECORDINGS, FakeGpu, FakeNvml, Replayed
from tests.fakes.record_nvml import Recorder, veiled

MIB = 1 << 20
H200 = 143_771 * MIB
DRIVERS_OWN = 622 * MIB


def machine(name: str, visible: str | None = None) -> Devices:
    return Devices(gpus=Gpus(Replayed(name), visible))


def test_an_h200_is_told_with_all_that_it_says() -> None:
    devices = machine("h200")
    used = []
    for _ in range(4):
        _, gpu = devices.devices()
        used.append(gpu.used)
    assert used == [DRIVERS_OWN + n * MIB for n in (0, 518, 8958, 0)]
    assert (gpu.device, gpu.name, gpu.total) == ("cuda:0", "NVIDIA H200", H200)
    assert (gpu.driver, gpu.power_limit_w) == ("570.133.20", 700)
    assert devices.visible() == {}
    devices.close()


def test_the_processes_of_a_gpu_are_told_with_what_they_have() -> None:
    devices = machine("two_gpus")
    first, second = devices.gpu_use()
    assert {p.pid: p.used for p in first.processes} == {2101: 12_288 * MIB, 9001: 8192 * MIB}
    assert second.processes == () and second.index == 1
    _, second = devices.gpu_use()
    assert second.used == DRIVERS_OWN + 4096 * MIB and second.processes[0].name == "program"


def test_the_instances_of_a_gpu_in_mig_mode_are_the_devices() -> None:
    devices = machine("mig_4g_3g")
    assert devices.gpus() == ("cuda:0", "cuda:1")
    _, first, second = devices.devices()
    assert (first.name, second.name) == ("NVIDIA H200 MIG 4g.71gb", "NVIDIA H200 MIG 3g.71gb")
    assert first.uuid.startswith("MIG-") and first.total == second.total == 71_424 * MIB
    assert (first.utilization, first.power_w, first.power_limit_w) == (None, None, None)
    assert budgets([first, second], {})["cuda:1"] == int(0.9 * 71_424 * MIB)


def test_a_worker_of_an_instance_must_see_that_alone() -> None:
    devices = machine("mig_4g_3g")
    told = {info.device: info.uuid for info in devices.devices() if info.device != "cpu"}
    assert devices.visible() == told and len(set(told.values())) == 2


def test_a_gpu_that_is_lost_midway_leaves_the_other_its_name(
    caplog: pytest.LogCaptureFixture,
) -> None:
    devices = machine("lost_midway")
    assert [d.device for d in devices.devices()] == ["cpu", "cuda:0", "cuda:1"]
    for _ in range(3):
        assert [d.device for d in devices.devices()] == ["cpu", "cuda:1"]
    said = [r.getMessage() for r in caplog.records]
    assert said == ["cuda:0 cannot be read: NVML says GPU is lost"]
    held = {"cpu": (10, 1), "cuda:0": (100, 40), "cuda:1": (100, 0), "host": (5, 2)}
    cpu, lost, other, tier = reports(devices.devices(), held, {"cuda:0": 40})
    assert (lost.total, lost.used, lost.unattributed, lost.reserved) == (None, None, None, 40)
    assert other.unattributed == DRIVERS_OWN and cpu.unattributed is None
    assert (tier.device, tier.budget, tier.reserved, tier.total) == ("host", 5, 2, None)


def test_without_a_driver_there_are_no_gpus_and_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    devices = machine("no_driver")
    assert devices.gpus() == () and [d.device for d in devices.devices()] == ["cpu"]
    assert [r.getMessage() for r in caplog.records] == ["no GPUs: NVML says Driver Not Loaded"]
    devices.close()


# MIG and CUDA_VISIBLE_DEVICES -------------------------------------------------------------------

ONE, TWO = FakeGpu("MIG-1", total=10), FakeGpu("MIG-2", total=10)
DIVIDED = FakeGpu("GPU-d", divided=True, parts=[None, ONE, TWO])
WHOLE = FakeGpu("GPU-w", divided=False)


@pytest.mark.parametrize(
    ("visible", "uuids"),
    [
        (None, ["GPU-w", "MIG-1", "MIG-2"]),
        ("1,0", ["MIG-1", "MIG-2", "GPU-w"]),
        ("GPU-d", ["MIG-1", "MIG-2"]),
        ("MIG-2,MIG-1", ["MIG-2", "MIG-1"]),
        ("MIG-2", ["MIG-2"]),
        ("MIG-2,GPU-d,0", ["MIG-2"]),  # the same instance twice: as CUDA does, the list ends
    ],
)
def test_who_names_a_divided_gpu_means_its_instances(visible: str | None, uuids: list[str]) -> None:
    gpus = Gpus(FakeNvml([WHOLE, DIVIDED]), visible)
    assert [gpu.uuid for i in range(gpus.count) if (gpu := gpus.read(i))] == uuids
    assert [gpus.visible(i) for i in range(gpus.count)] == uuids


def test_whole_gpus_keep_their_names_in_workers() -> None:
    gpus = Gpus(FakeNvml([WHOLE, FakeGpu("GPU-x")]))
    assert [gpus.visible(i) for i in range(gpus.count)] == ["", ""]


def test_a_divided_gpu_without_instances_is_said_and_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gpus = Gpus(FakeNvml([FakeGpu("GPU-e", divided=True), WHOLE]))
    assert gpus.count == 1 and "GPU-e is in MIG mode and has no instance" in caplog.text


def test_a_gpu_that_is_lost_at_the_start_costs_only_itself(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Lost(FakeNvml):
        def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:  # noqa: N802
            if index == 0:
                raise self.NVMLError("GPU is lost")
            return super().nvmlDeviceGetHandleByIndex(index)

    gpus = Gpus(Lost([FakeGpu("GPU-l"), WHOLE]))
    assert gpus.count == 1 and gpus.visible(0) == "GPU-w"  # CUDA may count without the lost one
    assert "GPU 0 is left out: NVML says GPU is lost" in caplog.text


def test_a_thread_that_reads_while_nvml_is_handed_back_gets_nothing() -> None:
    gpus = Gpus(FakeNvml([WHOLE]))
    gpus.close()
    assert gpus.read(0) is None and gpus.processes(0) == []


def test_a_driver_that_hangs_at_the_start_costs_its_gpus_and_not_the_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(inventory, "START_S", 0.05)
    hangs = threading.Event()
    devices = Devices(gpus=Gpus(FakeNvml([WHOLE], hangs=hangs)))
    try:
        assert [info.device for info in devices.devices()] == ["cpu"]
        assert "does `nvidia-smi` answer?" in caplog.text
    finally:
        hangs.set()
    for thread in threading.enumerate():
        if thread.name == "devices":
            thread.join()
    assert [info.device for info in devices.devices()] == ["cpu", "cuda:0"]


def test_what_a_reading_raises_reaches_whoever_asked() -> None:
    with pytest.raises(ZeroDivisionError):
        within(lambda: 1 // 0, 5)
    assert within(lambda: 1, 5) == 1


# the recorder -----------------------------------------------------------------------------------


def test_what_is_recorded_plays_back_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = FakeGpu("GPU-0001-2", processes=[(4711, 5), (4712, None)], power_mw=None)
    recorder = Recorder(FakeNvml([gpu, DIVIDED], names={4711: "/home/somebody/serve"}))
    first = Gpus(recorder)  # type: ignore[arg-type]
    told = [(first.read(i), first.processes(i)) for i in range(first.count)]
    (tmp_path / "new.jsonl").write_text("\n".join(recorder.lines))
    assert "somebody" not in "".join(recorder.lines) and "GPU-0001-2" not in "".join(recorder.lines)

    monkeypatch.setattr("tests.fakes.nvml.RECORDINGS", tmp_path)
    again = Gpus(Replayed("new"))  # type: ignore[arg-type]
    assert again.count == 3
    for index, (was, processes) in enumerate(told):
        assert again.read(index) == was
        assert [p.used for p in again.processes(index)] == [p.used for p in processes]


def test_uuids_are_veiled_and_stay_apart() -> None:
    one, two = (veiled("nvmlDeviceGetUUID", f"GPU-{n}") for n in (1, 2))
    assert one != two and one.startswith("GPU-") and len(one) == len("GPU-") + 36
    assert veiled("nvmlDeviceGetName", "NVIDIA H200") == "NVIDIA H200"


@pytest.mark.parametrize("path", sorted(RECORDINGS.glob("*.jsonl")), ids=lambda p: p.stem)
def test_recordings_are_listed_with_where_they_come_from(path: Path) -> None:
    assert f"`{path.name}`" in (RECORDINGS / "README.md").read_text()
    for line in path.read_text().splitlines():
        entry = SimpleNamespace(**json.loads(line))
        assert entry.call.startswith("nvml") and isinstance(entry.args, list)
