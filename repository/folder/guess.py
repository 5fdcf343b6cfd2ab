"""What a version's file names tell when no config does."""

from __future__ import annotations

from collections.abc import Collection

from repository.config import ModelConfig
from repository.errors import ConfigError
from repository.folder.schema import BACKENDS, Layer
from repository.names import shown

# In Triton's order: a folder that holds both is an ONNX model.
USUAL_FILE = {"onnx": "model.onnx", "python": "model.py"}


def guess(files: Collection[str]) -> Layer:
    """The lowest layer: the backend that a version's files (relative to its folder) speak for."""
    for backend, usual in USUAL_FILE.items():
        if usual in files:
            return Layer("guessed", {"backend": backend})
    if len(_onnx_files(files)) == 1:
        return Layer("guessed", {"backend": "onnx"})
    return Layer("guessed")


def model_file(config: ModelConfig, files: Collection[str]) -> str:
    """The file that the backend opens, relative to the version's folder.

    Raises ConfigError where there is none, or where there are several to choose from.
    """
    if config.backend is None:
        raise ConfigError(
            f"no backend for these files: {_listed(files)}",
            hint=f"name the model file {' or '.join(USUAL_FILE.values())}, or set 'backend' "
            f"({', '.join(BACKENDS)}) and 'options.model_file'",
        )
    wish = config.options.get("model_file")
    usual = USUAL_FILE[config.backend]
    if wish is not None:
        choice = [wish] if wish in files else []
    elif usual in files or config.backend != "onnx":
        choice = [usual] if usual in files else []
    else:
        choice = _onnx_files(files)
    if len(choice) == 1:
        return str(choice[0])
    if choice:
        raise ConfigError(
            f"several .onnx files and none is {usual}: {_listed(choice)}",
            hint="say which one with 'options.model_file'",
        )
    raise ConfigError(
        f"'{shown(str(wish or usual))}' is not there", hint="copy it, or wait until it is copied"
    )


def _onnx_files(files: Collection[str]) -> list[str]:
    return sorted(f for f in files if f.endswith(".onnx") and "/" not in f)


def _listed(files: Collection[str]) -> str:
    first = [shown(f) for f in sorted(files)[:5]]
    return ", ".join(first) + (" ..." if len(files) > 5 else "") if first else "there are none"
