"""Torch models in a version folder: what the files speak for, what goes with what, and trust."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest

from repository.errors import ConfigError
from repository.folder.estimate import MIB
from repository.folder.guess import as_triton_means, guess, model_file
from repository.folder.layering import merge
from repository.folder.read_pbtxt import read_pbtxt
from repository.folder.read_yaml import read_yaml
from repository.folder.scan import Scanner
from repository.snapshot import ModelFolder
from tests import hub


def archive() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file:
        file.writestr("data.pkl", b"x" * 100)
    return made.getvalue()


MODULE = {"model.py": b"class Model: ...", "model.safetensors": hub.weights(numbers=10)}


def seen(root: Path, files: hub.Files, *, trust_code: bool = True) -> ModelFolder:
    hub.lay(root / "m", files)
    return Scanner(root, trust_code=trust_code).scan().models["m"]


@pytest.mark.parametrize(
    ("files", "backend", "main"),
    [
        ({"model.py", "model.safetensors"}, "torch_module", "model.safetensors"),
        ({"model.py", "model.safetensors", "config.json"}, "torch_module", "model.safetensors"),
        ({"model.py", "other.safetensors"}, "python", "model.py"),
        ({"model.pt2"}, "torch_export", "model.pt2"),
        ({"model.pt"}, "torchscript", "model.pt"),
        ({"model.pt", "model.pt2"}, "torch_export", "model.pt2"),
        ({"model.onnx", "model.py", "model.safetensors"}, "onnx", "model.onnx"),
        ({"model.safetensors"}, None, ""),
    ],
)
def test_the_backend_is_guessed_from_the_files(
    files: set[str], backend: str | None, main: str
) -> None:
    config, _ = merge([guess(files)])
    assert config.backend == backend
    if backend is None:
        with pytest.raises(ConfigError, match=r"no backend .* model\.safetensors") as caught:
            model_file(config, files)
        assert "config.json or model.py" in caught.value.hint
    else:
        assert model_file(config, files) == main


@pytest.mark.parametrize(
    ("files", "backend", "main", "needs"),
    [
        (MODULE, "torch_module", "model.safetensors", 40),
        ({"model.pt2": archive()}, "torch_export", "model.pt2", len(archive())),
        ({"model.pt": archive()}, "torchscript", "model.pt", len(archive())),
    ],
)
def test_it_has_a_spec_with_everything_a_load_needs(
    tmp_path: Path, files: hub.Files, backend: str, main: str, needs: int
) -> None:
    files = {f"1/{name}": content for name, content in files.items()}
    model = seen(tmp_path, files)
    spec = model.specs[1]
    assert not model.problems and (spec.backend, spec.model_file) == (backend, main)
    assert spec.bytes_needed == needs + 16 * MIB and spec.devices == ("cpu",)


def test_a_module_is_counted_as_it_will_be_loaded(tmp_path: Path) -> None:
    model = seen(tmp_path, {**MODULE, "config.yaml": b"options: {dtype: bfloat16}\ninstances: 2"})
    assert model.specs[1].bytes_needed == 2 * (20 + 16 * MIB)


@pytest.mark.parametrize("backend", ["torch_module", "torchscript"])
def test_code_is_only_taken_from_a_trusted_repository(tmp_path: Path, backend: str) -> None:
    files = MODULE if backend == "torch_module" else {"model.pt": archive()}
    model = seen(tmp_path, files, trust_code=False)
    (problem,) = model.problems
    assert problem.rule == "trust" and backend in problem.message and not model.specs


def test_an_exported_program_is_looked_into_by_the_worker(tmp_path: Path) -> None:
    assert seen(tmp_path, {"model.pt2": archive()}, trust_code=False).specs[1].backend == (
        "torch_export"
    )


@pytest.mark.parametrize(
    ("files", "word"),
    [
        ({"model.safetensors": hub.weights()}, "'model.py' is not there"),
        ({"model.py": b"x"}, "'model.safetensors' is not there"),
        ({"model.py": b"x", "model.safetensors": hub.weights()[:-3]}, "its tensors need"),
        (
            {**hub.sharded_files(), "model.py": b"x", "model-00002-of-00003.safetensors": b""},
            "empty",
        ),
        ({"model.py": b"x", "options.yaml": b"", "model.safetensors": b""}, "empty"),
    ],
)
def test_half_of_a_module_is_told_and_not_served(
    tmp_path: Path, files: hub.Files, word: str
) -> None:
    model = seen(tmp_path, {**files, "config.yaml": b"backend: torch_module"})
    assert not model.specs and word in model.errors[0].message
    assert model.errors[0].rule == "incomplete"


def test_a_module_may_have_its_weights_in_shards_or_under_another_name(tmp_path: Path) -> None:
    files = {**hub.sharded_files(), "model.py": b"x", "config.yaml": b"backend: torch_module"}
    spec = seen(tmp_path, files).specs[1]
    assert (spec.model_file, spec.bytes_needed) == ("model.safetensors", 3 * 24 + 16 * MIB)
    named = {"model.py": b"x", "w.safetensors": hub.weights()}
    config = b"backend: torch_module\noptions: {model_file: w.safetensors}"
    assert seen(tmp_path / "n", {**named, "config.yaml": config}).specs[1].model_file == (
        "w.safetensors"
    )


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": hub.weights()}
    (problem, *_) = seen(tmp_path, files).errors
    assert "LoRA adapter" in problem.message and "'adapters/'" in problem.hint


@pytest.mark.parametrize(
    ("text", "files", "backend"),
    [
        ('platform: "pytorch_libtorch"', {"model.pt"}, "torchscript"),
        ('backend: "pytorch"', {"model.pt"}, "torchscript"),
        ('backend: "pytorch"', {"model.pt2"}, "torch_export"),
        ('backend: "pytorch" default_model_filename: "net.pt2"', {"net.pt2"}, "torch_export"),
        ('backend: "pytorch" default_model_filename: "net.pt"', {"model.pt2"}, "torchscript"),
        ('backend: "pytorch" platform: "torch_aoti"', {"model.pt2"}, "torch_export"),
        ('backend: "pytorch" platform: "pytorch_libtorch"', {"model.pt"}, "torchscript"),
    ],
)
def test_triton_has_one_name_for_them(text: str, files: set[str], backend: str) -> None:
    layer = as_triton_means(read_pbtxt(text.encode(), "m"), files)
    config, sources = merge([layer])
    assert config.backend == backend and sources["backend"] == "config.pbtxt:1"


def test_what_only_makes_triton_faster_is_a_warning() -> None:
    text = b"""backend: "pytorch"
parameters { key: "INFERENCE_MODE" value: { string_value: "true" } }
parameters { key: "model" value: { string_value: "x" } }"""
    layer = read_pbtxt(text, "m")
    assert layer.values["options"] == {"model": "x"}
    assert [p.message for p in layer.problems] == ["the parameter 'INFERENCE_MODE' is not honoured"]


def test_adapters_are_configured_within_bounds() -> None:
    config, sources = merge([read_yaml(b"adapters: {slots: 2, host_memory: 64MiB}")])
    assert (config.adapters.slots, config.adapters.host_memory) == (2, 64 * MIB)
    assert sources["adapters.slots"] == "config.yaml:1"
    assert sources["adapters.max_rank"] == "default"
    assert merge([read_yaml(b"adapters: false")])[0].adapters.enabled is False
    for wrong in ("slots: 0", "slots: 257", "max_rank: 513", "host_memory: 5 bananas", "slot: 1"):
        with pytest.raises(ConfigError) as caught:
            read_yaml(f"adapters:\n  {wrong}".encode())
        assert caught.value.where == "config.yaml:2"
