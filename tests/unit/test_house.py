"""The house keeps its own rules: documents say what the code says, files stay small."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from repository.config import (
    Adapters,
    Batching,
    Checks,
    Control,
    Ensemble,
    EnsembleStep,
    LevelPolicy,
    ModelConfig,
    Sequences,
    State,
    TensorConfig,
    WarmupInput,
    WarmupRequest,
)
from server.settings import FIELDS

HOME = Path(__file__).resolve().parents[2]
LONGEST = 420  # lines; "about 400"


def sources(*folders: str) -> list[Path]:
    return sorted(p for folder in folders for p in (HOME / folder).rglob("*.py"))


def project() -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = tomllib.loads((HOME / "pyproject.toml").read_text())
    return found


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked() -> dict[str, str]:
    lines = (HOME / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {normal(name): version for name, version in pairs}


def rows(document: str) -> Iterator[str]:
    """The first cells of every table row of a document."""
    for line in (HOME / "docs" / document).read_text().splitlines():
        if line.startswith("| `"):
            yield line.split("|")[1]


def test_every_key_of_a_models_config_is_documented() -> None:
    written = " ".join(rows("config.md"))
    for struct, prefix in (
        (ModelConfig, ""),
        (TensorConfig, ""),
        (Batching, "batching."),
        (LevelPolicy, "by_priority[]."),
        (WarmupRequest, "warmup[]."),
        (Checks, "checks."),
        (Adapters, "adapters."),
        (WarmupInput, "inputs[]."),
        (Ensemble, "ensemble."),
        (EnsembleStep, "steps[]."),
        (Sequences, "sequences."),
        (Control, "controls[]."),
        (State, "states[]."),
    ):
        for field in msgspec.structs.fields(struct):
            name = f"{prefix}{field.name}"
            if name not in ("batching", "checks", "adapters"):  # their own keys are
                assert f"`{name}`" in written, f"docs/config.md has no row for {name}"


def test_every_setting_of_the_server_is_documented() -> None:
    written = " ".join(rows("operations.md"))
    for name in FIELDS:
        flag = "REPO" if name == "repo" else "--" + name.replace("_", "-")
        assert f"`{flag}`" in written, f"docs/operations.md has no row for {flag}"


def test_every_setting_that_is_documented_exists() -> None:
    flags = re.findall(r"`--([a-z-]+)`", " ".join(rows("operations.md")))
    assert {flag.replace("-", "_") for flag in flags} <= set(FIELDS)


def test_every_file_begins_with_what_it_is() -> None:
    silent = [
        p.relative_to(HOME).as_posix()
        for p in sources("repository", "server")
        if (text := p.read_text()) and not text.startswith('"""')
    ]
    assert silent == []


def test_files_can_be_held_in_the_head() -> None:
    lengths = {
        p.relative_to(HOME).as_posix(): len(p.read_text().splitlines())
        for p in sources("repository", "server", "tests", "examples")
    }
    assert {name: n for name, n in lengths.items() if n > LONGEST} == {}


def test_the_lock_has_every_dependency_and_no_local_build() -> None:
    settings = project()["project"]
    extra = settings["optional-dependencies"]
    assert isinstance(extra, dict)
    dependencies = settings["dependencies"]
    assert isinstance(dependencies, list)
    wanted = {normal(re.split(r"[^A-Za-z0-9._-]", d)[0]) for d in [*dependencies, *extra["dev"]]}
    # One of the two onnxruntimes is installed, by platform.
    assert wanted - {"onnxruntime"} <= locked().keys()
    assert [n for n, version in locked().items() if "+" in version or "@" in version] == []


def test_links_between_documents_lead_somewhere() -> None:
    links = [
        (document, target)
        for document in [*HOME.glob("*.md"), *(HOME / "docs").rglob("*.md")]
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text())
        if "://" not in target
    ]
    assert [f"{d.name}: {t}" for d, t in links if not (d.parent / t).exists()] == []


@pytest.mark.parametrize("module", ["server.cli", "server.run", "repository.repository"])
def test_the_front_imports_no_framework(module: str) -> None:
    heavy = ("torch", "onnxruntime", "grpc", "sklearn", "onnx")
    script = (
        f"import sys, {module}\nsys.exit(', '.join(m for m in {heavy!r} if m in sys.modules) or 0)"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=HOME)
    assert ended.returncode == 0, ended.stderr
