"""`modeldepot validate` over a folder with one fault of each kind: where, which rule, what to do."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models import add_onnx, external_onnx, python_model, relocate_external

FAULTS: dict[str, tuple[str, str]] = {
    # where it is told: rule, and words of what is wrong and what to do
    "bad name": ("name", "rename the folder"),
    "unknown/config.yaml:2": ("config", r"did you mean 'priority'\?"),
    "bomb/config.yaml:1": ("config", "anchors and aliases"),
    "twice/config.yaml:2": ("config", "is there twice"),
    "type/config.yaml:1": ("config", "must be a whole number"),
    "numpy/config.yaml:1": ("config", "unknown datatype 'f4,,'.*known datatypes"),
    "triton/config.pbtxt:2": ("config", r"did you mean 'max_batch_size'\?"),
    "both": ("config", "remove one of them"),
    "nothing": ("version", "add a folder 1/"),
    "specific": ("version", "mend the versions named above|version_policy"),
    "empty/1/model.onnx": ("incomplete", "is empty.*copy"),
    "half/1/model.onnx": ("incomplete", "copy the file again"),
    "whole/1": ("config", "no backend for these files.*or set 'backend'"),
    "code": ("trust", "--trust-code"),
    "outside": ("link", "copy what it points to"),
    "linked/1/model.onnx": ("link", "copy what it points to"),
    "config/config.yaml": ("link", "copy what it points to"),
    "data/1/model.onnx": ("link", "without '..'"),
    "dangling/1/more.bin": ("link", "mend or remove"),
    "deep/1/a/b/c/d/e/f/g/h/i": ("layout", "move the files up"),
}
# What follows from another fault of the same model is told as well.
FOLLOWS = ("dangling", "data", "deep", "empty", "half", "linked", "whole")
WARNINGS: dict[str, tuple[str, str]] = {
    "model.onnx": ("layout", "each model needs its own folder"),
    "second/config.yaml:1": ("alias", "choose another"),
    "misnamed/01": ("version", "rename the folder"),
    "specific/config.yaml:1": ("version", "add the folder 7/"),
    "beside/model.onnx": ("layout", "move it into a version folder"),
    "inner/1/config.yaml": ("layout", "move it to the model's folder"),
}


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("faulty") / "models"
    away = add_onnx(root.parent / "away" / "1" / "model.onnx").parent
    (away / "config.yaml").write_text("priority: 1\n")
    for name in ("fine", "bad name", "both", "twice", "type", "bomb", "numpy", "specific", "first",
                 "second", "misnamed", "beside", "inner", "triton", "unknown", "config",
                 "dangling", "deep"):  # fmt: skip
        add_onnx(root / name / "1" / "model.onnx")
    configs = {
        "unknown": "ttl_s: 5\nprioritie: 1\n", "type": "priority: high\n", "both": "",
        "bomb": "a: &a [x, x]\nb: [*a, *a]\n", "twice": "priority: 1\npriority: 2\n",
        "numpy": "inputs: [{name: x, datatype: 'f4,,', shape: [4]}]\n",
        "specific": "version_policy: {specific: [7]}\n",
        "first": "aliases: [best]\n", "second": "aliases: [best]\n",
    }  # fmt: skip
    for name, text in configs.items():
        (root / name / "config.yaml").write_text(text)
    (root / "both" / "config.pbtxt").touch()
    (root / "triton" / "config.pbtxt").write_text('name: "triton"\nmax_batch_sise: 4\n')
    (root / "nothing").mkdir()
    (root / "nothing" / "config.yaml").touch()
    for name, raw in {
        "empty/1/model.onnx": b"",
        "half/1/model.onnx": (away / "model.onnx").read_bytes()[:60],
        "whole/1/model.safetensors": b"\xff" * 8 + b"{}",
    }.items():
        (root / name).parent.mkdir(parents=True)
        (root / name).write_bytes(raw)
    python_model(root / "code", "class Model: ...")
    (root / "outside").symlink_to(away)
    (root / "linked" / "1").mkdir(parents=True)
    (root / "linked" / "1" / "model.onnx").symlink_to(away / "model.onnx")
    (root / "config" / "config.yaml").symlink_to(away / "config.yaml")
    relocate_external(external_onnx(root / "data" / "1" / "model.onnx"), "../../../away/x")
    (root / "dangling" / "1" / "more.bin").symlink_to("nowhere")
    (root / "deep" / "1" / Path(*"abcdefghi")).mkdir(parents=True)
    add_onnx(root / "model.onnx")
    add_onnx(root / "misnamed" / "01" / "model.onnx")
    add_onnx(root / "beside" / "model.onnx")
    (root / "inner" / "1" / "config.yaml").touch()
    return root


def validate(repo: Path, *flags: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "server", "validate", str(repo), *flags],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "COLUMNS": "500"},
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_each_fault_is_told_with_its_place_its_rule_and_what_to_do(repo: Path) -> None:
    code, out = validate(repo)
    assert code == 7
    *lines, total = out.splitlines()
    assert total.startswith(f"{len(FAULTS) + len(FOLLOWS)} findings, ")
    for place, (rule, words) in FAULTS.items():
        told = [line for line in lines if line.startswith(f"{place}: {rule}: ")]
        assert len(told) == 1 and re.search(words, told[0]), (place, told, out)
    for place, (rule, words) in WARNINGS.items():
        told = [line for line in lines if line.startswith(f"{place}: warning: {rule}: ")]
        assert told and re.search(words, told[0]), (place, told, out)
    assert str(repo.parent) not in out and "fine" not in out


def test_the_same_in_json_for_machines(repo: Path) -> None:
    code, out = validate(repo, "--json")
    assert code == 7
    found = json.loads(out)
    errors = {
        f["path"] + (f":{f['line']}" if f["line"] else ""): f
        for f in found
        if f["level"] == "error"
    }
    assert errors.keys() == FAULTS.keys() | set(FOLLOWS)
    for place, (rule, words) in FAULTS.items():
        told = errors[place]
        assert told["rule"] == rule
        assert re.search(words, f"{told['message']} ({told['hint']})"), told


def test_warnings_alone_are_no_findings_unless_they_are_asked_for(tmp_path: Path) -> None:
    add_onnx(tmp_path / "m" / "1" / "model.onnx")
    add_onnx(tmp_path / "m" / "01" / "model.onnx")
    assert validate(tmp_path)[0] == 0
    assert validate(tmp_path, "--strict")[0] == 7
