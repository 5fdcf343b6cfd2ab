"""What can be told of a model's files before anything is given up for it: as a load would say it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from repository.backends import registry
from repository.errors import IncompleteFilesError, LoadFailedError, RepositoryError
from repository.hosts.zygotes import Zygotes
from repository.spec import ModelSpec
from tests import models, tiny
from tests.hosting import children, make
from tests.torch_models import MLP, export, listed, mlp, write, write_mlp

pytestmark = pytest.mark.asyncio(loop_scope="module")

X = torch.zeros(1, 4)


async def said(spec: ModelSpec, state: Path, zygotes: Zygotes | None, **more: Any) -> str:
    """The error of a validation, "" for none; and that a load's is the same."""
    found = []
    for what in ("validate", "load"):
        host = make(spec, state, zygotes, **more)
        try:
            if what == "validate":
                await host.validate(spec, "cpu")
            else:
                await host.load(spec, ["cpu"])
            found.append("")
        except RepositoryError as error:
            found.append(f"{type(error).__name__}: {error}")
        finally:
            await host.stop(5)
    assert found[0] == found[1]
    return found[0]


def spec_of(folder: Path, backend: str, file: str = "", **config: Any) -> ModelSpec:
    spec = models.spec_of(folder, backend, **config)
    return replace(spec, model_file=file) if file else spec


async def test_sound_models_of_every_kind_are_found_sound(tmp_path, zygotes):
    script = tmp_path / "s/1/model.pt"
    script.parent.mkdir(parents=True)
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.script(mlp()).save(str(script))
    program = export(tmp_path / "p/1/model.pt2", mlp(), X)
    python = models.python_model(
        tmp_path / "y/1", "class Model:\n    def infer(self, inputs): return inputs"
    )
    specs = [
        models.spec_of(models.add_onnx(tmp_path / "o/1/model.onnx")),
        models.spec_of(models.external_onnx(tmp_path / "x/1/model.onnx")),
        spec_of(write_mlp(tmp_path / "m/1"), "torch_module"),
        spec_of(program.parent, "torch_export", program.name),
        spec_of(script.parent, "torchscript", script.name),
        spec_of(tiny.write_text_model(tmp_path / "t/1"), "text"),
        spec_of(tiny.write_text_model(tmp_path / "g/1", "gpt2"), "text"),
        spec_of(tiny.write_encoder(tmp_path / "e/1"), "embed"),
        spec_of(python, "python"),
    ]
    for spec in specs:
        await zygotes.warm(registry.entry(spec.backend).framework)
    before = children()
    for spec in specs:
        host = make(spec, tmp_path / "s", zygotes)
        await host.validate(spec, "cpu")
        assert children() == before, "a worker that looked has ended"
        assert not host.died.done()
    inline = make(specs[2], tmp_path / "s")
    await inline.validate(specs[2], "cpu")


async def test_a_torch_modules_weights_are_held_against_its_class(tmp_path, zygotes):
    weights = mlp().state_dict()
    lacks = {name: t for name, t in weights.items() if name != "two.bias"}
    text = await said(
        spec_of(write(tmp_path / "a/1", MLP, lacks), "torch_module"), tmp_path, zygotes
    )
    assert "it lacks two.bias" in text
    other = {**weights, "one.weight": torch.zeros(9, 4)}
    text = await said(
        spec_of(write(tmp_path / "b/1", MLP, other), "torch_module"), tmp_path, zygotes
    )
    assert "size mismatch for one.weight" in text
    cut = write_mlp(tmp_path / "c/1")
    file = cut / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    text = await said(spec_of(cut, "torch_module"), tmp_path, zygotes)
    assert text.startswith("IncompleteFilesError") and "model.safetensors" in text
    broken = write(tmp_path / "d/1", MLP.replace("def forward", "def forward("), weights)
    assert "SyntaxError" in await said(spec_of(broken, "torch_module"), tmp_path, zygotes)


async def test_a_class_that_computes_with_its_numbers_is_left_to_the_load(tmp_path, zygotes):
    source = MLP.replace(
        "self.two =", "self.most = float(self.one.weight.max())\n            self.two ="
    )
    spec = spec_of(write(tmp_path / "m/1", source, mlp().state_dict()), "torch_module")
    assert await said(spec, tmp_path, zygotes) == ""


async def test_a_text_models_weights_are_held_against_its_config(tmp_path, zygotes):
    folder = tiny.write_text_model(tmp_path / "m/1")
    file = folder / "model.safetensors"
    weights = load_file(file)
    gone = sorted(weights)[3]
    save_file({n: t for n, t in weights.items() if n != gone}, file, {"format": "pt"})
    assert gone in await said(spec_of(folder, "text"), tmp_path, zygotes)
    save_file({**weights, "extra": torch.zeros(3)}, file, {"format": "pt"})
    assert "belong to no part" in await said(spec_of(folder, "text"), tmp_path, zygotes)
    save_file(weights, file, {"format": "pt"})
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json" in await said(spec_of(folder, "text"), tmp_path, zygotes)


async def test_an_encoders_weights_are_held_against_its_config(tmp_path, zygotes):
    folder = tiny.write_encoder(tmp_path / "m/1")
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = next(n for n in sorted(weights) if "layer.0" in n)
    save_file({n: t for n, t in weights.items() if n != name}, file, {"format": "pt"})
    assert "missing from the weights" in await said(spec_of(folder, "embed"), tmp_path, zygotes)


async def test_archives_that_are_cut_off_or_not_trusted_are_told(tmp_path, zygotes):
    program = export(tmp_path / "p/1/model.pt2", mlp(), X)
    script = tmp_path / "s/1/model.pt"
    script.parent.mkdir(parents=True)
    shutil.copy(program, script)
    spec = spec_of(program.parent, "torch_export", program.name)
    program.write_bytes(program.read_bytes()[:-100])
    text = await said(spec, tmp_path, zygotes)
    assert text.startswith(IncompleteFilesError.__name__)
    program.unlink()
    assert "model.pt2 is missing" in await said(spec, tmp_path, zygotes)
    host = make(spec_of(script.parent, "torchscript", "model.pt"), tmp_path, zygotes)
    with pytest.raises(IncompleteFilesError, match="no complete archive of torch"):
        await host.validate(spec_of(script.parent, "torchscript", "model.pt"), "cpu")


async def test_onnx_files_are_held_against_the_config(tmp_path, zygotes):
    path = models.add_onnx(tmp_path / "m/1/model.onnx")
    wrong = models.spec_of(path, inputs=(listed("x", "INT64", (-1, 4)),))
    assert "'x' is INT64 in the config" in await said(wrong, tmp_path, zygotes)
    path.unlink()
    assert "model.onnx is missing" in await said(models.spec_of(path), tmp_path, zygotes)
    models.add_onnx(path)
    path.write_bytes(path.read_bytes()[:40])
    host = make(models.spec_of(path), tmp_path, zygotes)
    with pytest.raises(LoadFailedError):
        await host.validate(models.spec_of(path), "cpu")


async def test_a_python_model_is_read_and_not_run(tmp_path, zygotes):
    touched = tmp_path / "touched"
    source = f"""
        import pathlib
        pathlib.Path({str(touched)!r}).write_text("run")
        class Model:
            def infer(self, inputs): return inputs
    """
    spec = spec_of(models.python_model(tmp_path / "a/1", source), "python")
    await make(spec, tmp_path, zygotes).validate(spec, "cpu")
    assert not touched.exists()
    for name, text, why in (
        ("b", "class Model:\n    def infer(self inputs): ...", "SyntaxError"),
        ("c", "class Other:\n    def infer(self, inputs): ...", "has no class 'Model'"),
    ):
        bad = spec_of(models.python_model(tmp_path / name / "1", text), "python")
        assert why in await said(bad, tmp_path, zygotes)
