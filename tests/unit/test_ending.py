"""An end is confirmed where it can be: by the processes, and by the GPU itself."""

from __future__ import annotations

import asyncio

import pytest

from repository.errors import DeviceSilentError
from repository.hosts.ending import BACK_S, end
from repository.reports import GpuReport, GpuUse
from tests.fakes.heart import newborn
from tests.fakes.host import FakeHost

pytestmark = pytest.mark.looptime


class Gpu:
    """50 of 100 bytes are used; of a model's 40, `back` come back `late_s` after it was asked first."""

    def __init__(self, back: int = 40, late_s: float = 0.5, silent: bool = False) -> None:
        self.back, self.late_s, self.silent = back, late_s, silent
        self.asked = 0

    async def use(self) -> GpuUse:
        self.asked += 1
        if self.silent:
            raise DeviceSilentError("the driver hangs")
        now = asyncio.get_running_loop().time()
        used = 50 - self.back if now >= self.late_s else 50
        return (GpuReport(0, "a GPU", "uuid", total=100, used=used, free=100 - used),)


async def ended(gpu: Gpu, device: str = "cuda:0") -> bool:
    gen, host = newborn(device=device), FakeHost()
    gen.measured = {"weights": 40}
    await host.load(gen.spec, device)
    sure = await end(gen, host, 1.0, gpus=gpu.use)
    assert host.calls == ["load", "stop"]
    return sure


async def test_a_gpu_that_has_its_bytes_back_confirms_the_end(looptime: float) -> None:
    assert await ended(Gpu(late_s=0.5))
    assert looptime == pytest.approx(0.5, abs=0.1)


async def test_a_gpu_that_keeps_them_does_not_and_is_not_waited_for_long(looptime: float) -> None:
    assert not await ended(Gpu(back=20))
    assert looptime == pytest.approx(BACK_S, abs=0.1)


async def test_a_gpu_that_says_nothing_confirms_nothing() -> None:
    assert not await ended(Gpu(silent=True))
    assert not await ended(Gpu(), device="cuda:7")


async def test_without_a_gpu_the_end_of_the_processes_will_do() -> None:
    gpu = Gpu()
    assert await ended(gpu, device="cpu") and not gpu.asked
