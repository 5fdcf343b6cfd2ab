"""TorchScript archives (`torch.jit.save`), for those that are still about. Torch deprecates it, and
so do we.

An archive holds code of its own, and classes that libraries register: it needs `trust_code`. Inputs go
to the parameters of `forward` that bear their names, or, where none does, in order. An archive does not
tell datatypes and shapes: the config does, or anything goes.
"""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import Parameter
from pathlib import Path
from typing import Any

import torch

from repository.backends import agreement, registry, torch_io
from repository.backends.asleep import Moves, Tensors
from repository.backends.base import Order, Room
from repository.backends.ferry import movable
from repository.backends.torch_call import Call
from repository.backends.torch_forward import Forward
from repository.backends.whole_file import check_there, read_whole
from repository.errors import IncompleteFilesError, InferenceFailedError
from repository.messages import InferRequest, InferResponse, Loaded

NAME = "torchscript"
MODEL_FILE = "model.pt"
WARNING = (
    "TorchScript is deprecated by PyTorch and will go: export the model with torch.export.save (.pt2), "
    "or serve it as model.safetensors with model.py"
)

log = logging.getLogger(__name__)


class TorchScriptBackend(Moves):
    def __init__(self) -> None:
        self._call: Call | None = None
        self._forward: Forward | None = None
        self._model: Any = None

    def load(self, order: Order) -> Loaded:
        config = order.config
        registry.check_options(NAME, config.options)
        device = torch_io.begin(order)
        self._movable = movable(order.device, self._tensors)
        path = order.path / (order.model_file or MODEL_FILE)
        data = read_whole(path)
        try:
            with _deprecated():
                load: Any = torch.jit.load
                model = load(io.BytesIO(data), map_location=device).eval()
        except (RuntimeError, ValueError) as error:
            raise _incomplete(path, error) from error
        del data
        self._model = model
        inputs = agreement.configured(config.inputs, config.max_batch_size)
        outputs = agreement.configured(config.outputs, config.max_batch_size)
        self._forward = Forward(model, _parameters(model), [spec.name for spec in inputs])
        self._call = Call(
            self._run,
            device,
            inputs,
            outputs,
            batched=config.max_batch_size > 0,
            own=bool(order.extra.get("shares_process", False)),
        )
        log.warning("model '%s' version %s: %s", order.model, order.version, WARNING)
        return Loaded(
            inputs=inputs,
            outputs=outputs,
            max_batch_size=config.max_batch_size,
            platform=registry.entry(NAME).platform,
            memory={"weights": torch_io.bytes_of(model)},
            details={
                "deprecated": WARNING,
                "threads": order.threads,
                "torch": str(torch.__version__),
            },
            abilities=("sleep",),
        )

    def validate(self, order: Order) -> None:
        """The archive's directory; its code is not run."""
        registry.check_options(NAME, order.config.options)
        path = order.path / (order.model_file or MODEL_FILE)
        check_there(path)
        try:
            with _deprecated():
                members = torch._C.PyTorchFileReader(os.fspath(path)).get_all_records()
        except (RuntimeError, ValueError) as error:
            raise _incomplete(path, error) from error
        if not any(name.startswith("code/") for name in members):
            raise IncompleteFilesError(
                f"{path.name} is no complete archive of torch.jit.save: there is no code in it"
            )

    def _tensors(self) -> Tensors:
        """Those that have a name: what the archive's code holds as constants stays where it is."""
        model = self._model
        if model is None:
            return {}
        return {"weights": (*model.parameters(), *model.buffers())}

    def infer(self, request: InferRequest) -> InferResponse:
        return self._infer(request, None)

    def infer_into(self, request: InferRequest, room: Room) -> InferResponse:
        return self._infer(request, room)

    def unload(self) -> None:
        self._call = self._forward = self._model = self._movable = None
        torch_io.end()

    def _infer(self, request: InferRequest, room: Room | None) -> InferResponse:
        if self._call is None:
            raise InferenceFailedError("the model is not loaded")
        return self._call(request, room)

    def _run(self, inputs: Mapping[str, torch.Tensor], adapters: Sequence[str]) -> Any:
        assert self._forward is not None
        with torch.inference_mode():
            return self._forward(inputs)


@contextmanager
def _deprecated() -> Iterator[None]:
    """Without torch's own warning of what we say ourselves."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.", DeprecationWarning)
        yield


def _incomplete(path: Path, error: Exception) -> IncompleteFilesError:
    reason = str(error).splitlines()[0]
    return IncompleteFilesError(f"{path.name} is no complete archive of torch.jit.save: {reason}")


def _parameters(model: Any) -> list[Parameter]:
    """Of the archive's own forward, without `self`."""
    return [
        Parameter(
            argument.name,
            Parameter.POSITIONAL_OR_KEYWORD,
            default=argument.default_value if argument.has_default_value() else Parameter.empty,
        )
        for argument in model.forward.schema.arguments[1:]
    ]
