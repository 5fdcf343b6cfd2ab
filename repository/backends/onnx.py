"""ONNX models by onnxruntime. Only code that runs where the model runs imports onnxruntime.

Options of the config (`options:`):
    threads             compute threads of one instance (default: cores divided among the instances)
    arena               keep freed CPU memory for the next request (default true)
    optimization        none | basic | extended | all (default all)
    spinning            idle threads spin: lower latency for a busy core each (default false)
    gpu_mem_limit       bytes that the CUDA arena may grow to
    allow_cpu_fallback  run on the CPU where CUDA cannot be used, instead of failing (default false)
"""

from __future__ import annotations

import ctypes
import os
from functools import partial
from typing import Any

import numpy as np

from repository.backends import agreement, registry
from repository.backends.base import Order, Room
from repository.backends.onnx_binding import Binding
from repository.errors import IncompleteFilesError, InvalidTensorError, LoadFailedError
from repository.messages import InferRequest, InferResponse, Loaded, TensorSpec
from repository.tensors import DATATYPES, Array, Tensor

NAME = "onnx"
TYPES = {
    "tensor(bool)": "BOOL", "tensor(string)": "BYTES",
    "tensor(uint8)": "UINT8", "tensor(uint16)": "UINT16", "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64", "tensor(int8)": "INT8", "tensor(int16)": "INT16",
    "tensor(int32)": "INT32", "tensor(int64)": "INT64", "tensor(float16)": "FP16",
    "tensor(float)": "FP32", "tensor(double)": "FP64", "tensor(bfloat16)": "BF16",
}  # fmt: skip
BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16
OPTIMIZATION = {
    "none": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
COPY_BELOW = 4096  # bytes of an output that are cheaper to copy than to view
ERRORS_ONLY = 3  # onnxruntime's log severity


def _onnxruntime() -> Any:
    # Importing it starts a thread that sends usage data over the network, unless this is set.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    return onnxruntime


class OnnxBackend:
    def __init__(self) -> None:
        self._ort: Any = None
        self._session: Any = None
        self._inputs: dict[str, str] = {}  # name -> datatype
        self._outputs: dict[str, str] = {}
        self._all: tuple[str, ...] = ()
        self._bf16 = False
        self._binding: Binding | None = None

    def load(self, order: Order) -> Loaded:
        registry.check_options(NAME, order.config.options)
        self._ort = ort = _onnxruntime()
        providers = self._providers(order)
        path = order.path / order.model_file
        if not path.is_file():
            raise IncompleteFilesError(f"{path.name} is missing")
        self._session = session = ort.InferenceSession(
            os.fspath(path), self._session_options(order), providers=providers
        )
        # On a CUDA error in use it would go on with the CPU, again without a word.
        session.disable_fallback()
        self._check_device(order)
        have_in = [_spec(node, "input") for node in session.get_inputs()]
        listed = {t.name for t in order.config.outputs or ()}
        # An output that cannot travel only matters if it is to be served.
        nodes = [
            n for n in session.get_outputs() if n.type in TYPES or not listed or n.name in listed
        ]
        have_out = [_spec(node, "output") for node in nodes]
        inputs, outputs = agreement.reconcile(order.config, have_in, have_out)
        self._inputs = {spec.name: spec.datatype for spec in inputs}
        self._outputs = {spec.name: spec.datatype for spec in outputs}
        self._all = tuple(self._outputs)
        self._bf16 = "BF16" in {*self._inputs.values(), *self._outputs.values()}
        if not order.device.startswith("cuda"):
            self._binding = Binding(session)
        return Loaded(
            inputs=inputs,
            outputs=outputs,
            max_batch_size=order.config.max_batch_size,
            platform=registry.entry(NAME).platform,
            details={
                "providers": list(session.get_providers()),
                "threads": self._threads(order),
                "onnxruntime": str(ort.__version__),
            },
        )

    def infer(self, request: InferRequest) -> InferResponse:
        for name in request.outputs:
            if name not in self._outputs:
                raise InvalidTensorError(f"the model has no output '{name}'")
        names = request.outputs or self._all
        feeds = {tensor.name: self._array(tensor) for tensor in request.inputs}
        try:
            arrays = self._run_values(names, feeds) if self._bf16 else self._run(names, feeds)
        except Exception as error:  # what onnxruntime raises has no base class of its own
            if self._is_the_requests_fault(error):
                raise InvalidTensorError(_plain(error)) from error
            raise
        outputs = self._outputs
        return InferResponse(
            [_tensor(n, outputs[n], a) for n, a in zip(names, arrays, strict=True)]
        )

    def infer_into(self, request: InferRequest, room: Room) -> InferResponse:
        binding, form = self._binding, request.form
        if binding is None or form is None:
            return self.infer(request)
        if binding.knows(form):
            feeds = {tensor.name: self._array(tensor) for tensor in request.inputs}
            return binding.run(form, feeds, room, partial(self.infer, request))
        response = self.infer(request)
        binding.remember(request, response)
        return response

    def unload(self) -> None:
        self._session = self._binding = None

    # loading ------------------------------------------------------------------------------------

    def _threads(self, order: Order) -> int:
        threads = registry.option(order.config.options, "threads", int, order.threads)
        return max(1, int(threads))

    def _session_options(self, order: Order) -> Any:
        options, ort = order.config.options, self._ort
        level = registry.option(options, "optimization", str, "all")
        if level not in OPTIMIZATION:
            raise LoadFailedError(
                f"options.optimization is '{level}'; it must be one of {', '.join(OPTIMIZATION)}"
            )
        made = ort.SessionOptions()
        made.intra_op_num_threads = self._threads(order)
        made.inter_op_num_threads = 1
        made.log_severity_level = ERRORS_ONLY
        made.graph_optimization_level = getattr(ort.GraphOptimizationLevel, OPTIMIZATION[level])
        made.enable_cpu_mem_arena = registry.option(options, "arena", bool, True)
        spin = "1" if registry.option(options, "spinning", bool, False) else "0"
        made.add_session_config_entry("session.intra_op.allow_spinning", spin)
        made.add_session_config_entry("session.inter_op.allow_spinning", spin)
        return made

    def _providers(self, order: Order) -> list[Any]:
        if not order.device.startswith("cuda"):
            return ["CPUExecutionProvider"]
        if "CUDAExecutionProvider" not in self._ort.get_available_providers():
            if self._may_fall_back(order):
                return ["CPUExecutionProvider"]
            raise LoadFailedError(
                f"the model wants {order.device}, but this onnxruntime was built without CUDA; "
                "install onnxruntime-gpu, or set device to cpu"
            )
        # The CUDA libraries that came with torch serve; without this only the system's are found.
        self._ort.preload_dlls()
        index = order.device.partition(":")[2] or "0"
        cuda = {"device_id": index, "arena_extend_strategy": "kSameAsRequested"}
        limit = registry.option(
            order.config.options, "gpu_mem_limit", int, order.extra.get("gpu_mem_limit")
        )
        if limit:
            cuda["gpu_mem_limit"] = str(limit)
        return [("CUDAExecutionProvider", cuda), "CPUExecutionProvider"]

    def _check_device(self, order: Order) -> None:
        """onnxruntime falls back to the CPU without a word: the wish is compared with the truth."""
        used = self._session.get_providers()
        if not order.device.startswith("cuda") or "CUDAExecutionProvider" in used:
            return
        if not self._may_fall_back(order):
            self._session = None
            raise LoadFailedError(
                f"the model wants {order.device}, but onnxruntime could not use it (no such GPU, "
                "or no matching CUDA libraries); set device to cpu, or options.allow_cpu_fallback"
            )

    def _may_fall_back(self, order: Order) -> bool:
        default = bool(order.extra.get("cpu_fallback", False))
        return bool(registry.option(order.config.options, "allow_cpu_fallback", bool, default))

    # inference ----------------------------------------------------------------------------------

    def _array(self, tensor: Tensor) -> Array:
        wanted = self._inputs.get(tensor.name)
        if wanted is None:
            raise InvalidTensorError(f"the model has no input '{tensor.name}'")
        if tensor.datatype != wanted:
            raise InvalidTensorError(
                f"input '{tensor.name}' is {tensor.datatype}; the model wants {wanted}"
            )
        if wanted == "BYTES":
            return _texts(tensor.name, tensor.array())
        try:  # half the price of `tensor.array()`, which is left to say what is wrong
            array: Array = np.ndarray(tensor.shape, DATATYPES[wanted].dtype, tensor.data)
        except (TypeError, ValueError):
            return tensor.array()
        return array if array.nbytes == len(tensor.data) else tensor.array()

    def _run(self, names: tuple[str, ...], feeds: dict[str, Array]) -> list[Array]:
        arrays: list[Array] = self._session.run(names, feeds)
        return arrays

    def _run_values(self, names: tuple[str, ...], feeds: dict[str, Array]) -> list[Array]:
        """With bfloat16, which numpy does not have: its bits go in and come out as uint16."""
        make = self._ort.OrtValue
        values = {
            name: make.ortvalue_from_numpy_with_onnx_type(np.asarray(array, order="C"), BFLOAT16)
            if self._inputs[name] == "BF16"
            else make.ortvalue_from_numpy(array)
            for name, array in feeds.items()
        }
        results = self._session.run_with_ort_values(names, values)
        return [
            _bits(value) if self._outputs[name] == "BF16" else value.numpy()
            for name, value in zip(names, results, strict=True)
        ]

    def _is_the_requests_fault(self, error: Exception) -> bool:
        if isinstance(error, ValueError):  # an input is missing
            return True
        state = self._ort.capi.onnxruntime_pybind11_state
        return isinstance(error, state.InvalidArgument)


def _spec(node: Any, side: str) -> TensorSpec:
    datatype = TYPES.get(node.type)
    if datatype is None:
        hint = "export it without it" if side == "input" else "list the other outputs in the config"
        raise LoadFailedError(
            f"{side} '{node.name}' is of type {node.type}, for which KServe V2 has no datatype; "
            f"{hint}"
        )
    shape = tuple(d if isinstance(d, int) and d >= 0 else -1 for d in node.shape or ())
    return TensorSpec(node.name, datatype, shape)


def _tensor(name: str, datatype: str, array: Array) -> Tensor:
    if array.nbytes < COPY_BELOW and datatype != "BYTES":
        return Tensor(name, datatype, array.shape, array.tobytes())
    return Tensor.of(name, array, datatype)


def _texts(name: str, array: Array) -> Array:
    """onnxruntime wants str; bytes objects would become their repr."""
    try:
        texts = [item.decode() for item in array.reshape(-1)]
    except UnicodeDecodeError as error:
        raise InvalidTensorError(
            f"input '{name}' holds bytes that are not UTF-8; ONNX strings are text"
        ) from error
    made = np.empty(len(texts), dtype=object)
    made[:] = texts
    return made.reshape(array.shape)


def _bits(value: Any) -> Array:
    shape = tuple(value.shape())
    count = int(np.prod(shape, dtype=np.int64))
    if count == 0:
        return np.empty(shape, dtype="<u2")
    # onnxruntime's memory ends with `value`: its bits are copied out.
    raw = ctypes.string_at(value.data_ptr(), count * 2)
    return np.frombuffer(raw, dtype="<u2").reshape(shape)


def _plain(error: Exception) -> str:
    """Without onnxruntime's own preamble: "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : ..."."""
    text = str(error)
    if text.startswith("[ONNXRuntimeError]"):
        text = text.split(" : ", 3)[-1]
    return text.strip()
