"""What is said over a model's own config: in its aphrodite_config.yaml, or with a request to load it.

Aphrodite's keys that mean the same here are read as ours:

    max_model_len            options.max_len (text), options.max_tokens (embed)
    gpu_memory_utilization   device_share
    dtype                    options.dtype (text, embed)
    served_model_name        aliases
    tensor_parallel_size     nothing: only 1 is possible
    model                    nothing: which model is meant is known already

A request may use our own keys of config.yaml beside them. `-` in a key is read as `_`. Any other key is
an error. Which backend serves the model is not known here, so what depends on it is said in two steps:
`read_*` for what is wrong in any case, `Said.layer` for what does not go with the backend.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import msgspec

from repository.config import ModelConfig
from repository.errors import ConfigError, InvalidNameError
from repository.folder.read_yaml import MAX_DEPTH, read_mapping
from repository.folder.schema import MOST_ITEMS, Layer, check_layer, nearest, short
from repository.names import check_name, shown

REQUEST = "request"
OURS = tuple(field.encode_name for field in msgspec.structs.fields(ModelConfig))
LENGTH_OPTION = {"text": "max_len", "embed": "max_tokens"}
DTYPES = {
    "auto": "auto",
    "half": "float16",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float": "float32",
    "float32": "float32",
}
READS_TEXTS = "is for models of the backends text and embed"


@dataclass(frozen=True)
class Said:
    """`written`: as it was written, but for the keys' `-`; without `model` and what has no value.
    `ours`: the part of it that is in our own keys, checked. `names`: what `model` says, or "".
    """

    written: Layer
    ours: Layer
    names: str = ""

    @property
    def by_request(self) -> bool:
        return self.written.source == REQUEST

    @cached_property
    def digest(self) -> str:
        """Of what was said, whatever its order. 16 hex digits."""
        plain = json.dumps(self.written.values, sort_keys=True)
        return hashlib.sha256(plain.encode()).hexdigest()[:16]

    def layer(self, backend: str | None) -> Layer:
        """In our words, for a model of this backend; None: only what any model has.

        Raises ConfigError for a key that this backend has nothing for.
        """
        values, lines = copy.deepcopy(self.ours.values), dict(self.ours.lines)
        for key, path, value in self._translated(backend):
            *above, last = path.split(".")
            into = values
            for name in above:
                into = into.setdefault(name, {})
            if last in into:
                self._fail(key, f"both '{key}' and '{path}' are said; keep one of them")
            into[last] = value
            if key in self.written.lines:
                lines[path] = self.written.lines[key]
        return Layer(self.written.source, values, lines)

    def _translated(self, backend: str | None) -> Iterator[tuple[str, str, Any]]:
        """Key as it was said, key of ours, value."""
        said = self.written.values
        if "gpu_memory_utilization" in said:
            yield "gpu_memory_utilization", "device_share", said["gpu_memory_utilization"]
        if "served_model_name" in said:
            names = said["served_model_name"]
            yield "served_model_name", "aliases", [names] if isinstance(names, str) else names
        if backend in LENGTH_OPTION:
            if "max_model_len" in said:
                yield "max_model_len", f"options.{LENGTH_OPTION[backend]}", said["max_model_len"]
            if "dtype" in said:
                yield "dtype", "options.dtype", DTYPES[said["dtype"]]
        elif backend:
            for key in said.keys() & {"max_model_len", "dtype"}:
                if said[key] != "auto":
                    self._unfit(key, backend)

    def _unfit(self, key: str, backend: str) -> NoReturn:
        hint = "remove it; what this backend knows is in 'options'"
        self._fail(key, f"'{key}' {READS_TEXTS}; this model's is {backend}", hint)

    def _fail(self, key: str, message: str, hint: str = "") -> NoReturn:
        raise ConfigError(message, where=self.written.place(key), hint=hint)


def read_aphrodite(text: bytes, source: str) -> Said:
    """An aphrodite_config.yaml. Raises ConfigError with "aphrodite_config.yaml:LINE"."""
    return _read(read_mapping(text, source), ())


def read_request(values: Mapping[str, Any]) -> Said:
    """The config of a request. Raises ConfigError, which begins with "request: "."""
    if not isinstance(values, Mapping):
        raise ConfigError("a config must be a mapping of keys to values", where=REQUEST)
    if _deeper(values, MAX_DEPTH):
        raise ConfigError(f"nested deeper than {MAX_DEPTH} levels", where=REQUEST)
    return _read(Layer(REQUEST, dict(values)), OURS)


def _read(written: Layer, ours: tuple[str, ...]) -> Said:
    written = _respelled(written)
    for key in written.values:
        if key not in KEYS and key not in ours:
            _unknown(written, key, ours)
    values = {k: v for k, v in written.values.items() if v is not None}
    for key in values.keys() & KEYS.keys():
        wrong = KEYS[key](values[key])
        if wrong:
            place = written.place(key)
            raise ConfigError(f"'{key}' is {short(values[key])}; it {wrong}", where=place)
    names = values.pop("model", "")
    mine = {k: v for k, v in values.items() if k in ours}
    checked = check_layer(Layer(written.source, mine, written.lines))
    said = Said(Layer(written.source, values, written.lines), checked, names)
    said.layer(None)  # what is said twice
    return said


def _respelled(written: Layer) -> Layer:
    values: dict[str, Any] = {}
    for name, value in written.values.items():
        key = str(name).replace("-", "_")
        if key in values:
            place = written.place(str(name))
            raise ConfigError(f"the key '{shown(key)}' is there twice", where=place)
        values[key] = value
    lines = {}
    for dotted, line in written.lines.items():
        top, dot, rest = dotted.partition(".")
        lines[top.replace("-", "_") + dot + rest] = line
    return Layer(written.source, values, lines)


def _unknown(written: Layer, key: str, ours: tuple[str, ...]) -> NoReturn:
    near = nearest(key, (*KEYS, *ours))
    hint = "known keys: " + ", ".join((*KEYS, *ours))
    if key in OURS:
        near, hint = "", f"'{key}' is a key of config.yaml: write it there"
    raise ConfigError(f"unknown key '{shown(key)}'{near}", where=written.place(key), hint=hint)


def _deeper(value: Any, levels: int) -> bool:
    if not isinstance(value, Mapping | list | tuple):
        return False
    if levels == 0:
        return True
    items = value.values() if isinstance(value, Mapping) else value
    return any(_deeper(item, levels - 1) for item in items)


# What is wrong with the value of a key, in words; "" if nothing is.


def _text(value: Any) -> str:
    return "" if isinstance(value, str) and value else "must be text"


def _length(value: Any) -> str:
    fits = type(value) is int and 1 <= value < 2**31
    return "" if fits else "must be a whole number of tokens, 1 or more"


def _share(value: Any) -> str:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1
    return "" if fits else "must be a number above 0, at most 1"


def _one(value: Any) -> str:
    fits = type(value) is int and value == 1
    return "" if fits else "must be 1, as a model runs on one device"


def _dtype(value: Any) -> str:
    fits = isinstance(value, str) and value in DTYPES
    return "" if fits else f"must be one of {', '.join(DTYPES)}"


def _names(value: Any) -> str:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not names or len(names) > MOST_ITEMS:
        return "must be a name or a list of names"
    for name in names:
        try:
            check_name(name if isinstance(name, str) else "")
        except InvalidNameError as error:
            return f"must be names that a model may have ({error})"
    return ""


KEYS: Mapping[str, Callable[[Any], str]] = {
    "model": _text,
    "max_model_len": _length,
    "gpu_memory_utilization": _share,
    "tensor_parallel_size": _one,
    "dtype": _dtype,
    "served_model_name": _names,
}
