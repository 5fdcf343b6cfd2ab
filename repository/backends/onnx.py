"""ONNX models by onnxruntime. Only code that runs where the model runs imports onnxruntime.

Options of the config (`options:`):
    threads             compute threads of one instance (default: cores divided among the instances)
    arena               keep freed CPU memory for the next request (default true)
    optimization        none | basic | extended | all (default all)
    inter_threads       threads among which branches of the graph are divided (default 1)
    execution           sequential | parallel: branches one after the other, or at once
    mem_pattern         plan memory by the shapes of the run before (default true)
    arena_shrinkage     arenas that give memory back after each run: "cpu:0", "cpu:0;gpu:0"
    spinning            idle threads spin: lower latency for a busy core each (default false)
    gpu_mem_limit       bytes that the CUDA arena may grow to
    allow_cpu_fallback  run on the CPU where CUDA cannot be used, instead of failing (default false)
"""

from __future__ import annotations

import ctypes
import time
from functools import partial
from typing import Any

import numpy as np

from repository.backends import pages, registry
from repository.backends.base import Order, Room
from repository.backends.onnx_binding import Binding
from repository.backends.onnx_session import (
    Sessions,
    agreement_of,
    onnxruntime,
    run_options,
    threads_of,
)
from repository.errors import InvalidTensorError
from repository.lifecycle.placement import Memory
from repository.messages import InferRequest, InferResponse, Loaded
from repository.tensors import DATATYPES, Array, Tensor

NAME = "onnx"
BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16
COPY_BELOW = 4096  # bytes of an output that are cheaper to copy than to view


class OnnxBackend:
    def __init__(self) -> None:
        self._ort: Any = None
        self._session: Any = None
        self._sessions: Sessions | None = None
        self._inputs: dict[str, str] = {}  # name -> datatype
        self._outputs: dict[str, str] = {}
        self._all: tuple[str, ...] = ()
        self._bf16 = False
        self._run_options: Any = None
        self._binding: Binding | None = None

    def load(self, order: Order) -> Loaded:
        registry.check_options(NAME, order.config.options)
        self._ort = ort = onnxruntime()
        began = time.perf_counter()  # after the library, which is read too
        self._sessions = Sessions(ort, order)
        self._session = session = self._sessions.first()
        max_batch_size, inputs, outputs = agreement_of(session, order)
        self._run_options = run_options(ort, order)
        self._inputs = {spec.name: spec.datatype for spec in inputs}
        self._outputs = {spec.name: spec.datatype for spec in outputs}
        self._all = tuple(self._outputs)
        self._bf16 = "BF16" in {*self._inputs.values(), *self._outputs.values()}
        if not self._sessions.on_gpu:
            self._binding = Binding(session, self._run_options)
        return Loaded(
            inputs=inputs,
            outputs=outputs,
            max_batch_size=max_batch_size,
            platform=registry.entry(NAME).platform,
            details={
                "providers": list(session.get_providers()),
                "threads": threads_of(order),
                "onnxruntime": str(ort.__version__),
                "build_s": round(time.perf_counter() - began, 6),
            },
            abilities=("sleep",),
        )

    def validate(self, order: Order) -> None:
        registry.check_options(NAME, order.config.options)
        Sessions(onnxruntime(), order).check()

    def sleep(self) -> None:
        """The session goes, and all that it has on its device; what it was made of is kept."""
        assert self._sessions is not None, "load comes first"
        self._sessions.keep()
        self._session = self._binding = None
        pages.trim()

    def wake(self) -> None:
        assert self._sessions is not None, "load comes first"
        self._session = self._sessions.again()
        if not self._sessions.on_gpu:
            self._binding = Binding(self._session, self._run_options)

    def memory(self) -> Memory:
        return self._sessions.memory() if self._sessions is not None else {}

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
        self._session = self._binding = self._sessions = None

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
        arrays: list[Array] = self._session.run(names, feeds, self._run_options)
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
        results = self._session.run_with_ort_values(names, values, self._run_options)
        return [
            _bits(value) if self._outputs[name] == "BF16" else value.numpy()
            for name, value in zip(names, results, strict=True)
        ]

    def _is_the_requests_fault(self, error: Exception) -> bool:
        if isinstance(error, ValueError):  # an input is missing
            return True
        state = self._ort.capi.onnxruntime_pybind11_state
        return isinstance(error, state.InvalidArgument)


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
