"""What a folder of somebody's is, before it is in a repository: for `modeldepot init`."""

from __future__ import annotations

import os
from pathlib import Path

from repository.config import ModelConfig
from repository.errors import ConfigError
from repository.folder.files import Files
from repository.folder.flaws import FlawError
from repository.folder.guess import TRITON_CLASS, guess, needs_config
from repository.folder.huggingface import describe, modules_in
from repository.folder.parts import parts_of
from repository.folder.walk import ignored

# Backends that run what lies in the folder. torch_export looks into its file first, where it is loaded.
RUNS_CODE = frozenset({"python", "triton_python", "torch_module", "torchscript"})


def files_below(folder: Path) -> dict[str, Path]:
    """Path relative to `folder` -> file; without what a server would not see."""
    found: dict[str, Path] = {}
    for at, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not ignored(name)]
        for path in (Path(at, name) for name in names if not ignored(name)):
            if path.is_file():
                found[path.relative_to(folder).as_posix()] = path
    return dict(sorted(found.items()))


def backend_of(folder: Path) -> str:
    """The backend that its files speak for, as if it were a version of a model. Raises ConfigError,
    also where a file that the backend needs is not there."""
    sizes = {
        name: path.stat().st_size
        for name, path in files_below(folder).items()
        if not name.startswith("adapters/")  # the model's, not the version's
    }
    # The folder is the caller's own: its links may lead anywhere.
    files = Files("/", os.path.realpath(folder), sizes)
    try:
        about = describe(files, modules_in(files).home) if needs_config(sizes, None) else None
        config = ModelConfig(backend=guess(sizes, about, files.read).values.get("backend"))
        parts_of(config, files, about)
    except FlawError as flaw:
        raise ConfigError(flaw.message, where=flaw.name, hint=flaw.hint) from flaw
    return config.backend or ""


def backend_of_code(file: Path) -> str:
    """Of a model.py alone: whose class is in it."""
    return "triton_python" if TRITON_CLASS in file.read_bytes() else "python"
