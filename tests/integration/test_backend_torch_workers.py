"""Torch models where they live: in workers, beside each other, while their files are written to."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.export import Dim

from repository.errors import IncompleteFilesError, InferenceFailedError, InvalidTensorError
from repository.messages import TensorSpec
from repository.repository import Options, Repository
from tests import models
from tests.hosting import ask, fails, forking, hosted, make, one
from tests.torch_models import answer, export, given, listed, mlp, write_mlp

ROWS = np.random.default_rng(7).normal(size=(5, 4)).astype(np.float32)


async def test_workers_answer_as_torch_does_and_keep_their_weights_whatever_is_written(tmp_path):
    folders = [write_mlp(tmp_path / "m" / str(v), seed=v) for v in (1, 2)]
    program = export(
        tmp_path / "p/1/model.pt2",
        mlp(),
        torch.from_numpy(ROWS),
        dynamic_shapes=({0: Dim.DYNAMIC},),
    )
    want = [mlp(seed=v)(torch.from_numpy(ROWS)).numpy() for v in (1, 2, 0)]
    config = {"max_batch_size": 8, "inputs": (listed("x", shape=(4,)),)}
    specs = [models.spec_of(folder, "torch_module", **config) for folder in folders]
    exported = models.spec_of(program.parent, "torch_export", max_batch_size=8)
    exported = replace(exported, model_file=program.name)
    state = tmp_path / "s"
    async with (
        forking() as zygotes,
        hosted(specs[0], state, zygotes) as (first, told),
        hosted(specs[1], state, zygotes) as (second, _),
        hosted(exported, state, zygotes) as (third, told_of_program),
    ):
        assert told.inputs == told_of_program.inputs == (TensorSpec("x", "FP32", (-1, 4)),)
        assert (told.outputs, told.max_batch_size, told.abilities) == ((), 8, ("adapt", "sleep"))
        assert told_of_program.outputs == (TensorSpec("output", "FP32", (-1, 3)),)
        assert told.memory["weights"] == 4 * sum(p.numel() for p in mlp().parameters())
        for file in [*(folder / "model.safetensors" for folder in folders), program]:
            with file.open("r+b") as open_file:
                open_file.write(bytes(file.stat().st_size))
            os.truncate(file, 10)
        for host, expected in zip((first, second, third), want, strict=True):
            for rows in (5, 1, 2):
                got = one(await host.infer(ask(*given(x=ROWS[:rows]))))
                np.testing.assert_allclose(got, expected[:rows], rtol=1e-5, atol=1e-6)
        with pytest.raises(InferenceFailedError, match="mat1 and mat2 shapes"):
            await first.infer(ask(*given(x=ROWS[:, :3])))
        with pytest.raises(InvalidTensorError, match=r"was exported for x.size\(\)\[1\] == 4"):
            await third.infer(ask(*given(x=ROWS[:, :3])))
        assert (await first.infer(ask(*given(x=ROWS)))).outputs
        again = make(specs[0], state, zygotes)
        text = await fails(lambda: again.load(specs[0], ["cpu"]), IncompleteFilesError)
        assert text.startswith("model.safetensors is not complete: ") and str(tmp_path) not in text
        await again.stop(5.0)
    assert not list((state / "snapshots").iterdir())


async def test_the_example_is_served_and_its_golden_digits_come_out(tmp_path):
    examples = Path(__file__).parents[2] / "examples"
    shutil.copytree(examples / "models" / "digits_torch", tmp_path / "models" / "digits_torch")
    (sent,) = json.loads((examples / "digit.json").read_text())["inputs"]
    options = Options(
        tmp_path / "models", trust_code=True, state_dir=tmp_path / "state", settle_s=0.1
    )
    depot = Repository(options)
    async with depot.running():
        await depot.load("digits_torch")
        with depot.lease("digits_torch") as gen:
            image = np.array(sent["data"], np.float32).reshape(sent["shape"])
            got = answer(await depot.infer(gen, ask(*given(image=image))))
        assert got["label"].tolist() == [3]
        assert got["probabilities"].shape == (1, 10)
        assert abs(got["probabilities"].sum() - 1) < 1e-5
