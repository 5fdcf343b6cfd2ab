"""Layers of configuration become one, and every value remembers where it came from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from repository.config import Batching, ModelConfig
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
        if layer.values.keys() & {"device", "instances"}:  # said later, they hold for all of them
            values.pop("devices", None)
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
    if isinstance(value, dict) and value and key != "triton":
        for name, item in value.items():
            _trace(item, f"{key}.{name}" if key else name, origin, sources)
    elif isinstance(value, list | tuple) and value and isinstance(value[0], dict):
        for i, item in enumerate(value):
            _trace(item, f"{key}.{i}", origin, sources)
    else:
        sources[key] = origin.get(key, "default")


def _check_whole(config: ModelConfig, origin: dict[str, str]) -> None:
    batching = config.batching or Batching()
    largest = max(batching.preferred_sizes, default=0)
    if largest > config.max_batch_size:
        raise _broken(
            origin,
            "preferred_sizes",
            f"asks for {largest}, more than max_batch_size {config.max_batch_size}",
            f"set max_batch_size to {largest} or more",
        )
    _check_priorities(batching, origin)
    if batching.preserve_ordering:
        _check_ordering(batching, origin)


def _check_priorities(batching: Batching, origin: dict[str, str]) -> None:
    there = f"there {'is' if batching.priorities == 1 else 'are'} {batching.priorities}"
    if batching.priorities and not 0 < batching.default_priority <= batching.priorities:
        raise _broken(
            origin,
            "default_priority" if batching.default_priority else "priorities",
            f"needs a default_priority of 1 to {batching.priorities}",
            "it is for requests that bring no priority; 1 is the highest",
        )
    if batching.default_priority > batching.priorities:
        raise _broken(origin, "default_priority", f"is {batching.default_priority}; {there}")
    seen: set[int] = set()
    for i, level in enumerate(batching.by_priority):
        if level.priority > batching.priorities or level.priority in seen:
            why = "twice" if level.priority in seen else f"and {there}"
            raise _broken(
                origin, f"by_priority.{i}.priority", f"names priority {level.priority} {why}"
            )
        seen.add(level.priority)


def _check_ordering(batching: Batching, origin: dict[str, str]) -> None:
    """Triton refuses these too: whoever may be overtaken cannot be answered in order."""
    level = batching.policy(1)
    may_end = bool(level.timeout_us or level.allow_timeout_override)
    if batching.priorities > 1 or (may_end and level.timeout_action == "delay"):
        raise _broken(
            origin,
            "preserve_ordering",
            "goes neither with several priorities nor with timeout_action delay",
            "remove one of them",
        )


def _broken(origin: dict[str, str], key: str, message: str, hint: str = "") -> ConfigError:
    key = f"batching.{key}"
    where = key
    while where and where not in origin:
        where = where.rpartition(".")[0]
    return ConfigError(f"'{key}' {message}", where=origin.get(where, ""), hint=hint)


_DEFAULTS: dict[str, str] = {}
_trace(msgspec.to_builtins(ModelConfig()), "", {}, _DEFAULTS)
