"""Which files of a version its backend needs, and that none of them is missing."""

from __future__ import annotations

import os
from dataclasses import dataclass

from repository.config import ModelConfig
from repository.folder import huggingface
from repository.folder.files import Files
from repository.folder.guess import WHOLE_FOLDER, model_file
from repository.folder.huggingface import GRAPHS, WEIGHTS, Described
from repository.folder.whole import LOOKS


@dataclass(frozen=True, slots=True)
class Parts:
    """Paths relative to the version's folder.

    main     what the backend opens; "": the whole folder
    weights  what goes to memory; what an ONNX file keeps beside itself is not known here
    looked   what must be whole before anything is loaded
    words    the tokenizer; "": there is none
    """

    main: str
    weights: tuple[str, ...]
    looked: tuple[str, ...]
    words: str = ""


def parts_of(config: ModelConfig, files: Files, about: Described | None) -> Parts:
    """`about`: what config.json says, for the backends that go by it. Raises ConfigError, FlawError."""
    main = model_file(config, files.sizes)
    if config.backend in WHOLE_FOLDER:
        huggingface.refuse_remote_code(about or Described())
        return _of_text(files) if config.backend == "text" else _of_embed(config, files, main)
    if config.backend == "ensemble":
        return Parts("", (), ())
    looked = [n for n in files.sizes if n == main or os.path.splitext(n)[1] in LOOKS]
    weights: tuple[str, ...] = (main,)
    if config.backend in ("python", "triton_python"):
        weights = tuple(files.sizes)
    elif config.backend == "torch_module" and main == WEIGHTS:
        weights = huggingface.weights_in(files)
    return Parts(main, weights, tuple(looked))


def _of_text(files: Files) -> Parts:
    weights = huggingface.weights_in(files)
    if not weights:
        raise huggingface.no_weights(files, "AutoModelForCausalLM")
    tokenizer = huggingface.need_tokenizer(files)
    huggingface.check_said(files)
    return Parts("", weights, (*_safetensors(files), tokenizer), tokenizer)


def _of_embed(config: ModelConfig, files: Files, main: str) -> Parts:
    modules = huggingface.modules_in(files)
    home = modules.home
    weights = huggingface.weights_in(files, home)
    graph = main or next((home + g for g in GRAPHS if home + g in files.sizes), "")
    if graph and (main or not weights or config.options.get("engine") == "onnx"):
        weights = (graph,)
    if not weights:
        raise huggingface.no_weights(files, "AutoModel", home)
    tokenizer = huggingface.need_tokenizer(files, home)
    huggingface.check_said(files, home)
    looked = (*_safetensors(files), tokenizer, *((graph,) if graph else ()))
    return Parts(main, (*weights, *modules.weights), looked, tokenizer)


def _safetensors(files: Files) -> list[str]:
    return sorted(n for n in files.sizes if n.endswith(".safetensors"))
