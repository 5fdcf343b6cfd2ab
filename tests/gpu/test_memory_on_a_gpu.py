"""Memory of a real GPU adds up: what a worker says is what NVML sees, and an unload brings it back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from repository.devices.nvml import Gpus
from repository.lifecycle.placement import Memory
from tests import models, tiny
from tests.hosting import ask, forking, make, one
from tests.torch_models import given, listed, write

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
]
GPU = "cuda:0"
ROWS = np.random.default_rng(7).normal(size=(64, 4)).astype(np.float32)
LARGE = """
    import torch
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up = torch.nn.Linear(4, 1 << 24, bias=False)
            self.down = torch.nn.Linear(1 << 24, 3, bias=False)
        def forward(self, x):
            return self.down(torch.relu(self.up(x)))
"""
WITHIN_S = 2.0
TIMES = 20


@contextmanager
def device_used() -> Iterator[Any]:
    """Bytes in use on the GPU, as NVML says."""
    gpus = Gpus.of_this_process()

    def now() -> int:
        found = gpus.read(0)
        assert found is not None
        return found.total - found.free

    try:
        yield now
    finally:
        gpus.close()


def large(folder: Path) -> Any:
    torch.manual_seed(0)
    weights = {"up.weight": torch.randn(1 << 24, 4), "down.weight": torch.randn(3, 1 << 24)}
    return models.spec_of(
        write(folder, LARGE, weights),
        "torch_module",
        max_batch_size=64,
        inputs=(listed("x", shape=(4,)),),
    )


def until(limit: int, now: Any) -> int:
    """What is in use once it is no more than `limit`, or after WITHIN_S. Blocks."""
    end = time.monotonic() + WITHIN_S
    while (used := now()) > limit and time.monotonic() < end:
        time.sleep(0.02)  # NVML tells nobody that something has changed
    return int(used)


def on_gpu(memory: Memory) -> int:
    return sum(memory[GPU].values())


async def test_twenty_loads_and_unloads_bring_every_byte_back_each_time(tmp_path: Path) -> None:
    spec = large(tmp_path / "m/1")
    async with forking() as zygotes:
        await zygotes.warm("torch")
        with device_used() as now:
            before = now()
            for _ in range(TIMES):
                host = make(spec, tmp_path / "s", zygotes)
                await host.load(spec, [GPU])
                one(await host.infer(ask(*given(x=ROWS))))
                peak = now()
                assert peak - before > 400 << 20
                await host.stop(5)
                limit = before + (peak - before) // 100
                assert await asyncio.to_thread(until, limit, now) <= limit


async def test_what_workers_say_is_what_the_device_has_awake_and_asleep(tmp_path: Path) -> None:
    text = models.spec_of(tiny.write_text_model(tmp_path / "t/1"), "text")
    specs = [large(tmp_path / "m/1"), text]
    async with forking() as zygotes:
        with device_used() as now:
            before = now()
            hosts = [make(spec, tmp_path / "s", zygotes) for spec in specs]
            for host, spec in zip(hosts, specs, strict=True):
                await host.load(spec, [GPU])
            one(await hosts[0].infer(ask(*given(x=ROWS))))
            for asleep in (False, True):
                if asleep:
                    await hosts[0].sleep()
                told = [await host.memory() for host in hosts]
                has = now() - before
                assert abs(sum(map(on_gpu, told)) - has) <= 0.02 * has
                assert all(kinds[GPU]["context"] > 50 << 20 for kinds in told)
                assert ("weights" in told[0][GPU]) is not asleep
            assert told[0]["host"]["weights"] >= 448 << 20
            for host in hosts:
                await host.stop(5)


async def test_a_sleeping_model_gives_back_all_but_its_context(tmp_path: Path) -> None:
    spec = large(tmp_path / "m/1")
    async with forking() as zygotes:
        with device_used() as now:
            before = now()
            host = make(spec, tmp_path / "s", zygotes)
            told = await host.load(spec, [GPU])
            one(await host.infer(ask(*given(x=ROWS))))
            awake = now() - before
            await host.sleep()
            memory = await host.memory()
            assert awake - (now() - before) >= 0.99 * told.memory["weights"]
            assert memory[GPU].get("workspace", 0) <= 32 << 20
            await host.stop(5)
