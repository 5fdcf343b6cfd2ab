"""Whatever lies in a folder, the scan of the repository goes on, and only Problems come of it."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from repository.config import ModelConfig
from repository.errors import ConfigError
from repository.folder.assemble import Rules, assemble
from repository.folder.layering import merge
from repository.folder.layout import Layout
from repository.folder.read_pbtxt import read_pbtxt
from repository.folder.read_yaml import read_yaml
from repository.folder.scan import Scanner
from repository.folder.whole import inspect
from tests.models import add_onnx

LONGEST = 600  # characters of a reason
KEYS = [field.encode_name for field in msgspec.structs.fields(ModelConfig)]

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(2**1000, 2**1100)
    | st.floats()
    | st.text(max_size=30)
    | st.sampled_from(["all", "auto", "cuda:0", "2GiB", "f4,,", "(2", "FP32", "i8", "../x", "S-1"])
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*KEYS, "name", "datatype", "shape", "latest"]), inner)
    ),
    max_leaves=8,
)
configs = st.dictionaries(st.sampled_from(KEYS), values, max_size=4)
tensors = st.fixed_dictionaries({"name": scalars, "datatype": scalars, "shape": values})


def told(reading: Callable[[], object]) -> str:
    try:
        reading()
    except ConfigError as error:
        return f"{error} {error.hint}"
    return ""


def judged(config: dict[str, Any]) -> str:
    """What is told of a config; empty if it is a good one. JSON is YAML but for NaN and Infinity."""
    text = json.dumps(config).replace("NaN", ".nan").replace("-Infinity", "-.inf")
    return told(lambda: merge([read_yaml(text.replace("Infinity", ".inf").encode())]))


@given(configs)
@settings(deadline=None)
@example({"ttl_s": 10**400})
@example({"checks": {"atol": 10**400}})
@example({"options": {"a": math.nan}})
@example({"options": {"a": math.inf}})
def test_a_config_is_good_or_a_config_error_and_nothing_else(config: dict[str, Any]) -> None:
    assert len(judged(config)) <= LONGEST


@given(st.lists(tensors, max_size=2))
@settings(deadline=None)
@example([{"name": "x", "datatype": "f4,,", "shape": [1]}])
@example([{"name": "x", "datatype": "(2", "shape": [1]}])
@example([{"name": "x", "datatype": "1" * 5000 + "f4", "shape": [1]}])
def test_the_tensors_of_a_config_are_good_or_a_config_error(inputs: list[dict[str, Any]]) -> None:
    assert len(judged({"inputs": inputs})) <= LONGEST


@given(st.binary(max_size=60))
@settings(deadline=None)
def test_any_bytes_are_yaml_or_a_config_error(text: bytes) -> None:
    assert len(told(lambda: read_yaml(text))) <= LONGEST


PBTXT = b"""
name: "m"  platform: "onnxruntime_onnx"  max_batch_size: 8
input [{ name: "x" data_type: TYPE_FP32 dims: [ -1, 4 ] }]
version_policy: { specific: { versions: [1, 2] } }
instance_group { count: 2 kind: KIND_GPU gpus: [0] }
dynamic_batching { preferred_batch_size: [4] max_queue_delay_microseconds: 100 }
parameters { key: "a" value: { string_value: "b" } }
model_warmup { name: "w" batch_size: 1 inputs { key: "x" value: { data_type: TYPE_FP32 dims: 4 } } }
"""
pieces = st.sampled_from(
    [b"{", b"}", b"[", b"]", b"-1", b"9" * 30, b'"', b"#", b"\0", b"\xff", b"<", b""]
)


@given(st.lists(st.tuples(st.integers(0, len(PBTXT)), st.integers(0, 9), pieces), max_size=3))
@settings(deadline=None)
def test_a_pbtxt_that_was_damaged_is_good_or_a_config_error(
    damage: list[tuple[int, int, bytes]],
) -> None:
    text = PBTXT
    for at, length, piece in damage:
        text = text[:at] + piece + text[at + length :]
    assert len(told(lambda: merge([read_pbtxt(text, "m")]))) <= LONGEST


@pytest.mark.parametrize("digits", [19, 20, 4300, 4301, 100_000])
def test_a_safetensors_header_with_endless_numbers_is_a_problem(
    tmp_path: Path, digits: int
) -> None:
    number = "9" * digits
    header = f'{{"a":{{"dtype":"X","shape":[{number}],"data_offsets":[0,{number}]}}}}'
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode())
    problem = inspect(str(path), str(tmp_path), "m").problem
    assert problem is not None and problem.rule == "incomplete" and len(str(problem)) < LONGEST


def test_a_file_that_became_a_link_out_since_it_was_seen_is_not_read(tmp_path: Path) -> None:
    root, away = tmp_path / "models", add_onnx(tmp_path / "away" / "model.onnx")
    model = add_onnx(root / "m" / "1" / "model.onnx")
    (root / "m" / "config.yaml").write_text("priority: 1\n")
    (found,) = Layout(str(root)).models()
    (away.parent / "config.yaml").write_text("hunter2: 1\n")
    for path in (model, root / "m" / "config.yaml"):
        path.unlink()
        path.symlink_to(away.parent / path.name)
    real = str(root.resolve())
    told = assemble(found, root, Rules(), lambda path, where, v: inspect(path, real, where, v))
    assert told.broken and "hunter2" not in str(told.problems)
    verdict = inspect(str(model), real, "m/1/model.onnx")
    assert verdict.problem is not None and "links" in verdict.problem.message


def test_long_lists_are_refused_and_many_missing_versions_told_in_part(tmp_path: Path) -> None:
    assert "at most 1000" in judged({"aliases": [f"a{i}" for i in range(1001)]})
    add_onnx(tmp_path / "m" / "1" / "model.onnx")
    text = json.dumps({"version_policy": {"specific": list(range(2, 1002))}})
    (tmp_path / "m" / "config.yaml").write_text(text)
    problems = Scanner(tmp_path, trust_code=False).scan().models["m"].problems
    assert len(problems) < 10 and all(len(str(p)) < LONGEST for p in problems)


def test_a_bug_that_one_folder_brings_out_is_that_models_problem(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add_onnx(tmp_path / "m" / "1" / "model.onnx")
    (found,) = Layout(str(tmp_path)).models()

    def broken(path: str, where: str, version: int) -> Any:
        raise ZeroDivisionError("of all things")

    model = assemble(found, tmp_path, Rules(), broken)
    (problem,) = model.problems
    assert (problem.rule, problem.version, model.broken) == ("internal", None, True)
    assert "ZeroDivisionError" in problem.message and "of all things" in caplog.text
    assert model.versions == (1,) and dict(model.specs) == {}
    assert model.fingerprint == Scanner(tmp_path, trust_code=False).scan().models["m"].fingerprint
