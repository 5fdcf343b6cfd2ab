"""The encoder by torch: the unmodified model of transformers, its weights read by us.

transformers builds the module from config.json and gives each weight its place, with the prefixes
and old names that it knows (`text.building`). A weight that is missing, left over or of another shape
ends the load: what transformers would put in its place are random numbers.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from repository.backends.asleep import tensors_of
from repository.backends.base import Order
from repository.backends.embed.folder import EncoderFolder
from repository.backends.onnx import OnnxBackend
from repository.backends.text.building import build, model_and_report_of
from repository.backends.weights import DTYPES as STORED
from repository.backends.weights import weight_files
from repository.errors import IncompleteFilesError, LoadFailedError
from repository.folder.safetensors_header import header_of
from repository.tensors import Array

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Says how attention is computed, or by whose code: here that is not the folder's business.
NOT_OURS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
UNUSED = "pooler."  # a layer behind the encoder that no pooling looks at
SHOWN = 3  # names in an error


class TorchEncoder:
    """`model`: the module in its place. `unread`: weights of heads that are not part of it."""

    name = "torch"
    session: OnnxBackend | None = None

    def __init__(self, folder: EncoderFolder, order: Order, dtype: str) -> None:
        kind, config, stored, wanted = _plan(folder, dtype)
        with _quiet():
            model, report, _ = build(kind, config, replace(order, path=folder.encoder), wanted)
        self.unread = _refuse_faults(kind, model, report, stored)
        self.model = model.eval().requires_grad_(False)
        self.device = torch.device(order.device)
        self.dtype = next(iter(self.model.parameters())).dtype
        self._types = "token_type_ids" in inspect.signature(self.model.forward).parameters

    @staticmethod
    def check(folder: EncoderFolder, order: Order, dtype: str) -> None:
        """By the headers of the weights; raises what a load would."""
        kind, config, stored, wanted = _plan(folder, dtype)
        with _quiet():
            there = replace(order, path=folder.encoder)
            model, report, _ = model_and_report_of(kind, config, there, wanted)
        _refuse_faults(kind, model, report, stored)

    def tensors(self) -> Iterator[torch.Tensor]:
        return tensors_of(self.model)

    def run(self, ids: Array, mask: Array, types: Array | None) -> torch.Tensor:
        """int64 [rows, length] each -> the last hidden state [rows, length, width]."""
        given = {"input_ids": self._there(ids), "attention_mask": self._there(mask)}
        if types is not None and self._types:
            given["token_type_ids"] = self._there(types)
        hidden: torch.Tensor = self.model(**given, return_dict=True).last_hidden_state
        return hidden

    def bytes_of_weights(self) -> int:
        return bytes_of(self.model)

    def details(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "model_class": type(self.model).__name__,
            "dtype": str(self.dtype).removeprefix("torch."),
            "transformers": hf.__version__,
            "torch": str(torch.__version__),  # a class of its own
        }
        if self.unread:
            found["unread_weights"] = list(self.unread)
        return found

    def unload(self) -> None:
        del self.model

    def _there(self, table: Array) -> torch.Tensor:
        return torch.from_numpy(table).to(self.device)


def bytes_of(module: torch.nn.Module) -> int:
    """Of its parameters and buffers; what two names share counts once."""
    places = {t.data_ptr(): t.nbytes for t in (*module.parameters(), *module.buffers())}
    return sum(places.values())


def _plan(
    folder: EncoderFolder, dtype: str
) -> tuple[Any, Any, dict[str, torch.dtype | None], torch.dtype]:
    """The class, its config, what is stored, and the datatype to have it in. Raises LoadFailedError,
    IncompleteFilesError."""
    if dtype not in ("auto", *DTYPES):
        raise LoadFailedError(
            f"options.dtype is '{dtype}'; it must be one of auto, {', '.join(DTYPES)}"
        )
    config = _config(folder.config)
    config.use_cache = False  # a decoder that was trained to embed would keep what nobody reads
    stored = _stored(weight_files(folder.encoder))
    return _kind_of(config), config, stored, DTYPES.get(dtype) or _first_floating(stored.values())


def _config(said: Mapping[str, Any]) -> Any:
    kind = said["model_type"]
    if kind not in hf.CONFIG_MAPPING:
        raise LoadFailedError(
            f"config.json: transformers {hf.__version__} has no model_type '{kind}'"
        )
    if said.get("quantization_config"):
        raise LoadFailedError(
            "config.json has a quantization_config; quantised encoders are not served, save the "
            "model in float32, float16 or bfloat16"
        )
    try:
        return hf.CONFIG_MAPPING[kind].from_dict(
            {key: value for key, value in said.items() if key not in NOT_OURS}
        )
    except Exception as error:  # whatever the class of that model_type thinks of it
        raise LoadFailedError(f"config.json: {type(error).__name__}: {error}") from error


def _kind_of(config: Any) -> Any:
    """The class of the encoder; of a model with two halves, the one that reads."""
    for mapping in (hf.MODEL_FOR_TEXT_ENCODING_MAPPING, hf.MODEL_MAPPING):
        kind = mapping.get(type(config), None)
        if kind is not None and not (mapping is hf.MODEL_MAPPING and config.is_encoder_decoder):
            return kind[0] if isinstance(kind, tuple) else kind
    raise LoadFailedError(f"config.json: a '{config.model_type}' is not an encoder of texts")


def _stored(files: Sequence[Path]) -> dict[str, torch.dtype | None]:
    """The datatype of every tensor by its name, as the headers say. None: torch has none such."""
    found: dict[str, torch.dtype | None] = {}
    for path in files:
        try:
            with path.open("rb") as file:
                header = header_of(file.fileno(), os.fstat(file.fileno()).st_size)
        except FileNotFoundError as error:
            raise IncompleteFilesError(f"{path.name} is missing") from error
        except IncompleteFilesError as error:
            raise IncompleteFilesError(f"{path.name} is not complete: {error}") from error
        found |= {name: STORED.get(entry.dtype) for name, entry in header.tensors.items()}
    return found


def _first_floating(stored: Iterable[torch.dtype | None]) -> torch.dtype:
    return next((each for each in stored if each and each.is_floating_point), torch.float32)


def _refuse_faults(
    kind: Any, model: Any, report: Mapping[str, Any], names: Iterable[str]
) -> tuple[str, ...]:
    """Of the weights `names`, those that belong to a head and are left out. Raises LoadFailedError for
    any other fault."""
    _refuse("has another shape than config.json says", [n for n, *_ in report["mismatched_keys"]])
    missing = sorted(report["missing_keys"])
    _refuse("is missing from the weights", [n for n in missing if not n.startswith(UNUSED)])
    if missing:
        model.pooler = None
    prefix = f"{kind.base_model_prefix}."
    more = sorted(report["unexpected_keys"])
    whole = any(name.startswith(prefix) for name in names)  # a checkpoint of encoder and head
    heads = tuple(name for name in more if whole and not name.startswith(prefix))
    _refuse("belongs to no part of the encoder", [name for name in more if name not in heads])
    return heads


def _refuse(why: str, names: list[str]) -> None:
    if names:
        shown = "', '".join(names[:SHOWN])
        more = f" (and {len(names) - SHOWN} more)" if len(names) > SHOWN else ""
        raise LoadFailedError(f"'{shown}'{more} {why}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bar that loading draws, and the report of what is told as an error here."""
    log: Any = hf.logging  # no types
    said, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(log.CRITICAL)
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(said)
        if bar:
            log.enable_progress_bar()
