"""The PEFT format of LoRA adapters: `adapter_config.json` and the header of `adapter_model.safetensors`.

Checked without a framework and without reading a tensor: every key belongs to one layer, pairs are
complete, shapes agree with the rank, datatypes are floating; what we do not do (DoRA, modules_to_save,
trained bias, other kinds of adapters, pickled ones) is refused by its name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgspec

from repository.adapters.patterns import Patterns
from repository.adapters.sources import AdapterFacts
from repository.errors import AdapterRefusedError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # before every key that PEFT writes

MAX_CONFIG = 1 << 20  # bytes
MAX_LAYERS = 16_384
MAX_PATH = 500  # characters of a layer's name
BYTES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}

Header: TypeAlias = Mapping[str, tuple[str, tuple[int, ...]]]

# What changes the mathematics: field of the config -> what it is, and what to do. Any value that is
# not empty, false or null is refused.
REFUSED: dict[str, str] = {
    "use_dora": "it is a DoRA adapter: train it without use_dora, or merge it into the model",
    "modules_to_save": "whole layers were trained with it: merge it into the model",
    "lora_bias": "it trained a bias: train it with lora_bias=False, or merge it into the model",
    "trainable_token_indices": "it trained embeddings of tokens: merge it into the model",
    "target_parameters": "it changes parameters that are not layers: merge it into the model",
    "layer_replication": "it repeats layers of the model: serve it as a model of its own",
    "ensure_weight_tying": "it changes tied layers together: set it to false where none of its "
    "layers is tied, else merge it into the model",
    "alora_invocation_tokens": "it is an activated LoRA (aLoRA), which works from one token on",
    "use_qalora": "it is a QA-LoRA adapter: merge it into the model",
    "use_bdlora": "it is a block-diagonal LoRA: merge it into the model",
    "arrow_config": "it chooses among other adapters (Arrow): serve those by their names",
    "kasa_config": "it is a KaSA adapter, which changes the model's own weights",
    "monteclora_config": "it is a MonteCLoRA adapter, which draws from a distribution",
}
# Harmless fields that look as if they were not: how it was begun or trained.
_HARMLESS = frozenset({
    "use_rslora", "eva_config", "corda_config", "lora_ga_config", "loftq_config", "velora_config",
    "megatron_config", "runtime_config",
})  # fmt: skip
_BEGINNINGS = ("gaussian", "eva", "orthogonal", "mica")  # that leave the model's own weights alone


class _Config(msgspec.Struct):
    peft_type: str
    r: int = 8
    lora_alpha: float = 8
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool = False
    bias: str = "none"
    init_lora_weights: bool | str = True
    base_model_name_or_path: str | None = None


@dataclass(frozen=True, slots=True)
class Layer:
    """One that an adapter changes. `a`, `b`: the keys of its tensors, [rank, in] and [out, rank].
    `own`: keys of the model's own tensors that PEFT saved beside them (of a head); they must be
    what the model has."""

    a: str
    b: str
    rank: int
    out_features: int
    in_features: int
    own: tuple[str, ...] = ()


def read_facts(config: bytes, header: Header) -> AdapterFacts:
    """`header`: tensor name -> (safetensors datatype, shape). Raises AdapterRefusedError."""
    said = _read_config(config)
    found = layers(header)
    for name, rank in _ranks(said, found).items():
        if found[name].rank != rank:
            raise AdapterRefusedError(
                f"{name} has rank {found[name].rank}, but {CONFIG} says {rank} "
                "(r, rank_pattern): the two files are not of one adapter"
            )
    scalings(config, {name: layer.rank for name, layer in found.items()})
    return AdapterFacts(
        modules={n: (layer.out_features, layer.in_features) for n, layer in found.items()},
        rank=max(layer.rank for layer in found.values()),
        bytes=sum(_bytes(header[key]) for layer in found.values() for key in (layer.a, layer.b)),
        base=said.base_model_name_or_path or "",
    )


def scalings(config: bytes, modules: Mapping[str, int]) -> dict[str, float]:
    """What B·A of each layer is multiplied with. `modules`: layer -> its own rank. alpha / r, with
    rank_pattern, alpha_pattern and use_rslora as PEFT understands them. Raises AdapterRefusedError."""
    said = _read_config(config)
    alphas = Patterns("alpha_pattern", said.alpha_pattern or {})
    return {
        name: alphas.of(name, said.lora_alpha) / (math.sqrt(rank) if said.use_rslora else rank)
        for name, rank in modules.items()
    }


def layers(header: Header) -> dict[str, Layer]:
    """The layers that an adapter changes, by their names without PEFT's prefix. Raises
    AdapterRefusedError for tensors that are no LoRA of a linear layer."""
    parts: dict[str, dict[str, str]] = {}
    for key, (datatype, _) in header.items():
        name, part = _split(key)
        if datatype not in BYTES:
            raise AdapterRefusedError(
                f"tensor '{key[:MAX_PATH]}' is {datatype}: only {', '.join(BYTES)} are read; "
                "save the adapter in one of them"
            )
        parts.setdefault(name, {})[part] = key
    if not parts:
        raise AdapterRefusedError(f"{WEIGHTS} holds no tensors: save the adapter again")
    if len(parts) > MAX_LAYERS:
        raise AdapterRefusedError(
            f"it changes {len(parts)} layers, at most {MAX_LAYERS} are supported"
        )
    return {name: _layer(name, keys, header) for name, keys in parts.items()}


def _split(key: str) -> tuple[str, str]:
    """ "base_model.model.head.lora_A.weight" -> "head", "lora_A.weight"."""
    if len(key) > MAX_PATH:
        raise AdapterRefusedError(f"a tensor's name has {len(key)} characters, at most {MAX_PATH}")
    for part in ("lora_A.weight", "lora_B.weight", "base_layer.weight", "base_layer.bias"):
        if key.startswith(PREFIX) and key.endswith("." + part):
            name = key[len(PREFIX) : -len(part) - 1]
            if name:
                return name, part
    raise AdapterRefusedError(f"tensor '{key}' {_why_not(key)}")


def _why_not(key: str) -> str:
    if "lora_embedding_" in key:
        return "changes an embedding: only linear layers are supported; merge the adapter"
    if "lora_magnitude_vector" in key:
        return f"belongs to DoRA: {REFUSED['use_dora']}"
    if key.endswith(".bias"):
        return "is a trained bias: train it with bias='none' and lora_bias=False, or merge it"
    if ".lora_A." in key or ".lora_B." in key:
        if not key.startswith(PREFIX):
            return f"does not begin with '{PREFIX}': save the adapter with PEFT's save_pretrained"
        return "bears the name of an adapter or is no weight: save it with PEFT's save_pretrained"
    return "is no lora_A or lora_B: only LoRA of linear layers is supported; merge the adapter"


def _layer(name: str, keys: Mapping[str, str], header: Header) -> Layer:
    for one, other in (("lora_A", "lora_B"), ("lora_B", "lora_A")):
        if f"{one}.weight" not in keys:
            raise AdapterRefusedError(
                f"{name} has {other} but no {one}: the file is not whole; save the adapter again"
                if f"{other}.weight" in keys
                else f"{name} was saved with its own weight but without LoRA: save it again"
            )
    a, b = keys["lora_A.weight"], keys["lora_B.weight"]
    shape_a, shape_b = header[a][1], header[b][1]
    if len(shape_a) != 2 or len(shape_b) != 2:
        raise AdapterRefusedError(
            f"{name} has lora_A {list(shape_a)} and lora_B {list(shape_b)}: only linear layers are "
            "supported, not convolutions; train it for linear layers, or merge it"
        )
    (rank, in_features), (out_features, rank_b) = shape_a, shape_b
    if rank != rank_b or min(rank, in_features, out_features) < 1:
        raise AdapterRefusedError(
            f"{name} has lora_A {list(shape_a)} and lora_B {list(shape_b)}, which are not "
            "[rank, in] and [out, rank]: save the adapter again"
        )
    own = tuple(keys[part] for part in ("base_layer.weight", "base_layer.bias") if part in keys)
    return Layer(a, b, rank, out_features, in_features, own)


def _read_config(config: bytes) -> _Config:
    if len(config) > MAX_CONFIG:
        raise AdapterRefusedError(f"{CONFIG} has {len(config)} bytes, at most {MAX_CONFIG}")
    try:
        everything = msgspec.json.decode(config, type=dict[str, msgspec.Raw])
        kind = msgspec.json.decode(everything.get("peft_type", b"null"))
        if kind != "LORA":
            shown = f"peft_type '{kind}'" if isinstance(kind, str) else "no peft_type"
            raise AdapterRefusedError(f"{CONFIG} has {shown}: only LORA adapters are supported")
        _refuse(everything)
        said = msgspec.json.decode(config, type=_Config)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        # msgspec's own texts name the field, and hold no value.
        raise AdapterRefusedError(f"{CONFIG} cannot be read: {error}") from error
    _check(said)
    return said


def _refuse(everything: Mapping[str, msgspec.Raw]) -> None:
    for field, raw in everything.items():
        if field in REFUSED:
            if _says(raw):
                raise AdapterRefusedError(f"{CONFIG} has {field}: {REFUSED[field]}")
        elif field not in _HARMLESS and _sounds_grave(field) and _says(raw):
            raise AdapterRefusedError(
                f"{CONFIG} has {field}, which is not known here: it may change what the adapter "
                "means; merge the adapter into the model, or remove the field if it does not"
            )


def _sounds_grave(field: str) -> bool:
    """So have all fields been called that made another thing of LoRA."""
    return field.startswith("use_") or field.endswith("_config")


def _says(raw: msgspec.Raw) -> bool:
    value: Any = msgspec.json.decode(raw)
    return value not in (None, False, 0, "", [], {})


def _check(said: _Config) -> None:
    if said.bias != "none":
        raise AdapterRefusedError(
            f"{CONFIG} has bias '{said.bias[:40]}': a trained bias is not supported; train it with "
            "bias='none', or merge it into the model"
        )
    begun = said.init_lora_weights
    if isinstance(begun, str) and begun.lower() not in _BEGINNINGS:
        raise AdapterRefusedError(
            f"{CONFIG} has init_lora_weights '{begun[:40]}', which changed the model's own weights: "
            "save the adapter with path_initial_model_for_weight_conversion, or merge it"
        )
    lowest = min([said.r, *(said.rank_pattern or {}).values()])
    if lowest < 1:
        raise AdapterRefusedError(f"{CONFIG} has a rank of {lowest}: ranks are 1 or more")


def _ranks(said: _Config, found: Mapping[str, Layer]) -> dict[str, int]:
    ranks = Patterns("rank_pattern", said.rank_pattern or {})
    return {name: ranks.of(name, said.r) for name in found}


def _bytes(entry: tuple[str, tuple[int, ...]]) -> int:
    datatype, shape = entry
    return math.prod(shape) * BYTES[datatype]
