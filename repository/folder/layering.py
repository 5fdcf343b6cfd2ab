"""Layers of configuration become one, and every value remembers where it came from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from repository.config import ModelConfig
from repository.errors import ConfigError
from repository.folder.schema import Layer

# "Exactly one of": a later layer's policy replaces the earlier one's instead of joining it.
WHOLE = frozenset({"version_policy"})


def merge(layers: Sequence[Layer]) -> tuple[ModelConfig, dict[str, str]]:
    """Later layers win. Mappings merge key by key, lists and the version policy are replaced whole.

    The second result maps every dotted key to "default", "guessed", "config.yaml:12", "request".
    The layers have passed `check_layer`; raises ConfigError for what only shows once they are one.
    """
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for layer in layers:
        _lay(layer, layer.values, values, origin, "")
    try:
        config = msgspec.convert(values, ModelConfig)
    except msgspec.ValidationError as error:  # only for a layer that was not checked
        raise ConfigError(str(error)) from error
    _check_whole(config, origin)
    sources = dict(_DEFAULTS)
    builtins = msgspec.to_builtins(config)
    for key in values:
        for default in [k for k in sources if k == key or k.startswith(key + ".")]:
            del sources[default]
        _trace(builtins[key], key, origin, sources)
    return config, sources


def _lay(
    layer: Layer, new: dict[str, Any], into: dict[str, Any], origin: dict[str, str], at: str
) -> None:
    for name, value in new.items():
        key = f"{at}.{name}" if at else name
        if value is None:
            continue  # a key without a value leaves what is below it
        if isinstance(value, dict) and key not in WHOLE:
            held = into.setdefault(name, {})
            if isinstance(held, dict):
                origin.setdefault(key, layer.place(key))
                _lay(layer, value, held, origin, key)
                continue
        into[name] = value
        for old in [k for k in origin if k.startswith(key + ".")]:
            del origin[old]
        origin[key] = layer.place(key)
        _note(layer, value, key, origin)


def _note(layer: Layer, value: Any, key: str, origin: dict[str, str]) -> None:
    """Where the parts of a value that was taken whole were written."""
    if not isinstance(value, dict | list | tuple):
        return
    parts: Iterable[tuple[Any, Any]]
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    for name, item in parts:
        origin[f"{key}.{name}"] = layer.place(f"{key}.{name}")
        _note(layer, item, f"{key}.{name}", origin)


def _trace(value: Any, key: str, origin: dict[str, str], sources: dict[str, str]) -> None:
    """A source for every value: mappings and lists of mappings are entered, other lists are one."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            _trace(item, f"{key}.{name}" if key else name, origin, sources)
    elif isinstance(value, list | tuple) and value and isinstance(value[0], dict):
        for i, item in enumerate(value):
            _trace(item, f"{key}.{i}", origin, sources)
    else:
        sources[key] = origin.get(key, "default")


def _check_whole(config: ModelConfig, origin: dict[str, str]) -> None:
    largest = max(config.batching.preferred_sizes, default=0) if config.batching else 0
    if largest > config.max_batch_size:
        key = "batching.preferred_sizes"
        raise ConfigError(
            f"'{key}' asks for {largest}, more than max_batch_size {config.max_batch_size}",
            where=origin.get(key, ""),
            hint=f"set max_batch_size to {largest} or more",
        )


_DEFAULTS: dict[str, str] = {}
_trace(msgspec.to_builtins(ModelConfig()), "", {}, _DEFAULTS)
