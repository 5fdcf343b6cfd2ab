"""What one layer of a model's configuration may say: checked where it was written, line by line.

The keys and types come from the Structs of `repository.config`, so there is no second list of them;
only the bounds of values are written down here. Shorthands that people may write (`checks: false`,
`version_policy: all`, `memory: 2GiB`) are spelled out first. Files are not known here, nor which
layer wins.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import msgspec
import numpy as np

from repository.config import ModelConfig
from repository.errors import ConfigError, InvalidNameError, InvalidTensorError
from repository.folder import sequence_rules
from repository.folder.bounds import RANGES, unlike
from repository.names import check_name, shown
from repository.sizes import parse_bytes
from repository.snapshot import Problem
from repository.tensors import DATATYPES, datatype_of

# Every name that `backend:` may have.
BACKENDS = (
    "onnx", "python", "triton_python", "torch_module", "torch_export", "torchscript", "text", "embed",
    "ensemble",
)  # fmt: skip
MODEL: Any = msgspec.inspect.type_info(ModelConfig)
MOST_ITEMS = 1000  # of any list: tensors, aliases, versions, warm-up requests
NONE = msgspec.inspect.NoneType
_NUMPY_NAME = re.compile(r"[a-z]{1,10}[0-9]{0,3}")
_DEVICE = re.compile(r"auto|cpu|cuda(:[0-9]{1,3})?")


@dataclass(frozen=True, slots=True)
class Layer:
    """One source of values: "config.yaml", "config.pbtxt", "request", "guessed".

    values    nested as ModelConfig is, shorthands spelled out; only what was written
    lines     dotted key -> line from 1 ("inputs.0.shape": 5); empty where there are no lines
    problems  warnings about what was written and is not honoured
    """

    source: str
    values: dict[str, Any] = field(default_factory=dict)
    lines: Mapping[str, int] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()

    def place(self, key: str) -> str:
        """ "config.yaml:5"; for a key that has no line of its own, that of what holds it."""
        while key:
            if key in self.lines:
                return f"{self.source}:{self.lines[key]}"
            key = key.rpartition(".")[0]
        return self.source


def check_layer(layer: Layer) -> Layer:
    """The layer with its shorthands spelled out. Raises ConfigError for the first thing wrong."""
    reader = _Checker(layer)
    values = reader.spell_out(layer.values)
    reader.fit(values, MODEL, "")
    reader.obey(values)
    problems = layer.problems
    if (said := sequence_rules.not_honoured(values.get("sequences"))) is not None:
        where = layer.place("sequences.iterative")
        problems += (Problem(where, "config", *said, warning=True),)
    return Layer(layer.source, values, layer.lines, problems)


def nearest(word: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?", or nothing where nothing is near."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{found[0]}'?" if found else ""


class _Checker:
    def __init__(self, layer: Layer) -> None:
        self._layer = layer

    def fail(self, key: str, message: str, hint: str = "") -> NoReturn:
        raise ConfigError(message, where=self._layer.place(key), hint=hint)

    # shorthands ---------------------------------------------------------------------------------

    def spell_out(self, written: Mapping[str, Any]) -> dict[str, Any]:
        values = dict(written)
        if values.get("version_policy") == "all":
            values["version_policy"] = {"all": True}
        for key in ("batching", "checks", "adapters"):
            if isinstance(values.get(key), bool):
                values[key] = {"enabled": values[key]}
        if "sequences" in values:
            values["sequences"] = sequence_rules.spell_out(values["sequences"])
        if isinstance(values.get("warmup"), bool):
            values["warmup"] = [{}] if values["warmup"] else []
        self._spell_size(values, "memory", "memory")
        if isinstance(values.get("adapters"), dict):
            values["adapters"] = dict(values["adapters"])
            self._spell_size(values["adapters"], "host_memory", "adapters.host_memory")
        return values

    def _spell_size(self, values: dict[str, Any], name: str, key: str) -> None:
        if isinstance(values.get(name), str):
            try:
                values[name] = parse_bytes(values[name])
            except ConfigError as error:
                self.fail(key, f"'{key}': {error.message}", error.hint)

    # keys and types -----------------------------------------------------------------------------

    def fit(self, value: Any, kind: Any, key: str) -> None:
        """`value` is of `kind` (a msgspec.inspect type), all the way down."""
        if isinstance(kind, msgspec.inspect.UnionType):
            if value is None and any(isinstance(t, NONE) for t in kind.types):
                return
            kind = next(t for t in kind.types if not isinstance(t, NONE))
        shape = type(kind).__name__
        if shape == "StructType":
            self._fit_struct(value, kind, key)
        elif shape == "VarTupleType":
            if not isinstance(value, list | tuple):
                self._misfit(value, "a list", key)
            if len(value) > MOST_ITEMS:
                self.fail(key, f"'{key}' has {len(value)} items; at most {MOST_ITEMS} are allowed")
            for i, item in enumerate(value):
                self.fit(item, kind.item_type, f"{key}.{i}")
        elif shape == "DictType":
            self._fit_dict(value, kind, key)
        else:
            expected, fits = _plain(kind)
            if not fits(value):
                self._misfit(value, expected, key)

    def _fit_struct(self, value: Any, kind: Any, key: str) -> None:
        if not isinstance(value, dict):
            self._misfit(value, "a mapping of keys to values", key)
        fields = {f.encode_name: f for f in kind.fields}
        for name, item in value.items():
            below = f"{key}.{name}" if key else str(name)
            if name not in fields:
                inside = f" in '{key}'" if key else ""
                known = "known keys: " + ", ".join(fields)
                near = nearest(str(name), fields)
                self.fail(below, f"unknown key '{shown(str(name))}'{inside}{near}", known)
            self.fit(item, fields[name].type, below)
        for name, part in fields.items():
            if part.required and name not in value:
                self.fail(key, f"'{key}' needs the key '{name}'")

    def _fit_dict(self, value: Any, kind: Any, key: str) -> None:
        if not isinstance(value, dict):
            self._misfit(value, "a mapping of keys to values", key)
        for name, item in value.items():
            if isinstance(kind.value_type, msgspec.inspect.AnyType):
                self._fit_free(item, f"{key}.{name}")
            else:
                self.fit(item, kind.value_type, f"{key}.{name}")

    def _fit_free(self, value: Any, key: str) -> None:
        """A backend's own options: anything that JSON can say."""
        if isinstance(value, dict):
            for name, item in value.items():
                self._fit_free(item, f"{key}.{name}")
        elif isinstance(value, list):
            for i, item in enumerate(value):
                self._fit_free(item, f"{key}.{i}")
        elif isinstance(value, int) and not -(2**63) <= value < 2**64:
            self.fail(key, f"'{key}' must fit into 64 bits")
        elif not (value is None or isinstance(value, str | int) or _finite(value)):
            self._misfit(value, "text, a finite number, true or false", key)

    def _misfit(self, value: Any, expected: str, key: str) -> NoReturn:
        what = f"'{key}'" if key else "the whole"
        self.fail(key, f"{what} must be {expected}, not {short(value)}")

    # values -------------------------------------------------------------------------------------

    def obey(self, values: dict[str, Any]) -> None:
        for pattern, key, value in _leaves(values, "", ""):
            low, high = RANGES.get(pattern, (-math.inf, math.inf))
            if isinstance(value, int | float) and not low <= value <= high:
                bound = f"at least {low}" if value < low else f"at most {high}"
                self.fail(key, f"'{key}' must be {bound}, not {short(value)}")
        if values.get("backend") not in (None, *BACKENDS):
            near = nearest(values["backend"], BACKENDS)
            known = "known backends: " + ", ".join(BACKENDS)
            self.fail("backend", f"unknown backend {short(values['backend'])}{near}", known)
        share = values.get("device_share")
        if share is not None and not 0 < share <= 1:
            self.fail(
                "device_share", f"'device_share' must be above 0 and at most 1, not {short(share)}"
            )
        self._device(values.get("device", "auto"), "device")
        for i, device in enumerate(values.get("devices") or ()):
            self._device(device, f"devices.{i}")
        for key in ("inputs", "outputs"):
            self._tensors(values.get(key) or (), key)
        if isinstance(values.get("sequences"), dict):
            sequence_rules.check(values["sequences"], self.fail)
        self._version_policy(values.get("version_policy"))
        self._aliases(values.get("aliases", ()))
        self._file(values.get("options", {}).get("model_file"), "options.model_file")
        for i, output in enumerate(values.get("outputs") or ()):
            self._file(output.get("labels") or None, f"outputs.{i}.labels")

    def _device(self, device: str, key: str) -> None:
        if not _DEVICE.fullmatch(device):
            self.fail(key, f"'{key}' must be auto, cpu, cuda or cuda:N, not {short(device)}")

    def _tensors(self, tensors: Iterable[dict[str, Any]], key: str) -> None:
        names: set[str] = set()
        for i, tensor in enumerate(tensors):
            name, datatype = tensor["name"], tensor["datatype"]
            if not name or name in names:
                why = f"two of them are named '{name}'" if name else "a name is empty"
                self.fail(f"{key}.{i}.name", f"'{key}' need different names; {why}")
            names.add(name)
            if datatype not in DATATYPES:
                self.fail(
                    f"{key}.{i}.datatype",
                    f"unknown datatype {short(datatype)}{_meant(datatype)}",
                    "known datatypes: " + ", ".join(DATATYPES),
                )
            self._reshape(tensor, f"{key}.{i}.reshape")

    def _reshape(self, tensor: dict[str, Any], key: str) -> None:
        reshape = tensor.get("reshape")
        if reshape is not None and (why := unlike(tensor["shape"], reshape)):
            self.fail(key, f"'reshape' of '{shown(tensor['name'])}' does not go with it: {why}")

    def _version_policy(self, policy: dict[str, Any] | None) -> None:
        if policy is None:
            return
        said = [k for k, v in policy.items() if v is not None and v is not False]
        if len(said) != 1 or policy.get("specific") == []:
            self.fail(
                "version_policy",
                "'version_policy' must be exactly one of latest, specific and all",
                "write {latest: 1}, {specific: [1, 3]} or all",
            )

    def _aliases(self, aliases: Iterable[str]) -> None:
        for i, alias in enumerate(aliases):
            try:
                check_name(alias)
            except InvalidNameError as error:
                self.fail(f"aliases.{i}", f"'aliases': {error}")

    def _file(self, name: Any, key: str) -> None:
        if name is None:
            return
        if not isinstance(name, str) or not name:
            self._misfit(name, "a file name", key)
        if name.startswith("/") or "\0" in name or ".." in name.split("/"):
            home = "version's" if key == "options.model_file" else "model's"
            self.fail(key, f"'{key}' must lie in the {home} folder")


def _plain(kind: Any) -> tuple[str, Callable[[Any], bool]]:
    """What a scalar type expects, in words and as a test. bool is an int in Python, not here."""
    match type(kind).__name__:
        case "BoolType":
            return "true or false", lambda v: isinstance(v, bool)
        case "IntType":
            return "a whole number", lambda v: isinstance(v, int) and not isinstance(v, bool)
        case "FloatType":
            return (
                "a number",
                lambda v: _finite(v) or (isinstance(v, int) and not isinstance(v, bool)),
            )
        case "LiteralType":
            options = kind.values
            return "one of " + ", ".join(options), lambda v: isinstance(v, str) and v in options
    return "text", lambda v: isinstance(v, str)


def _finite(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _leaves(value: Any, pattern: str, key: str) -> Iterator[tuple[str, str, Any]]:
    """(key with '*' for indices, key, value) of everything that is not a mapping or a list."""
    if isinstance(value, dict):
        for name, item in value.items():
            dot = "." if key else ""
            yield from _leaves(item, f"{pattern}{dot}{name}", f"{key}{dot}{name}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _leaves(item, f"{pattern}.*", f"{key}.{i}")
    else:
        yield pattern, key, value


def short(value: Any) -> str:
    """What was written, short: a whole list or mapping is only called by its kind."""
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case str():
            return f"'{value[:40]}{'...' if len(value) > 40 else ''}'"
        case int() | float():
            return str(value) if not abs(value) >= 10**20 else "a huge number"
        case dict():
            return "a mapping"
        case list() | tuple():
            return "a list"
    return "a date or the like (put it in quotes)"


def _meant(datatype: str) -> str:
    """numpy's and Triton's names lead to ours. numpy understands whole expressions, and fails at some
    in ways of its own, so it only gets to see a plain word."""
    word = datatype.removeprefix("TYPE_").lower()
    try:
        if _NUMPY_NAME.fullmatch(word):
            return f"; did you mean '{datatype_of(np.dtype(word))}'?"
    except (TypeError, InvalidTensorError):
        pass
    return nearest(datatype.upper(), DATATYPES)
