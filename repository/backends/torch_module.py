"""Models that are a `model.safetensors` and a `model.py`. Needs `trust_code`: it runs what is there.

    class Model(torch.nn.Module):                  # or the class that options.class names
        def __init__(self, width=64): ...          # options.init are its keyword arguments
        def forward(self, image, mask=None): ...   # tensors in; a tensor, tuple, list or dict out

Options of the config (`options:`):
    class    the name of the class (default Model)
    init     a mapping: the keyword arguments that it is built with
    dtype    of its floating weights (default: as the class makes them). Floating inputs are given in
             it, and outputs are converted to what the config declares
    strict   every weight of the class is in the file and the other way round (default true); false:
             those that are not are named in the model's details. Shapes must agree in any case

Inputs go to the parameters of `forward` that bear their names, or, where none does, to its
parameters in order. Outputs are named by the mapping that it returns, else by the config in order,
else "output" or "output_0" ... It is called in inference mode and eval(), by one thread. Inputs are
valid until it returns and must not be written to. With max_batch_size > 0 the first axis of every
input and output is the batch. `model_file` may name other weights (.safetensors) or other code (.py).
LoRA adapters may change its Linear layers, each row of a batch by one of its own; layers that are
given [rows, ..., in] do that for all adapters of a batch at once, others for one after the other.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from repository.adapters.orders import AdapterOrder, AdapterReport
from repository.backends import agreement, registry, torch_io, user_code
from repository.backends.asleep import Moves, Tensors, tensors_of
from repository.backends.base import Order, Room
from repository.backends.ferry import movable
from repository.backends.lora.adapters import LoraAdapters
from repository.backends.torch_call import Call
from repository.backends.torch_forward import Forward, parameters_of
from repository.backends.torch_rows import in_parts
from repository.backends.weights import described_weights, read_weights, weight_files
from repository.config import Adapters
from repository.errors import (
    AdapterNotFoundError,
    InferenceFailedError,
    LoadFailedError,
)
from repository.messages import InferRequest, InferResponse, Loaded

NAME = "torch_module"
MODEL_FILE, WEIGHTS_FILE, DEFAULT_CLASS = "model.py", "model.safetensors", "Model"
DTYPES = {"float16": "FP16", "bfloat16": "BF16", "float32": "FP32", "float64": "FP64"}
MOST_NAMES = 5  # in one error

log = logging.getLogger(__name__)


class TorchModuleBackend(Moves):
    def __init__(self) -> None:
        self._model: torch.nn.Module | None = None
        self._module: ModuleType | None = None
        self._forward: Forward | None = None
        self._lora: LoraAdapters | None = None  # from the first adapter on
        self._adapters = Adapters()
        self._call: Call | None = None
        self._dtype: torch.dtype | None = None
        self._batched = False
        self._shares = False

    def load(self, order: Order) -> Loaded:
        options, config = order.config.options, order.config
        began = time.perf_counter()
        registry.check_options(NAME, options)
        device = torch_io.begin(order)
        self._movable = movable(order.device, self._tensors)
        self._read_options(order)
        model, names = self._build(order)
        reads = time.perf_counter()
        tensors = read_weights(
            _files(order), device=order.device, private=order.private, dtype=self._dtype
        )
        read_s = time.perf_counter() - reads
        missing, unexpected = self._fill(model, order, tensors)
        self._model = model = model.to(device).eval().requires_grad_(False)
        self._batched = config.max_batch_size > 0
        self._adapters = config.adapters
        inputs = agreement.configured(config.inputs, config.max_batch_size)
        outputs = agreement.configured(config.outputs, config.max_batch_size)
        self._forward = Forward(model, parameters_of(model), [spec.name for spec in inputs])
        self._call = Call(
            self._run,
            device,
            inputs,
            outputs,
            batched=self._batched,
            own=self._shares,
            dtype=self._dtype,
        )
        details: dict[str, Any] = {
            **names,
            "threads": order.threads,
            "torch": str(torch.__version__),
            "build_s": round(time.perf_counter() - began - read_s, 6),
        }
        if missing or unexpected:
            details |= {"weights_missing": missing, "weights_unused": unexpected}
        return Loaded(
            inputs=inputs,
            outputs=outputs,
            max_batch_size=config.max_batch_size,
            platform=registry.entry(NAME).platform,
            memory={"weights": torch_io.bytes_of(model)},
            details=details,
            abilities=("adapt", "sleep") if config.adapters.enabled else ("sleep",),
        )

    def validate(self, order: Order) -> None:
        """The class, built without memory for its weights, against what the files' headers say."""
        registry.check_options(NAME, order.config.options)
        self._read_options(order)
        tensors = described_weights(_files(order), dtype=self._dtype)
        try:
            with torch.device("meta"):
                model, _ = self._build(order)
        except (NotImplementedError, RuntimeError) as error:
            # It computes with numbers while it is made: then only a load can tell.
            log.info("'%s' cannot be built without memory: %s", order.model, error)
            return
        self._fill(model, order, tensors)

    def _tensors(self) -> Tensors:
        if self._model is None:
            return {}
        return {
            "weights": tensors_of(self._model),
            "adapters": self._lora.tensors() if self._lora is not None else (),
        }

    def infer(self, request: InferRequest) -> InferResponse:
        return self._infer(request, None)

    def infer_into(self, request: InferRequest, room: Room) -> InferResponse:
        return self._infer(request, room)

    def adapt(self, orders: Sequence[AdapterOrder]) -> list[AdapterReport]:
        if self._lora is None:
            if not orders or self._model is None:
                return []
            if not self._adapters.enabled:
                why = "adapters.enabled is false in the model's config"
                return [AdapterReport(order.name, why) for order in orders]
            self._lora = LoraAdapters(self._model, self._adapters)
        return self._lora.adapt(orders)

    def unload(self) -> None:
        self._model = self._forward = self._call = self._lora = self._movable = None
        module, self._module = self._module, None
        if module is not None:
            user_code.forget(module)
        torch_io.end()

    # loading ------------------------------------------------------------------------------------

    def _read_options(self, order: Order) -> None:
        self._dtype = _dtype(registry.option(order.config.options, "dtype", str, ""))
        self._shares = bool(order.extra.get("shares_process", False))

    def _build(self, order: Order) -> tuple[torch.nn.Module, dict[str, str]]:
        options = order.config.options
        file = order.model_file if order.model_file.endswith(".py") else MODEL_FILE
        init = registry.option(options, "init", dict, {})
        if not all(isinstance(key, str) for key in init):
            raise LoadFailedError("options.init must be a mapping of names to values")
        self._module = user_code.load_file(order.path / file, private=self._shares)
        name = registry.option(options, "class", str, DEFAULT_CLASS)
        kind = user_code.class_of(self._module, name)
        if not issubclass(kind, torch.nn.Module):
            raise LoadFailedError(f"class '{name}' in {file} is no torch.nn.Module")
        return kind(**init), {"class": name}

    def _fill(
        self, model: torch.nn.Module, order: Order, tensors: dict[str, torch.Tensor]
    ) -> tuple[list[str], list[str]]:
        """Weights into the model: (missing, unused)."""
        file = _weights_file(order)
        own = model.state_dict(keep_vars=True)
        _share(own, tensors)
        if self._dtype is None:
            _convert(own, tensors)
        try:
            # They become the model's own. Copied into what it has made they would be there twice.
            missing, unused = model.load_state_dict(tensors, strict=False, assign=True)
        except RuntimeError as error:  # shapes; the first line only names the class
            lines = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
            raise LoadFailedError(f"{file} does not fit: {_some(lines, '; ')}") from error
        if registry.option(order.config.options, "strict", bool, True):
            _check_all_there(file, missing, unused)
        if self._dtype is not None:
            model.to(self._dtype)
        return missing, unused

    # inference ----------------------------------------------------------------------------------

    def _infer(self, request: InferRequest, room: Room | None) -> InferResponse:
        if self._call is None:
            raise InferenceFailedError("the model is not loaded")
        return self._call(request, room)

    def _run(self, inputs: dict[str, torch.Tensor], adapters: Sequence[str]) -> Any:
        forward = self._forward
        assert forward is not None
        if self._lora is not None and any(adapters):
            return in_parts(forward, inputs, adapters, self._lora, batched=self._batched)
        named = next(filter(None, adapters), None)
        if named is not None:
            raise AdapterNotFoundError(f"The adapter {named} has not been registered")
        if self._lora is not None:
            self._lora.rows([0])
        with torch.inference_mode():
            return forward(inputs)


def _weights_file(order: Order) -> str:
    return order.model_file if order.model_file.endswith(".safetensors") else WEIGHTS_FILE


def _files(order: Order) -> list[Path]:
    place = order.path / _weights_file(order)
    return weight_files(place.parent, place.name)


def _dtype(name: str) -> torch.dtype | None:
    if not name:
        return None
    if name not in DTYPES:
        raise LoadFailedError(f"options.dtype is '{name}'; it must be one of {', '.join(DTYPES)}")
    return torch_io.DTYPES[DTYPES[name]]


def _share(own: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Parameters that the class has under several names lie in the file once (so safetensors
    demands): the others get the same tensor."""
    first: dict[int, str] = {}
    for name, tensor in own.items():
        if name in tensors:
            first.setdefault(id(tensor), name)
    for name, tensor in own.items():
        if name not in tensors and id(tensor) in first:
            tensors[name] = tensors[first[id(tensor)]]


def _convert(own: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """To the class's own dtypes, as copying into its parameters would."""
    for name, tensor in tensors.items():
        wanted = own.get(name)
        if isinstance(wanted, torch.Tensor) and wanted.dtype != tensor.dtype:
            tensors[name] = tensor.to(wanted.dtype)


def _check_all_there(file: str, missing: Sequence[str], unused: Sequence[str]) -> None:
    said = []
    if missing:
        said.append(f"it lacks {_some(missing)}, which the class has")
    if unused:
        said.append(f"it has {_some(unused)}, which the class lacks")
    if said:
        raise LoadFailedError(
            f"{file} does not fit: {'; '.join(said)}; mend one of the two, or set options.strict "
            "to false"
        )


def _some(names: Sequence[str], between: str = ", ") -> str:
    more = len(names) - MOST_NAMES
    return between.join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
