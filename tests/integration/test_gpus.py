"""What faces tell of GPUs, over the real app and a driver that a test speaks for."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from repository.devices.inventory import Devices
from repository.devices.nvml import Gpus
from repository.devices.readings import Readings
from repository.reports import GpuUse
from repository.repository import Options, Repository
from tests.fakes.heart import at
from tests.fakes.nvml import FakeGpu, FakeNvml
from tests.fakes.repository import FakeRepository
from tests.fakes.serving import Client, serving

GIB = 1 << 30


def h200(uuid: str = "GPU-a0-1", **more: object) -> FakeGpu:
    """As an H200 tells of itself, with a quarter of it in use."""
    total = 143_771 * (1 << 20)
    return FakeGpu(uuid, total=total, free=total - total // 4, **more)  # type: ignore[arg-type]


@asynccontextmanager
async def told_by(root: Path, nvml: FakeNvml, within_s: float = 5.0) -> AsyncIterator[Client]:
    devices = Devices(gpus=Gpus(nvml))
    models = Repository(Options(root, state_dir=root.parent / "state"), devices=devices)
    models._gpu_use = Readings[GpuUse](devices.gpu_use, within_s=within_s)
    async with serving(models, repo=root) as client:
        yield client


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


async def test_a_gpu_is_told_in_megabytes_gigabytes_and_percent(root: Path) -> None:
    nvml = FakeNvml(
        [h200(processes=[(4711, 3 * GIB), (4712, None)])], names={4711: "/usr/bin/python3.11"}
    )
    async with told_by(root, nvml) as client:
        found = (await client.get("/v1/gpu/status")).json()
        assert found.pop("timestamp").endswith("+00:00")
        assert found == {
            "status": "success",
            "gpus": [
                {
                    "index": 0,
                    "name": "NVIDIA H200",
                    "uuid": "GPU-a0-1",
                    "memory": {
                        "total_mb": 143771.0,
                        "used_mb": 35942.75,
                        "free_mb": 107828.25,
                        "total_gb": 140.4,
                        "used_gb": 35.1,
                        "free_gb": 105.3,
                        "percent_used": 25.0,
                    },
                    "utilization": {"gpu_percent": 25.0, "memory_percent": 12.0},
                    "temperature_c": 41.0,
                }
            ],
            "processes": [
                {"pid": 4711, "name": "python3.11", "memory_mb": 3072.0, "gpu": 0},
                {"pid": 4712, "name": None, "memory_mb": None, "gpu": 0},
            ],
            "total_gpus": 1,
        }
        memory = (await client.get("/v1/gpu/memory")).json()
        assert memory["memory"] == [
            {
                "index": 0,
                "total_gb": 140.4,
                "used_gb": 35.1,
                "free_gb": 105.3,
                "percent_used": 25.0,
                "percent_free": 75.0,
            }
        ]
        assert (await client.get("/health")).json()["features"]["gpu"] is True
    assert nvml.opened == 0


async def test_what_a_gpu_does_not_tell_is_null_and_a_lost_one_is_left_out(root: Path) -> None:
    mute = h200("GPU-b0-1", busy_percent=None, celsius=None, processes=None)
    async with told_by(root, FakeNvml([h200(lost=True), mute])) as client:
        found = (await client.get("/v1/gpu/status")).json()
        assert [gpu["index"] for gpu in found["gpus"]] == [1] and found["total_gpus"] == 1
        assert found["gpus"][0]["utilization"] == {"gpu_percent": None, "memory_percent": None}
        assert found["gpus"][0]["temperature_c"] is None and found["processes"] == []
        (row,) = (await client.get("/device/cuda")).json()["cuda_devices"]
        assert (row["device_id"], row["utilization"]) == (1, "unknown")


async def test_marqos_clients_read_the_same_as_texts(root: Path) -> None:
    async with told_by(root, FakeNvml([h200()])) as client:
        assert (await client.get("/device/cuda")).json() == {
            "cuda_devices": [
                {
                    "device_id": 0,
                    "device_name": "NVIDIA H200",
                    "memory_used": "35.1 GiB",
                    "total_memory": "140.4 GiB",
                    "utilization": "25.0 %",
                    "memory_used_percent": "25.0 %",
                }
            ]
        }


async def test_a_driver_that_hangs_holds_up_nobody_and_its_callers_are_told(root: Path) -> None:
    nvml = FakeNvml([h200()])
    async with told_by(root, nvml, within_s=0.2) as client:
        nvml.hangs = threading.Event()
        try:
            paths = ("/v1/gpu/status", "/v1/gpu/memory", "/device/cuda")
            calls = [asyncio.create_task(client.get(path)) for path in paths]
            assert (await client.get("/health")).status_code == 200
            assert not any(call.done() for call in calls)
            for answer in [await call for call in calls]:
                assert answer.status_code == 503 and answer.headers["retry-after"] == "5"
                assert b"device_silent" in answer.content and b"nvidia-smi" in answer.content
            assert sum(thread.name == "devices" for thread in threading.enumerate()) == 1
        finally:
            nvml.hangs.set()
        assert (await client.get("/v1/gpu/status")).status_code == 200
    for thread in threading.enumerate():
        if thread.name == "devices":
            thread.join()


async def test_marqos_words_are_cuda_for_the_first_gpu_and_a_number_for_the_others() -> None:
    models = FakeRepository()
    for name, device in (("a", "cuda:0"), ("b", "cuda:1"), ("c", "cpu")):
        models.add(name, loaded=True)
        at(device, models.generations[name][0])
    async with serving(models) as client:
        rows = (await client.get("/models")).json()["models"]
        assert [(r["model_name"], r["model_device"]) for r in rows] == [
            ("a", "cuda"),
            ("b", "cuda:1"),
            ("c", "cpu"),
        ]
        for name, device in (("a", "cuda"), ("b", "cuda:1")):
            query = f"/models?model_name={name}&model_device={device}"
            assert device in (await client.delete(query)).json()["message"]
        at("cuda:0", models.bring_up("a"))
        assert (await client.delete("/models?model_name=a&model_device=cuda:0")).status_code == 200


async def test_a_model_on_two_devices_is_not_taken_off_one_of_them() -> None:
    models = FakeRepository()
    models.add("m", 1, 2)
    models.bring_up("m", 1)
    at("cuda:0", models.bring_up("m", 2))
    async with serving(models) as client:
        rows = (await client.get("/models")).json()["models"]
        assert [row["model_device"] for row in rows] == ["cpu", "cuda"]
        refused = await client.delete("/models?model_name=m&model_device=cuda")
        assert refused.status_code == 409 and refused.json()["code"] == "conflict"
        assert "without a model_device" in refused.json()["message"]
        assert len((await client.get("/models")).json()["models"]) == 2
        assert (await client.delete("/models?model_name=m")).status_code == 200
        assert (await client.get("/models")).json()["models"] == []


async def test_an_alias_names_its_model() -> None:
    models = FakeRepository()
    models.add("m", loaded=True, aliases=("best",))
    async with serving(models) as client:
        answer = await client.delete("/models?model_name=best")
        assert answer.json()["message"] == "successfully eject model_name `best`"
        assert models.calls == [("unload", "m")]
