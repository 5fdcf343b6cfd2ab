"""Folders as Triton's repositories have them: empty versions, configs by name, Python, placements."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from repository.folder.scan import Scanner
from repository.lifecycle.generation import first_choice
from repository.snapshot import ModelFolder
from tests.fakes.heart import reconciler, spec
from tests.fakes.host import FakeHost
from tests.models import add_onnx

ENSEMBLE = """\
platform: "ensemble"
input { name: "x" data_type: TYPE_FP32 dims: 4 }
output { name: "y" data_type: TYPE_FP32 dims: 4 }
ensemble_scheduling { step { model_name: "m"
  input_map { key: "x" value: "x" } output_map { key: "y" value: "y" } } }
"""
PLAIN = "class Model:\n    pass\n"
TRITONS = "import triton_python_backend_utils as pb_utils\nclass TritonPythonModel:\n    pass\n"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def seen(root: Path, name: str = "m", **options: Any) -> ModelFolder:
    return Scanner(root, trust_code=True, **options).scan().models[name]


def test_an_ensemble_needs_no_files(tmp_path: Path) -> None:
    write(tmp_path / "e" / "config.pbtxt", ENSEMBLE)
    scanner = Scanner(tmp_path, trust_code=False)
    (spec,) = scanner.scan().models["e"].specs.values()
    assert (spec.version, spec.backend, spec.bytes_needed) == (1, "ensemble", 0)
    assert spec.config.ensemble is not None and spec.model_file == ""
    for number in (2, 3):
        (tmp_path / "e" / str(number)).mkdir()
    folder = scanner.scan().models["e"]
    assert folder.versions == (3, 2) and tuple(folder.specs) == (3,)
    assert scanner.scan().models["e"] == folder and not folder.problems


def test_an_empty_version_of_any_other_model_is_none_yet(tmp_path: Path) -> None:
    add_onnx(tmp_path / "m" / "1" / "model.onnx")
    (tmp_path / "m" / "2").mkdir()
    (tmp_path / "m" / "config.pbtxt").write_text("max_batch_size: 2")
    assert seen(tmp_path).versions == (1,)


def test_an_ensemble_says_all_its_inputs_and_outputs(tmp_path: Path) -> None:
    write(tmp_path / "m" / "config.pbtxt", ENSEMBLE.replace("output {", "input {"))
    (problem,) = seen(tmp_path).problems
    assert "must specify 'output' for model 'm': an ensemble has no others" in problem.message


def test_folders_of_tritons_are_no_versions_and_no_models(tmp_path: Path) -> None:
    add_onnx(tmp_path / "m" / "1" / "model.onnx")
    for path in ("warmup/1", "initial_state/2", "configs/a.pbtxt", "01/model.onnx"):
        write(tmp_path / "m" / path, "x")
    snapshot = Scanner(tmp_path, trust_code=False).scan()
    model = snapshot.models["m"]
    assert tuple(snapshot.models) == ("m",) and model.versions == (1,)
    (problem,) = model.problems
    assert problem.warning and problem.where == "m/01" and "leading zeros" in problem.message
    write(tmp_path / "m" / "warmup" / "1", "y, which is longer")
    assert seen(tmp_path).fingerprint != model.fingerprint


@pytest.mark.parametrize("config", [None, 'backend: "python"', "max_batch_size: 2"])
@pytest.mark.parametrize(("code", "backend"), [(PLAIN, "python"), (TRITONS, "triton_python")])
def test_a_model_py_is_tritons_if_it_has_tritons_class(
    tmp_path: Path, config: str | None, code: str, backend: str
) -> None:
    write(tmp_path / "m" / "1" / "model.py", code)
    if config is not None:
        write(tmp_path / "m" / "config.pbtxt", config)
    (spec,) = seen(tmp_path).specs.values()
    assert spec.backend == spec.config.backend == backend
    assert bool(spec.config.triton) == (config is not None or backend == "triton_python")


def test_a_model_that_nobody_can_name_a_backend_for_is_told_in_tritons_words(
    tmp_path: Path,
) -> None:
    write(tmp_path / "m" / "1" / "weights.bin", "x")
    write(tmp_path / "m" / "config.pbtxt", "max_batch_size: 2")
    (problem, *_) = seen(tmp_path).problems
    assert problem.message == (
        "Invalid model name: Could not determine backend for model 'm' with no backend in model "
        "configuration. Expected model name of the form 'model.<backend_name>'."
    )


def test_a_config_by_name_is_told_with_its_name(tmp_path: Path) -> None:
    add_onnx(tmp_path / "m" / "1" / "model.onnx")
    write(tmp_path / "m" / "config.pbtxt", "max_batch_size: 2")
    write(
        tmp_path / "m" / "configs" / "big.pbtxt",
        "max_batch_size: 9\nresponse_cache { enable: true }",
    )
    (spec,) = seen(tmp_path, config_name="big").specs.values()
    assert spec.sources["max_batch_size"] == "configs/big.pbtxt:1"
    (problem,) = seen(tmp_path, config_name="big").problems
    assert problem.where == "m/configs/big.pbtxt:2"
    assert seen(tmp_path, config_name="../big").specs[1].config.max_batch_size == 2


def test_where_each_instance_is_to_be_is_the_only_place_for_the_model(tmp_path: Path) -> None:
    add_onnx(tmp_path / "m" / "1" / "model.onnx")
    groups = "instance_group [ { kind: KIND_GPU count: 2 gpus: 1 }, { kind: KIND_CPU } ]"
    write(tmp_path / "m" / "config.pbtxt", groups)
    (spec,) = seen(tmp_path, gpus=("cuda:0", "cuda:1")).specs.values()
    assert spec.config.devices == ("cuda:1", "cuda:1", "cpu") and spec.config.instances == 3
    assert spec.devices == ("cuda:1", "cpu")
    (where,) = first_choice(spec)
    assert where.devices == spec.config.devices
    assert where.needs["cuda:1"] == -(-2 * spec.bytes_needed // 3)
    (problem,) = seen(tmp_path, gpus=("cuda:0",)).problems
    assert problem.where == "m/config.pbtxt:1"
    assert "'devices' is cuda:1, but this machine has cuda:0" in problem.message


async def test_the_writer_looks_for_no_other_place_than_the_one_that_is_said() -> None:
    there = ("cuda:1", "cuda:1", "cpu")
    what = spec("a", n_bytes=300 << 20, devices=there, instances=3)
    models = reconciler(FakeHost, 1 << 30, devices=("cuda:0", "cuda:1", "cpu"))
    (only,) = models.options(replace(what, devices=("cuda:1", "cpu")))
    assert only.devices == there and only.needs == {"cuda:1": 200 << 20, "cpu": 100 << 20}
