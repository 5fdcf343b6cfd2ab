"""What is read of a Hugging Face folder, and what is refused.

Read: config.json, generation_config.json, the weights (safetensors, whole or in shards), the
tokenizer (tokenizer.json and what lies beside it). Code that a folder brings is never run, pickles
are never read, nothing is fetched. The weights are read by us (`backends.weights`), so that only a
private copy is ever mapped; transformers builds the model around them.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from repository.backends.base import Order
from repository.backends.text.building import build, model_and_report_of
from repository.backends.weights import weight_files
from repository.errors import IncompleteFilesError, LoadFailedError

CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer.json"
MAX_JSON = 16 << 20  # bytes of a config
NAMED = 5  # so many weights are named in an error
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What transformers raises for configs and tokenizers that it cannot use.
FOREIGN = (ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError, AttributeError)


def be_quiet() -> None:
    """What transformers reports of a load is looked at, and told, by us; it warns of the rest."""
    quiet: Any = logging
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model that we run. Raises IncompleteFilesError, LoadFailedError."""
    said = _json(folder / CONFIG)
    if said is None:
        raise IncompleteFilesError(f"{CONFIG} is missing")
    if "auto_map" in said:
        raise LoadFailedError(
            f"{CONFIG} has auto_map: the model brings code of its own, which the text backend never "
            "runs; take a model that transformers knows, or wrap this one in a python backend"
        )
    if "quantization_config" in said:
        raise LoadFailedError(
            f"{CONFIG} has quantization_config: quantised weights are not supported; take the model "
            "in float32, bfloat16 or float16"
        )
    if not isinstance(said.get("model_type"), str):
        raise LoadFailedError(f"{CONFIG} has no model_type")
    return said


def _json(path: Path) -> dict[str, Any] | None:
    """None: no such file."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise LoadFailedError(f"{path.name} has more than {MAX_JSON} bytes")
        said = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise IncompleteFilesError(f"{path.name} is no JSON: {error}") from error
    if not isinstance(said, dict):
        raise LoadFailedError(f"{path.name} must be a JSON object")
    return said


def ends_of(folder: Path, config: Any) -> frozenset[int]:
    """Ids that end an answer. The generation config's where it says any, and the config's."""
    said = (_json(folder / GENERATION) or {}).get("eos_token_id")
    ends: set[int] = set()
    for one in (said, getattr(config.get_text_config(), "eos_token_id", None)):
        ends.update(e for e in (one if isinstance(one, list) else [one]) if isinstance(e, int))
    return frozenset(ends)


def read_tokenizer(folder: Path) -> Any:
    """Raises IncompleteFilesError, LoadFailedError."""
    if not (folder / TOKENIZER).is_file():
        raise IncompleteFilesError(
            f"{TOKENIZER} is missing; other kinds of tokenizers are not read"
        )
    if "auto_map" in (_json(folder / "tokenizer_config.json") or {}):
        raise LoadFailedError(
            "tokenizer_config.json has auto_map: the tokenizer brings code of its own, which the text "
            "backend never runs"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except FOREIGN as error:
        raise LoadFailedError(
            f"{TOKENIZER} cannot be used: {_first_line(error, folder)}"
        ) from error
    except Exception as error:
        raise IncompleteFilesError(
            f"{TOKENIZER} cannot be read: {_first_line(error, folder)}"
        ) from error
    if not tokenizer.is_fast:
        raise LoadFailedError(f"{TOKENIZER} makes no fast tokenizer")
    return tokenizer


def read_model(order: Order, said: dict[str, Any], config: Any, dtype: str) -> Any:
    """The model on its device, in eval mode. `said`: its config.json; `config`: the same for
    transformers; `dtype`: "auto" (the config's, else float32) or one of DTYPES.

    Raises IncompleteFilesError, FilesChangedError, LoadFailedError."""
    kind, wanted = _kind_and_dtype(order, said, config, dtype)
    try:
        model, report, count = build(kind, config, order, wanted)
    except FOREIGN as error:
        raise _cannot_build(kind, error, order.path) from error
    _check_report(report, count)
    model.generation_config = bare_generation()
    return model.eval().requires_grad_(False)


def check_model(order: Order, said: dict[str, Any], config: Any, dtype: str) -> None:
    """As `read_model`, by the headers of the weights: nothing is read, and no memory is used. Raises
    the same."""
    kind, wanted = _kind_and_dtype(order, said, config, dtype)
    try:
        _, report, count = model_and_report_of(kind, config, order, wanted)
    except FOREIGN as error:
        raise _cannot_build(kind, error, order.path) from error
    _check_report(report, count)


def _kind_and_dtype(
    order: Order, said: dict[str, Any], config: Any, dtype: str
) -> tuple[Any, torch.dtype]:
    kind = _class_of(config, said)
    _check_files(order.path)
    return kind, _dtype(config, dtype)


def _cannot_build(kind: Any, error: BaseException, folder: Path) -> LoadFailedError:
    return LoadFailedError(
        f"transformers {transformers.__version__} cannot build {kind.__name__}: "
        f"{_first_line(error, folder)}"
    )


def model_config(folder: Path) -> Any:
    """As transformers understands config.json. Raises LoadFailedError."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the class of that model_type thinks of it
        raise LoadFailedError(f"{CONFIG}: {_first_line(error, folder)}") from error
    # Whose code computes attention is not the folder's business: it may name a kernel on the hub.
    config._attn_implementation = None
    return config


def bare_generation(**settings: Any) -> Any:
    """A generation config that says nothing but this: requests say how to write, not folders."""
    make: Any = transformers.GenerationConfig
    return make(**settings)


def _class_of(config: Any, said: dict[str, Any]) -> Any:
    known: Any = AutoModelForCausalLM._model_mapping
    if type(config) not in known:
        raise LoadFailedError(
            f"a {config.model_type} model does not write text by itself; the text backend runs causal "
            "language models"
        )
    kind = known[type(config)]
    claimed = said.get("architectures")
    if isinstance(claimed, list) and claimed and kind.__name__ not in claimed:
        raise LoadFailedError(
            f"{CONFIG} says {', '.join(map(str, claimed))}; the text backend runs causal language "
            f"models, of this type {kind.__name__}"
        )
    return kind


def _check_files(folder: Path) -> None:
    if weight_files(folder)[0].is_file():
        return
    pickled = next((p.name for p in sorted(folder.glob("*")) if p.suffix in (".bin", ".pt")), None)
    if pickled is not None:
        raise LoadFailedError(
            f"{pickled} is a pickle, which is never read; convert it to model.safetensors"
        )


def _dtype(config: Any, wanted: str) -> torch.dtype:
    if wanted != "auto":
        if wanted not in DTYPES:
            raise LoadFailedError(
                f"options.dtype is {wanted!r}; it must be auto, {', '.join(DTYPES)}"
            )
        return DTYPES[wanted]
    own = getattr(config, "dtype", None)
    return next((dtype for dtype in DTYPES.values() if dtype == own), torch.float32)


def _check_report(report: dict[str, Any], names: int) -> None:
    missing, surplus = report["missing_keys"], report["unexpected_keys"]
    if missing:
        raise IncompleteFilesError(
            f"{len(missing)} of the model's weights are missing: {_some(missing)}"
        )
    if surplus:
        raise LoadFailedError(
            f"{len(surplus)} of {names} weights belong to no part of the model: {_some(surplus)}"
        )
    if report["mismatched_keys"]:
        name, found, expected = min(report["mismatched_keys"], key=lambda one: str(one[0]))
        raise LoadFailedError(
            f"{len(report['mismatched_keys'])} weights have another shape than {CONFIG} says, such as "
            f"{name}: {list(found)}, not {list(expected)}"
        )
    if report.get("error_msgs"):
        raise LoadFailedError(f"the weights do not fit: {_some(report['error_msgs'])}")


def _some(names: Collection[Any]) -> str:
    first = sorted(map(str, names))[:NAMED]
    return ", ".join(first) + (" ..." if len(names) > NAMED else "")


def _first_line(error: BaseException, folder: Path) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return line.replace(f"{folder}/", "").replace(str(folder), "the folder")[:300]


def weight_bytes(model: Any) -> int:
    """Of all parameters and buffers; those that are tied count once."""
    every = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(every.values())
