"""Estimates held against what workers really have, and what is remembered of it. Real processes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from onnx import helper, numpy_helper

from repository import measuring
from repository.devices.inventory import Devices
from repository.devices.nvml import Gpus
from repository.devices.readings import Readings
from repository.errors import DeviceSilentError
from repository.hosts.process import ProcessHost
from repository.lifecycle.footprint import said
from repository.lifecycle.generation import Generation
from repository.messages import InferRequest
from repository.repository import Options, Repository
from repository.spec import ModelSpec
from repository.tensors import Tensor
from tests.fakes.nvml import FakeGpu, FakeNvml
from tests.models import onnx_model, python_model
from tests.tiny import write_encoder, write_text_model
from tests.torch_models import export, quiet, write

MIB = 1 << 20
WIDE = 4096  # a square matrix of float32 numbers: 64 MiB

WIDE_MODULE = """
    import torch
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one = torch.nn.Linear(4096, 4096)
            self.two = torch.nn.Linear(4096, 4096)
        def forward(self, x):
            return self.two(self.one(x))
"""
GROWS = """
    import numpy as np
    class Model:
        def load(self, context):
            self.kept = []
        def infer(self, inputs):
            self.kept.append(np.ones(16 << 17))
            return {"y": inputs["x"]}
"""


@asynccontextmanager
async def serving(root: Path, **options: Any) -> AsyncIterator[Repository]:
    options.setdefault("state_dir", root.parent / "state")
    models = Repository(Options(root, mode="explicit", settle_s=0.1, trust_code=True, **options))
    async with models.running():
        yield models


async def loaded(models: Repository, name: str = "m") -> Generation:
    await models.load(name)
    return models.lease(name).generation


def linears() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(WIDE, WIDE), torch.nn.Linear(WIDE, WIDE)).eval()


def a_module(folder: Path) -> None:
    one, two = linears().children()
    tensors = {f"one.{k}": v for k, v in one.state_dict().items()}
    write(folder / "1", WIDE_MODULE, tensors | {f"two.{k}": v for k, v in two.state_dict().items()})


def two_instances(folder: Path) -> None:
    a_module(folder)
    (folder / "config.yaml").write_text("instances: 2\n")


def an_export(folder: Path) -> None:
    export(folder / "1" / "model.pt2", linears(), torch.zeros(1, WIDE))


def a_script(folder: Path) -> None:
    (folder / "1").mkdir(parents=True)
    with quiet():
        traced = torch.jit.trace(linears(), torch.zeros(1, WIDE))
        torch.jit.save(traced, folder / "1" / "model.pt")


def an_onnx(folder: Path) -> None:
    import onnx

    weights = [np.random.default_rng(n).random((WIDE, WIDE), np.float32) for n in range(2)]
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["h"]),
        helper.make_node("MatMul", ["h", "w1"], ["y"]),
    ]
    shape = [("x", "FP32", (-1, WIDE))], [("y", "FP32", (-1, WIDE))]
    held = [numpy_helper.from_array(w, f"w{n}") for n, w in enumerate(weights)]
    (folder / "1").mkdir(parents=True)
    onnx.save(onnx_model(nodes, *shape, held), folder / "1" / "model.onnx")


def a_text(folder: Path) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}
    write_text_model(folder, num_attention_heads=16, num_key_value_heads=8, **sizes)


def an_encoder(folder: Path) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}
    write_encoder(folder, num_attention_heads=16, **sizes)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Repository]:
    """For models that are there one after the other: their workers are forked from the same."""
    root = tmp_path_factory.mktemp("shared") / "models"
    await asyncio.to_thread(root.mkdir)
    async with serving(root) as models:
        yield models


@pytest.mark.alone
@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    "make",
    [a_module, two_instances, an_export, a_script, an_onnx, a_text, an_encoder],
    ids=lambda m: m.__name__,
)
async def test_what_is_estimated_is_near_what_is_measured(
    shared: Repository,
    make: Callable[[Path], None],
    record_property: Callable[[str, object], None],
) -> None:
    name = make.__name__
    await asyncio.to_thread(make, shared.options.root / name)
    gen = await loaded(shared, name)
    measured, estimated = said(gen, "cpu"), gen.spec.bytes_needed
    await shared.unload(name)
    record_property("MiB", f"{measured / MIB:.0f} of {estimated / MIB:.0f}")
    assert estimated >= 100 * MIB and 0.5 <= measured / estimated <= 1.5


async def test_a_model_that_takes_more_as_it_works_is_seen_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "LOOK_S", 0.05)
    root = tmp_path / "models"
    python_model(root / "m" / "1", GROWS)
    async with serving(root) as models:
        gen = await loaded(models)
        before = said(gen, "cpu")
        x = Tensor.of("x", np.zeros((1, 4), np.float32))
        for _ in range(4):  # 16 MiB each
            with models.lease("m") as held:
                await models.infer(held, InferRequest([x]))
        async with asyncio.timeout(20):  # a look between them is not followed by one at once
            while said(gen, "cpu") - before <= 60 * MIB:
                await models._measuring.look()
                await asyncio.sleep(0.01)
        (cpu, *_) = models.devices()
        assert cpu.attributed >= said(gen, "cpu") and cpu.unattributed is None
        await models.unload("m")
        again = await models.dry_run("m")
        assert again.bytes_needed > before + 60 * MIB and again.source == "measured"


async def test_what_was_measured_is_known_after_a_restart_and_forgotten_by_who_starts_clean(
    tmp_path: Path,
) -> None:
    root = tmp_path / "models"
    python_model(root / "m" / "1", GROWS)
    async with serving(root) as models:
        assert (await models.dry_run("m")).source == "estimate"
        needed = said(await loaded(models), "cpu")
        await models.unload("m")
    async with serving(root) as models:
        found = await models.dry_run("m")
        assert found.source == "measured" and found.bytes_needed >= needed
    async with serving(root, forget=True) as models:
        assert (await models.dry_run("m")).source == "estimate"


# devices, as the facade tells of them -------------------------------------------------------------


@asynccontextmanager
async def with_gpu(root: Path, nvml: FakeNvml) -> AsyncIterator[Repository]:
    await asyncio.to_thread(root.mkdir)
    devices = Devices(gpus=Gpus(nvml))
    models = Repository(Options(root, state_dir=root.parent / "state"), devices=devices)
    models._gpu_use = Readings(devices.gpu_use, within_s=0.2)
    async with models.running():
        yield models


async def test_a_gpu_is_told_with_what_strangers_have_of_it(tmp_path: Path) -> None:
    nvml = FakeNvml([FakeGpu("GPU-1", total=1000 * MIB, free=700 * MIB)])
    async with with_gpu(tmp_path / "models", nvml) as models:
        cpu, gpu, tier = models.devices()
        assert (gpu.used, gpu.attributed, gpu.unattributed) == (300 * MIB, 0, 300 * MIB)
        assert (gpu.driver, gpu.power_limit_w, gpu.budget) == ("550.54.15", 700, 900 * MIB)
        assert models._models.ledgers["cuda:0"].foreign == 300 * MIB
        assert (cpu.device, cpu.unattributed) == ("cpu", None)
        assert (tier.device, tier.used, tier.reserved) == ("host", None, 0) and tier.budget > 0


async def test_a_driver_that_hangs_does_not_hold_up_who_asks_for_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml = FakeNvml([FakeGpu("GPU-1", total=1000 * MIB, free=700 * MIB)])
    async with with_gpu(tmp_path / "models", nvml) as models:
        nvml.hangs = threading.Event()
        try:
            await models._measuring.look()  # and does not wait for ever
            assert models.devices()[1].used == 300 * MIB  # of a moment ago
            monkeypatch.setattr(measuring, "STALE_S", -1.0)
            assert models.devices()[1].used is None  # too long ago
            monkeypatch.undo()
            with pytest.raises(DeviceSilentError):
                await models.gpus()
        finally:
            nvml.hangs.set()
        await models._measuring.look()
        assert models.devices()[1].used == 300 * MIB
    for thread in threading.enumerate():
        if thread.name == "devices":
            thread.join()


async def test_a_worker_of_a_part_of_a_gpu_is_told_to_see_that_alone(tmp_path: Path) -> None:
    parts: list[FakeGpu | None] = [FakeGpu("MIG-1", total=10 * MIB, free=9 * MIB)]
    nvml = FakeNvml([FakeGpu("GPU-1", divided=True, parts=parts)])
    async with with_gpu(tmp_path / "models", nvml) as models:
        host = models._models.means.make_host(ModelSpec("m", 1, "f", backend="onnx"))
        assert isinstance(host, ProcessHost)
        assert host._extra["visible"] == {"cuda:0": "MIG-1"}
        await host.stop(1)
