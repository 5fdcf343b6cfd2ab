"""Makes the module that models import as `triton_python_backend_utils`.

It is made in the worker, for its one model, and stands in sys.modules while the model lives: there is no
file of that name, so nothing else can import it. `c_python_backend_utils` is the same thing.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from repository.backends.abilities import Others
from repository.backends.triton import datatypes, request, sender
from repository.backends.triton.answer import InferenceResponse
from repository.backends.triton.auto_complete import ModelConfig
from repository.backends.triton.errors import TritonError, TritonModelException, theirs
from repository.backends.triton.logger import Logger, LogLevel
from repository.backends.triton.metrics import Book, Metric, MetricFamily, MetricKind
from repository.backends.triton.tensor import Tensor
from repository.errors import RepositoryError

NAME = "triton_python_backend_utils"
NAMES = (NAME, "c_python_backend_utils")
FILE = "file:"


def make(
    model: str,
    folder: Path,
    others: Others | None,
    book: Book | None = None,
    *,
    verbose: bool = False,
) -> ModuleType:
    """`folder`: the version's. `others` None: other models cannot be asked. `book`: what it counts."""
    module = ModuleType(NAME, "What models written for Triton's python backend import.")
    asking = _Asking(others)
    bound = {
        "InferenceRequest": type(
            "InferenceRequest", (request.InferenceRequest,), {"others": others}
        ),
        "Logger": type("Logger", (Logger,), {"model": model, "verbose": verbose}),
        "MetricFamily": type("MetricFamily", (MetricFamily,), {"book": book or Book()}),
        "load_model": asking.load_model,
        "unload_model": asking.unload_model,
        "is_model_ready": asking.is_model_ready,
        "get_model_dir": lambda: str(folder),
    }
    vars(module).update(SAME_FOR_ALL | bound)
    return module


def install(module: ModuleType) -> None:
    for name in NAMES:
        sys.modules[name] = module


def remove(module: ModuleType) -> None:
    """Only that very module."""
    for name in NAMES:
        if sys.modules.get(name) is module:
            del sys.modules[name]


class _Asking:
    """Every call raises TritonModelException with what it came to."""

    def __init__(self, others: Others | None) -> None:
        self._others = others

    def load_model(
        self,
        model_name: str,
        config: str = "",
        files: Mapping[str, bytes] | None = None,
        namespace: str | None = None,
    ) -> None:
        """Returns when it serves. `config`: JSON, in place of the one in its folder. `files`:
        "file:PATH" -> content, in place of all that is in its folder; only with a config. `namespace`,
        here and below: there are none."""
        brought = {}
        for name, content in (files or {}).items():
            if not isinstance(name, str) or not isinstance(content, bytes | bytearray | memoryview):
                raise TritonModelException('files is {"file:PATH": content}, the content as bytes')
            brought[name.removeprefix(FILE)] = bytes(content)
        self._try("load", model_name, config or None, brought)

    def unload_model(
        self, model_name: str, unload_dependents: bool = False, namespace: str | None = None
    ) -> None:
        """Returns when it is gone. `unload_dependents`: of an ensemble, also the models that only it
        needs."""
        self._try("unload", model_name, bool(unload_dependents))

    def is_model_ready(
        self, model_name: str, model_version: str = "", namespace: str | None = None
    ) -> bool:
        try:
            version = int(model_version) if model_version else None
        except ValueError as error:
            raise TritonModelException(f"'{model_version}' is no version") from error
        return bool(self._try("is_ready", model_name, version))

    def _try(self, what: str, *args: Any) -> Any:
        if self._others is None:
            raise TritonModelException("other models can be asked by a model that runs in a worker")
        try:
            return getattr(self._others, what)(*args)
        except RepositoryError as error:
            raise TritonModelException(theirs(error).message()) from error


def get_input_tensor_by_name(
    inference_request: request.InferenceRequest, name: str
) -> Tensor | None:
    return _named(inference_request.inputs(), name)


def get_output_tensor_by_name(inference_response: InferenceResponse, name: str) -> Tensor | None:
    return _named(inference_response.output_tensors(), name)


def get_input_config_by_name(model_config: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    return _configured(model_config, "input", name)


def get_output_config_by_name(model_config: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    return _configured(model_config, "output", name)


def using_decoupled_model_transaction_policy(model_config: Mapping[str, Any]) -> bool:
    return bool((model_config.get("model_transaction_policy") or {}).get("decoupled", False))


def _named(tensors: Sequence[Tensor], name: str) -> Tensor | None:
    return next((tensor for tensor in tensors if tensor.name() == name), None)


def _configured(config: Mapping[str, Any], side: str, name: str) -> dict[str, Any] | None:
    found: dict[str, Any] | None
    found = next((one for one in config.get(side, ()) if one.get("name") == name), None)
    return found


SAME_FOR_ALL: dict[str, Any] = {
    "InferenceResponse": InferenceResponse,
    "InferenceResponseSender": sender.InferenceResponseSender,
    "InferenceTrace": request.InferenceTrace,
    "LogLevel": LogLevel,
    "MemoryType": request.MemoryType,
    "Metric": Metric,
    "MetricKind": MetricKind,
    "ModelConfig": ModelConfig,
    "NUMPY_TO_TRITON_TYPE": datatypes.NUMPY_TO_TRITON,
    "PreferredMemory": request.PreferredMemory,
    "ResponseIterator": request.ResponseIterator,
    "TRITONSERVER_MEMORY_CPU": request.MemoryType.TRITONSERVER_MEMORY_CPU,
    "TRITONSERVER_MEMORY_GPU": request.MemoryType.TRITONSERVER_MEMORY_GPU,
    "TRITONSERVER_REQUEST_FLAG_SEQUENCE_END": request.SEQUENCE_END,
    "TRITONSERVER_REQUEST_FLAG_SEQUENCE_START": request.SEQUENCE_START,
    "TRITONSERVER_REQUEST_RELEASE_ALL": request.RELEASE_ALL,
    "TRITONSERVER_REQUEST_RELEASE_RESCHEDULE": request.RESCHEDULE,
    "TRITONSERVER_RESPONSE_COMPLETE_FINAL": sender.FINAL,
    "TRITON_STRING_TO_NUMPY": datatypes.TRITON_STRING_TO_NUMPY,
    "TRITON_TO_NUMPY_TYPE": datatypes.TRITON_TO_NUMPY,
    "Tensor": Tensor,
    "TritonError": TritonError,
    "TritonModelException": TritonModelException,
    "deserialize_bytes_tensor": datatypes.deserialize_bytes_tensor,
    "get_input_config_by_name": get_input_config_by_name,
    "get_input_tensor_by_name": get_input_tensor_by_name,
    "get_output_config_by_name": get_output_config_by_name,
    "get_output_tensor_by_name": get_output_tensor_by_name,
    "numpy_to_triton_type": datatypes.numpy_to_triton_type,
    "serialize_byte_tensor": datatypes.serialize_byte_tensor,
    "triton_string_to_numpy": datatypes.triton_string_to_numpy,
    "triton_to_numpy_type": datatypes.triton_to_numpy_type,
    "using_decoupled_model_transaction_policy": using_decoupled_model_transaction_policy,
}
