"""Models written in Python: a `model.py` with a class. Needs `trust_code`: it runs what is there.

    class Model:                                   # or the class that options.class names
        inputs = [("x", "FP32", (-1, 4))]          # optional; as in config.yaml, which wins
        outputs = [("y", "FP32", (-1, 4))]

        def load(self, context):                   # optional; or __init__ without arguments
            self.weights = np.load(context.folder / "weights.npy")

        def infer(self, inputs):                   # dict of numpy arrays -> dict of numpy arrays
            return {"y": inputs["x"] @ self.weights}

        def unload(self):                          # optional
            ...

One thread calls it, one request (or one batch) after the other. Input arrays are valid until
`infer` returns and must not be written to. BYTES tensors are object arrays of bytes; str in an answer is
encoded as UTF-8. BF16 tensors are their bits in uint16. With max_batch_size > 0 the first axis of
every array is the batch and every output must have as many rows as the inputs; shapes in `inputs`
and `outputs` are written without it. What is imported from the model's own folder belongs to this
model alone.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np

from repository.backends import agreement, registry
from repository.backends.base import Order
from repository.config import ModelConfig, TensorConfig
from repository.errors import (
    IncompleteFilesError,
    InferenceFailedError,
    InvalidTensorError,
    LoadFailedError,
)
from repository.messages import InferRequest, InferResponse, Loaded
from repository.tensors import DATATYPES, Array, Tensor, datatype_of

NAME = "python"
MODEL_FILE = "model.py"
DEFAULT_CLASS = "Model"

_numbers = itertools.count(1)
_importing = threading.Lock()  # inline models share sys.path and sys.modules while they import


@dataclass(frozen=True, slots=True)
class Context:
    """What `load` is told. `folder` is the version's folder (a private copy, unless it is large),
    `parameters` are options.parameters of the config."""

    model: str
    version: int
    folder: Path
    device: str
    threads: int
    instance: int
    config: ModelConfig
    parameters: Mapping[str, Any] = field(default_factory=dict)


class PythonBackend:
    def __init__(self) -> None:
        self._model: Any = None
        self._module: ModuleType | None = None
        self._inputs: dict[str, str] = {}
        self._outputs: dict[str, str] = {}
        self._batched = False

    def load(self, order: Order) -> Loaded:
        options = order.config.options
        registry.check_options(NAME, options)
        path = order.path / (order.model_file or MODEL_FILE)
        if not path.is_file():
            raise IncompleteFilesError(f"{path.name} is missing")
        private = bool(order.extra.get("shares_process", False))
        self._module = module = _import(path, private=private)
        name = registry.option(options, "class", str, DEFAULT_CLASS)
        kind = getattr(module, name, None)
        if not isinstance(kind, type):
            raise LoadFailedError(
                f"{path.name} has no class '{name}'; write one, or set options.class"
            )
        if not callable(getattr(kind, "infer", None)):
            raise LoadFailedError(
                f"class '{name}' in {path.name} has no method infer(self, inputs)"
            )
        config = _with_own_words(order.config, kind)
        inputs = agreement.configured(config.inputs, config.max_batch_size)
        outputs = agreement.configured(config.outputs, config.max_batch_size)
        self._model = kind()
        load = getattr(self._model, "load", None)
        if load is not None:
            load(_context(order))
        self._inputs = {spec.name: spec.datatype for spec in inputs}
        self._outputs = {spec.name: spec.datatype for spec in outputs}
        self._batched = config.max_batch_size > 0
        return Loaded(
            inputs=inputs,
            outputs=outputs,
            max_batch_size=config.max_batch_size,
            platform=registry.entry(NAME).platform,
            details={"class": name, "threads": order.threads},
        )

    def infer(self, request: InferRequest) -> InferResponse:
        inputs: dict[str, Array] = {}
        for tensor in request.inputs:
            wanted = self._inputs.get(tensor.name, "" if self._inputs else tensor.datatype)
            if tensor.datatype != wanted:
                raise InvalidTensorError(
                    f"input '{tensor.name}' is {tensor.datatype}; the model wants {wanted}"
                    if wanted
                    else f"the model has no input '{tensor.name}'"
                )
            try:
                array = inputs[tensor.name] = tensor.array()
            except ValueError as error:
                raise InvalidTensorError(f"input '{tensor.name}': {error}") from error
            # Some of them are views that could not be written to: all models meet the same.
            array.flags.writeable = False
        answer = self._model.infer(inputs)
        if not isinstance(answer, Mapping):
            raise InferenceFailedError(
                f"infer() must return a dict of numpy arrays; it returned {_kind(answer)}"
            )
        names = request.outputs or tuple(self._outputs) or tuple(answer)
        rows = (
            next((a.shape[0] for a in inputs.values() if a.ndim), None) if self._batched else None
        )
        return InferResponse([self._tensor(name, answer, rows) for name in names])

    def unload(self) -> None:
        model, self._model = self._model, None
        try:
            unload = getattr(model, "unload", None)
            if unload is not None:
                unload()
        finally:
            module, self._module = self._module, None
            if module is not None:
                _forget(module.__name__)

    def _tensor(self, name: str, answer: Mapping[Any, Any], rows: int | None) -> Tensor:
        if name not in answer:
            there = ", ".join(f"'{key}'" for key in answer) or "nothing"
            if self._outputs and name not in self._outputs:
                raise InvalidTensorError(f"the model has no output '{name}'")
            raise InferenceFailedError(f"infer() returned no '{name}'; it returned {there}")
        array = answer[name]
        if not isinstance(name, str) or not isinstance(array, np.ndarray | np.generic):
            raise InferenceFailedError(
                f"infer() must return a dict of numpy arrays; '{name}' is {_kind(array)}"
            )
        array = np.asarray(array)
        datatype = self._datatype(name, array)
        if rows is not None and (array.ndim == 0 or array.shape[0] != rows):
            raise InferenceFailedError(
                f"infer() returned '{name}' with shape {list(array.shape)} for a batch of {rows}"
            )
        if array.dtype.hasobject:
            _check_texts(name, array)
        return Tensor.of(name, array, datatype)

    def _datatype(self, name: str, array: Array) -> str:
        """What the array is, unless that is not what was declared."""
        try:
            found = datatype_of(array.dtype)
        except InvalidTensorError as error:
            raise InferenceFailedError(f"infer() returned '{name}': {error}") from error
        wanted = self._outputs.get(name)
        if wanted is None or wanted == found:
            return found
        if wanted == "BF16" and array.dtype == DATATYPES["BF16"].dtype:
            return wanted
        raise InferenceFailedError(
            f"infer() returned '{name}' as {found} ({array.dtype}); it is declared as {wanted}"
        )


def _context(order: Order) -> Context:
    return Context(
        model=order.model,
        version=order.version,
        folder=order.path,
        device=order.device,
        threads=order.threads,
        instance=order.instance,
        config=order.config,
        parameters=registry.option(order.config.options, "parameters", dict, {}),
    )


def _with_own_words(config: ModelConfig, kind: type) -> ModelConfig:
    """The config, with the class's `inputs` and `outputs` where it has none of its own."""
    changes: dict[str, Any] = {}
    for side in ("inputs", "outputs"):
        own = getattr(kind, side, None)
        if own is not None and getattr(config, side) is None:
            changes[side] = tuple(_declared(side, item) for item in own)
    return msgspec.structs.replace(config, **changes)


def _declared(side: str, item: Any) -> TensorConfig:
    try:
        name, datatype, shape = item
        made = TensorConfig(name=str(name), datatype=str(datatype), shape=tuple(map(int, shape)))
    except (TypeError, ValueError) as error:
        raise LoadFailedError(
            f"{side} of the class must be (name, datatype, shape) each; one is {item!r}"
        ) from error
    if made.datatype not in DATATYPES:
        raise LoadFailedError(
            f"{side} of the class: '{made.datatype}' of '{made.name}' is no datatype; "
            f"there are {', '.join(DATATYPES)}"
        )
    return made


def _import(path: Path, *, private: bool) -> ModuleType:
    """Runs the file as a module whose name nobody else has."""
    name = f"modeldepot_model_{next(_numbers)}"
    spec = importlib.util.spec_from_file_location(
        name, path, submodule_search_locations=[str(path.parent)]
    )
    if spec is None or spec.loader is None:
        raise LoadFailedError(f"'{path.name}' is not a Python file")
    module = importlib.util.module_from_spec(spec)
    with _own_folder_first(path.parent, private=private):
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            _forget(name)
            raise
    return module


def _forget(name: str) -> None:
    """The module, and what it imported from its folder relatively."""
    for each in [n for n in sys.modules if n == name or n.startswith(f"{name}.")]:
        del sys.modules[each]


@contextmanager
def _own_folder_first(folder: Path, *, private: bool) -> Iterator[None]:
    """Files beside model.py can be imported by name.

    In a worker it stays so. In a process with other models (`private`) only while model.py is
    being imported, and what came from the folder is forgotten afterwards, or the next generation
    would get the old one's modules.
    """
    if not private:
        sys.path.insert(0, str(folder))
        yield
        return
    with _importing:
        before = set(sys.modules)
        written = sys.dont_write_bytecode
        sys.dont_write_bytecode = True
        sys.path.insert(0, str(folder))
        try:
            yield
        finally:
            sys.path.remove(str(folder))
            sys.dont_write_bytecode = written
            for name in set(sys.modules) - before:
                file = getattr(sys.modules[name], "__file__", None)
                if file and Path(file).is_relative_to(folder) and not _is_ours(name):
                    del sys.modules[name]


def _is_ours(name: str) -> bool:
    return name.startswith("modeldepot_model_")


def _check_texts(name: str, array: Array) -> None:
    for item in array.reshape(-1):
        if not isinstance(item, bytes | str):
            raise InferenceFailedError(
                f"infer() returned '{name}' as an object array that holds {_kind(item)}; "
                "only bytes and str can travel"
            )


def _kind(value: Any) -> str:
    """ "a list", "a torch.Tensor"."""
    kind = type(value)
    named = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    return f"an {named}" if named[0] in "aeiouAEIOU" else f"a {named}"
