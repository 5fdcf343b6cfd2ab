"""Which backends there are, and what the front must know of each without importing its framework.

framework   the zygote that its workers are forked from
runs_code   the model's folder holds code that will be executed: it needs `trust_code`
gpu         it can use a GPU
snapshot    what is copied before a load (`hosts.snapshots`): external data, the folder, weights
            (safetensors, if the file system can without a second copy), nothing
platform    KServe V2 platform name
options     keys of `options` in the config that it understands
"""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass
from typing import Any, Literal, cast

from repository.backends.base import Backend
from repository.backends.reshaped import Reshaped, is_needed
from repository.config import ModelConfig
from repository.errors import LoadFailedError


@dataclass(frozen=True, slots=True)
class Entry:
    name: str
    where: str  # "module:Class"
    framework: Literal["onnx", "python", "torch", "text"]
    runs_code: bool
    gpu: bool
    snapshot: Literal["external", "folder", "weights", "none"]
    platform: str
    options: frozenset[str]


# Keys that mean the same to every backend, or are read before it is asked.
COMMON = frozenset({"model_file", "threads"})

BACKENDS: dict[str, Entry] = {
    "onnx": Entry(
        name="onnx",
        where="repository.backends.onnx:OnnxBackend",
        framework="onnx",
        runs_code=False,
        gpu=True,
        snapshot="external",
        platform="onnxruntime_onnx",
        options=COMMON
        | {"allow_cpu_fallback", "arena", "arena_shrinkage", "execution", "gpu_mem_limit"}
        | {"inter_threads", "mem_pattern", "optimization", "spinning"},
    ),
    "python": Entry(
        name="python",
        where="repository.backends.python:PythonBackend",
        framework="python",
        runs_code=True,
        gpu=True,
        snapshot="folder",
        platform="python",
        options=COMMON | {"class", "parameters"},
    ),
    "triton_python": Entry(
        name="triton_python",
        where="repository.backends.triton.backend:TritonPythonBackend",
        framework="python",
        runs_code=True,
        gpu=True,
        snapshot="folder",
        platform="python",
        options=COMMON | {"parameters"},
    ),
    "torch_module": Entry(
        name="torch_module",
        where="repository.backends.torch_module:TorchModuleBackend",
        framework="torch",
        runs_code=True,
        gpu=True,
        snapshot="weights",
        platform="pytorch_module",
        options=COMMON | {"class", "init", "dtype", "strict"},
    ),
    "torch_export": Entry(
        name="torch_export",
        where="repository.backends.torch_export:TorchExportBackend",
        framework="torch",
        runs_code=False,  # unless what it holds says so: it looks, and asks for `trust_code` then
        gpu=True,
        snapshot="none",  # it reads its file whole
        platform="pytorch_export",
        options=COMMON,
    ),
    "torchscript": Entry(
        name="torchscript",
        where="repository.backends.torchscript:TorchScriptBackend",
        framework="torch",
        runs_code=True,
        gpu=True,
        snapshot="none",  # it reads its file whole
        platform="pytorch_libtorch",
        options=COMMON,
    ),
    "text": Entry(
        name="text",
        where="repository.backends.text.backend:TextBackend",
        framework="text",
        runs_code=False,
        gpu=True,
        snapshot="weights",
        platform="text_generation",
        options=COMMON | {"dtype", "engine", "max_len", "prefill_chunk", "slots"},
    ),
    "embed": Entry(
        name="embed",
        where="repository.backends.embed.backend:EmbedBackend",
        framework="text",
        runs_code=False,
        gpu=True,
        snapshot="weights",
        platform="text_embedding",
        options=COMMON | {"dtype", "engine", "max_tokens", "normalize", "pooling"},
    ),
}


def entry(name: str) -> Entry:
    """Raises LoadFailedError for a backend that there is not."""
    try:
        return BACKENDS[name]
    except KeyError:
        raise LoadFailedError(
            f"there is no backend '{name}'; there are {', '.join(sorted(BACKENDS))}"
        ) from None


def make(name: str, config: ModelConfig | None = None) -> Backend:
    """A new backend, for a model with this config. Imports its framework: only where the model will
    run."""
    module, _, kind = entry(name).where.partition(":")
    made = cast("Backend", getattr(importlib.import_module(module), kind)())
    return Reshaped(made) if config is not None and is_needed(config) else made


def check_options(name: str, options: dict[str, Any]) -> None:
    """Raises LoadFailedError for a key that the backend does not understand."""
    known = entry(name).options
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(sorted(known))}"
            raise LoadFailedError(f"options.{key}: backend '{name}' does not know it; {hint}")


def option(options: dict[str, Any], key: str, kind: type, default: Any) -> Any:
    """The value of one option. Raises LoadFailedError if it is not of `kind`."""
    value = options.get(key, default)
    wrong = not isinstance(value, kind) or (kind is int and isinstance(value, bool))
    if value is not default and wrong:
        raise LoadFailedError(f"options.{key} is {value!r}; it must be of type {kind.__name__}")
    return value
