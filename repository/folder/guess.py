"""What a version's files tell when no config does."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

from repository.config import ModelConfig
from repository.errors import ConfigError
from repository.folder.huggingface import (
    CONFIG,
    GRAPHS,
    INDEX,
    WEIGHTS,
    Described,
    is_huggingface,
    is_pooled,
)
from repository.folder.schema import BACKENDS, Layer
from repository.names import shown

# What a backend opens where nobody says otherwise; "": no single file. In Triton's order: a folder
# that holds both is an ONNX model.
USUAL_FILE = {
    "onnx": "model.onnx",
    "torch_module": WEIGHTS,
    "python": "model.py",
    "triton_python": "model.py",
    "torch_export": "model.pt2",
    "torchscript": "model.pt",
    "text": "",
    "embed": "",
    "ensemble": "",
}
WHOLE_FOLDER = frozenset({"text", "embed"})
CODE_FILE = "model.py"  # of a torch_module, beside its weights
TRITON_CLASS = b"TritonPythonModel"  # what Triton looks for in a model.py

Read = Callable[[str], bytes]  # a file of the version; raises FlawError


def guess(
    files: Collection[str], described: Described | None = None, read: Read | None = None
) -> Layer:
    """The lowest layer: the backend that a version's files (relative to its folder) speak for.

    `described`: what its config.json says, where that was read (see `needs_config`). `read`: None, and
    a model.py is one of ours. Raises ConfigError for an architecture that no backend serves.
    """
    backend = _by_names(files) or (_by_architecture(files, described) if described else "")
    if backend == "python" and _is_tritons(read):
        return Layer("guessed", {"backend": "triton_python", "triton": {"backend": "python"}})
    return Layer("guessed", {"backend": backend} if backend else {})


def as_triton_means(layer: Layer, files: Collection[str], read: Read | None = None) -> Layer:
    """Triton's one backend for PyTorch is two of ours; which, is told by the file. Its backend "python"
    may mean a model.py that is written for ours."""
    if "triton" not in layer.values:
        return layer
    if layer.values.get("backend") == "triton_python" and CODE_FILE in files and read is not None:
        backend = "triton_python" if _is_tritons(read) else "python"
        return replace(layer, values={**layer.values, "backend": backend})
    if layer.values.get("backend") != "torchscript":
        return layer
    script, export = USUAL_FILE["torchscript"], USUAL_FILE["torch_export"]
    wish = layer.values.get("options", {}).get("model_file") or script
    if wish.endswith(".pt2") or (wish == script and script not in files and export in files):
        return replace(layer, values={**layer.values, "backend": "torch_export"})
    return layer


def _is_tritons(read: Read | None) -> bool:
    return read is not None and TRITON_CLASS in read(CODE_FILE)


def needs_config(files: Collection[str], said: str | None) -> bool:
    """Whether config.json must be read: the backend `said` in a config is one of those that go by
    it, or nothing was said and the names alone do not tell."""
    if said is not None:
        return said in WHOLE_FOLDER
    return is_huggingface(files) and not _by_names(files)


def _by_names(files: Collection[str]) -> str:
    for backend, usual in USUAL_FILE.items():
        beside = CODE_FILE if backend == "torch_module" else usual
        if usual and usual in files and beside in files:
            return backend
    weights = any(f.endswith(".safetensors") and "/" not in f for f in files)
    if len(_onnx_files(files)) == 1 and not (CONFIG in files and weights):
        return "onnx"
    return ""


def _by_architecture(files: Collection[str], described: Described) -> str:
    if is_pooled(files):
        return "embed"  # also a decoder, if it was trained to embed
    if described.writes:
        return "text"
    if described.encodes:
        return "embed"
    if not described.architectures:
        raise ConfigError(
            f"{CONFIG} names no architecture",
            hint="set 'backend: text' or 'backend: embed' in config.yaml if it is such a model",
        )
    raise ConfigError(
        f"no backend serves the architecture {shown(', '.join(described.architectures))} from such a "
        "folder: text takes ...ForCausalLM and ...LMHeadModel, embed takes encoders of texts",
        hint="export it to ONNX, or write a model.py (backend: torch_module or python); if text or "
        "embed can run it after all, set 'backend' in config.yaml",
    )


def model_file(config: ModelConfig, files: Collection[str]) -> str:
    """The file that the backend opens, relative to the version's folder; "" for the whole folder.

    Raises ConfigError where there is none, or where there are several to choose from.
    """
    if config.backend is None:
        raise _no_backend(files)
    if config.backend == "ensemble":
        return ""
    wish = config.options.get("model_file")
    if config.backend in WHOLE_FOLDER:
        return _of_whole_folder(config.backend, wish, files)
    main = str(wish) if wish is not None else _found(config.backend, files)
    # Weights may be an index and its shards; whether all are there is looked at later.
    if main not in files and (main != WEIGHTS or INDEX not in files):
        raise _not_there(main)
    if config.backend == "torch_module" and CODE_FILE not in files:
        raise _not_there(CODE_FILE, f", which holds the class for '{shown(main)}'")
    return main


def _of_whole_folder(backend: str, wish: object, files: Collection[str]) -> str:
    if wish is None:
        return ""
    if backend != "embed" or not str(wish).endswith(".onnx"):
        only = (
            "only an .onnx file can be named" if backend == "embed" else "it reads the whole folder"
        )
        raise ConfigError(
            f"'options.model_file' is not for the backend {backend}: {only}", hint="remove it"
        )
    if wish not in files:
        raise _not_there(str(wish))
    return str(wish)


def _found(backend: str, files: Collection[str]) -> str:
    usual = USUAL_FILE[backend]
    choice = _onnx_files(files) if backend == "onnx" and usual not in files else []
    if len(choice) > 1:
        raise ConfigError(
            f"several .onnx files and none is {usual}: {_listed(choice)}",
            hint="say which one with 'options.model_file'",
        )
    return choice[0] if choice else usual


def _not_there(name: str, why: str = "") -> ConfigError:
    return ConfigError(
        f"'{shown(name)}' is not there{why}", hint="copy it, or wait until it is copied"
    )


def _no_backend(files: Collection[str]) -> ConfigError:
    if "adapter_config.json" in files:
        return ConfigError(
            "this is a LoRA adapter, not a model",
            hint="put its folder into 'adapters/' of the model that it was made for",
        )
    usual = list(dict.fromkeys(n for n in USUAL_FILE.values() if n and n != WEIGHTS))
    where = f"; to go with {WEIGHTS}: {CONFIG} or {CODE_FILE}" if WEIGHTS in files else ""
    graph = next((g for g in GRAPHS if g in files), "")
    ours = f", or set 'backend: embed' to serve {graph}" if graph else ""
    return ConfigError(
        f"no backend for these files: {_listed(files)}",
        hint=f"name the model file {', '.join(usual[:-1])} or {usual[-1]}{where}; or set 'backend' "
        f"({', '.join(BACKENDS)}) and 'options.model_file'{ours}",
    )


def _onnx_files(files: Collection[str]) -> list[str]:
    return sorted(f for f in files if f.endswith(".onnx") and "/" not in f)


def _listed(files: Collection[str]) -> str:
    first = [shown(f) for f in sorted(files)[:5]]
    return ", ".join(first) + (" ..." if len(files) > 5 else "") if first else "there are none"
