"""A body may be received where the model will read it: what the facade promises about that."""

from __future__ import annotations

import numpy as np

from repository.hosts.asking import LARGE
from repository.messages import InferRequest
from repository.repository import Options, Repository
from repository.tensors import Tensor
from tests.models import add_onnx

COUNT = LARGE // 4
SIZE = 4 * COUNT


def drop(root, name, value, **config):
    add_onnx(root / name / "1/model.onnx", value, (-1,))
    lines = [f"{key}: {said}\n" for key, said in config.items()]
    (root / name / "config.yaml").write_text("".join(lines))


async def ask(models, name, data):
    tensor = Tensor("x", "FP32", (COUNT,), data)
    with models.lease(name) as gen:
        response = await models.infer(gen, InferRequest([tensor]))
    return set(response.outputs[0].array().tolist())


async def test_a_room_is_near_the_model_and_outlives_it(tmp_path):
    root = tmp_path / "models"
    drop(root, "m", 1.0, aliases="[other]")
    drop(root, "thread", 3.0, host="inline")
    models = Repository(Options(root, settle_s=0.1, state_dir=tmp_path / "state"))
    async with models.running():
        await models.load("m")
        await models.load("thread")
        room = models.room("m", None, SIZE)
        assert room is not None and len(room) == SIZE
        room[:] = np.full(COUNT, 5, np.float32).tobytes()
        assert await ask(models, "m", room) == {6.0}
        assert models.room("other", 1, SIZE) is not None
        for name, version, size in (
            ("nobody", None, SIZE),
            ("m", 2, SIZE),
            ("m", None, LARGE - 1),
            ("m", None, 1 << 40),
            ("thread", None, SIZE),
        ):
            assert models.room(name, version, size) is None
        # Whoever serves when the body is there takes it from wherever it lies.
        assert await ask(models, "thread", room) == {8.0}
        await models.load("m", force=True)
        assert await ask(models, "m", room) == {6.0}
        await models.unload("m")
        assert models.room("m", None, SIZE) is None
        assert await ask(models, "thread", room) == {8.0}
