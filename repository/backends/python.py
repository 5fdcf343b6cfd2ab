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

A class that can leave its device for host memory, and come back as it was, has both of

        def sleep(self): ...                       # nothing is asked of it until wake
        def wake(self): ...

A class that takes adapters (those in adapters/, or registered by call) has two methods more, and may
let `infer` know whose turn it is:

        def add_adapter(self, name, path, options):    # a known name: in the place of the old one
            self.scale[name] = ...                     # raising leaves all as it was
        def remove_adapter(self, name): ...
        def infer(self, inputs, adapters):             # a name per row, "" where there is none
            ...

One thread calls it, one request (or one batch) after the other. Input arrays are valid until
`infer` returns and must not be written to. BYTES tensors are object arrays of bytes; str in an answer is
encoded as UTF-8. BF16 tensors are their bits in uint16. With max_batch_size > 0 the first axis of
every array is the batch and every output must have as many rows as the inputs; shapes in `inputs`
and `outputs` are written without it. What is imported from the model's own folder belongs to this
model alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np

from repository.adapters.orders import AdapterOrder, AdapterReport
from repository.backends import agreement, registry, user_code
from repository.backends.base import Order
from repository.backends.device_use import DeviceUse
from repository.backends.python_adapters import PythonAdapters
from repository.config import ModelConfig, TensorConfig
from repository.errors import InferenceFailedError, InvalidTensorError, LoadFailedError
from repository.lifecycle.placement import Memory
from repository.messages import InferRequest, InferResponse, Loaded
from repository.tensors import DATATYPES, Array, Tensor, datatype_of

NAME = "python"
MODEL_FILE = "model.py"
DEFAULT_CLASS = "Model"


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
        self._adapters: PythonAdapters | None = None
        self._device = ""
        self._use: DeviceUse | None = None  # on a GPU

    def load(self, order: Order) -> Loaded:
        options = order.config.options
        registry.check_options(NAME, options)
        path = order.path / (order.model_file or MODEL_FILE)
        private = bool(order.extra.get("shares_process", False))
        self._watch(order.device)
        try:
            self._module = module = user_code.load_file(path, private=private)
        except ModuleNotFoundError as error:
            if error.name != "triton_python_backend_utils":
                raise
            raise LoadFailedError(
                f"{path.name} is written for Triton's python backend; set backend to triton_python, "
                "or leave it out"
            ) from error
        name = registry.option(options, "class", str, DEFAULT_CLASS)
        kind = user_code.class_of(module, name)
        if not callable(getattr(kind, "infer", None)):
            raise LoadFailedError(
                f"class '{name}' in {path.name} has no method infer(self, inputs)"
            )
        can_sleep = _can_sleep(kind, path.name)
        config = _with_own_words(order.config, kind)
        inputs = agreement.configured(config.inputs, config.max_batch_size)
        outputs = agreement.configured(config.outputs, config.max_batch_size)
        self._model = kind()
        load = getattr(self._model, "load", None)
        if load is not None:
            load(_context(order))
        if self._use is not None:
            self._use.after(0, model=None)
        self._inputs = {spec.name: spec.datatype for spec in inputs}
        self._outputs = {spec.name: spec.datatype for spec in outputs}
        self._batched = config.max_batch_size > 0
        self._adapters = PythonAdapters(self._model)
        return Loaded(
            inputs=inputs,
            outputs=outputs,
            max_batch_size=config.max_batch_size,
            platform=registry.entry(NAME).platform,
            details={"class": name, "threads": order.threads},
            abilities=tuple(
                name for name, can in (("adapt", self._adapters.can), ("sleep", can_sleep)) if can
            ),
        )

    def validate(self, order: Order) -> None:
        """The file is read, not run: it compiles, and something in it has the class's name."""
        options = order.config.options
        registry.check_options(NAME, options)
        path = order.path / (order.model_file or MODEL_FILE)
        user_code.check_file(path, registry.option(options, "class", str, DEFAULT_CLASS))

    def sleep(self) -> None:
        """As `abilities.Sleeps`; only for a model that said so."""
        with self._giving_back():
            self._model.sleep()

    def wake(self) -> None:
        with self._giving_back():
            self._model.wake()

    def _giving_back(self) -> AbstractContextManager[None]:
        return nullcontext() if self._use is None else self._use.giving_back()

    def memory(self) -> Memory:
        """On a GPU all that the process has there; of what it is made nobody knows."""
        return {} if self._use is None else {self._device: {"workspace": self._use.bytes(0)}}

    def _watch(self, device: str) -> None:
        """From before the model's first line on."""
        self._device = device
        if device.startswith("cuda"):
            self._use = DeviceUse.of(device)
            self._use.before()

    def infer(self, request: InferRequest) -> InferResponse:
        assert self._adapters is not None, "load comes first"
        inputs: dict[str, Array] = {}
        given, more = self._adapters.take(request)
        for tensor in given:
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
        answer = self._model.infer(inputs, **more)
        if not isinstance(answer, Mapping):
            raise InferenceFailedError(
                f"infer() must return a dict of numpy arrays; it returned {_kind(answer)}"
            )
        names = request.outputs or tuple(self._outputs) or tuple(answer)
        rows = (
            next((a.shape[0] for a in inputs.values() if a.ndim), None) if self._batched else None
        )
        return InferResponse([self._tensor(name, answer, rows) for name in names])

    def adapt(self, orders: Sequence[AdapterOrder]) -> list[AdapterReport]:
        """As `abilities.Adapts`; only for a model that said so."""
        assert self._adapters is not None, "load comes first"
        return self._adapters.adapt(orders)

    def unload(self) -> None:
        self._adapters = None
        model, self._model = self._model, None
        try:
            unload = getattr(model, "unload", None)
            if unload is not None:
                unload()
        finally:
            module, self._module = self._module, None
            if module is not None:
                user_code.forget(module)

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


def _can_sleep(kind: type, file: str) -> bool:
    """Raises LoadFailedError for half of it."""
    has = [callable(getattr(kind, name, None)) for name in ("sleep", "wake")]
    if any(has) and not all(has):
        raise LoadFailedError(
            f"class '{kind.__name__}' in {file} has one of the methods sleep(self) and wake(self); "
            "write both or neither"
        )
    return all(has)


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
