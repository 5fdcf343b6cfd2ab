"""What only a real GPU can show. Without one these skip; the same code runs on fakes elsewhere."""

from __future__ import annotations

import numpy as np
import pytest

from repository.devices.inventory import Devices
from repository.messages import InferRequest
from repository.repository import Options, Repository
from repository.tensors import Tensor
from tests.models import add_onnx


def gpus() -> tuple[str, ...]:
    devices = Devices()
    try:
        return devices.gpus()
    finally:
        devices.close()


GPUS = gpus()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not GPUS, reason="NVML finds no NVIDIA GPU on this machine"),
]


async def used(models: Repository, device: str) -> int:
    await models.gpus()  # else what they said some seconds ago
    return next(d.used for d in models.devices() if d.device == device)


async def serving_one(tmp_path, device):
    root = tmp_path / "models"
    path = root / "m" / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    add_onnx(path, value=2.0)
    (root / "m" / "config.yaml").write_text(f"device: {device}\n")
    return Options(root, settle_s=0.1, mode="explicit", watch="off", state_dir=tmp_path / "state")


async def test_a_model_on_the_gpu_answers_and_its_unload_returns_the_memory(tmp_path):
    models = Repository(await serving_one(tmp_path, GPUS[0]))
    async with models.running():
        before = await used(models, GPUS[0])
        await models.load("m")
        assert await used(models, GPUS[0]) > before
        with models.lease("m") as gen:
            assert gen.device == GPUS[0]
            assert "CUDAExecutionProvider" in gen.loaded.details["providers"]
            x = np.ones((1, 4), np.float32)
            answer = await models.infer(gen, InferRequest([Tensor.of("x", x)]))
            assert answer.outputs[0].array().tolist() == [[3.0] * 4]
        peak = await used(models, GPUS[0])
        report = await models.unload("m")
        assert report.bytes_freed > 0
        assert await used(models, GPUS[0]) - before <= (peak - before) // 100
