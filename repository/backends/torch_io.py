"""Tensors of requests as torch has them, and back; what all torch backends share besides.

In: torch looks at the request's own memory where that is aligned and not tiny. The request's memory is
only valid during `infer`, so an output that lies in it is copied.
Out: straight into the server's room where there is one, whatever the strides or the device.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch

from repository.backends.base import Order, Room
from repository.errors import InferenceFailedError, InvalidTensorError, LoadFailedError
from repository.tensors import Tensor, address

DTYPES = {
    "BOOL": torch.bool, "UINT8": torch.uint8, "UINT16": torch.uint16, "UINT32": torch.uint32,
    "UINT64": torch.uint64, "INT8": torch.int8, "INT16": torch.int16, "INT32": torch.int32,
    "INT64": torch.int64, "FP16": torch.float16, "FP32": torch.float32, "FP64": torch.float64,
    "BF16": torch.bfloat16,
}  # fmt: skip
DATATYPES = {dtype: name for name, dtype in DTYPES.items()}
COPY_BELOW = 4096  # bytes that are cheaper to copy than to look at


def begin(order: Order) -> torch.device:
    """The device, with the threads set that this instance may use. Raises LoadFailedError."""
    torch.set_num_threads(order.threads)
    with suppress(RuntimeError):  # inline, where another model has set it before
        torch.set_num_interop_threads(1)
    device = torch.device(order.device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise LoadFailedError(
            f"the model wants {order.device}, but this torch ({torch.__version__}) finds "
            f"{torch.cuda.device_count()} such GPUs; set device to cpu, or install torch with CUDA"
        )
    return device


def end() -> None:
    """After the last reference to a model is gone. A worker ends next, and with it all there was; until
    then its device gets back what a model that holds on to itself would have kept."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch's
        gc.collect()
        torch.cuda.empty_cache()


def bytes_of(module: torch.nn.Module) -> int:
    """Of parameters and buffers, shared ones once."""
    return bytes_of_all([*module.parameters(), *module.buffers()])


def bytes_of_all(tensors: Iterable[torch.Tensor]) -> int:
    seen = {(t.data_ptr(), t.nbytes) for t in tensors}
    return sum(size for _, size in seen)


# in ---------------------------------------------------------------------------------------------


def arrived(tensor: Tensor, device: torch.device, *, own: bool = False) -> torch.Tensor:
    """A tensor of a request. `own`: in memory of its own, which a model may write to.

    Raises InvalidTensorError for BYTES, or data that does not fill the shape.
    """
    dtype = DTYPES.get(tensor.datatype)
    if dtype is None:
        raise InvalidTensorError(
            f"input '{tensor.name}' is {tensor.datatype}; torch models take numbers"
        )
    tensor.check_size()
    data = tensor.data
    if not len(data):
        return torch.empty(tensor.shape, dtype=dtype, device=device)
    if own or len(data) < COPY_BELOW or address(data) % dtype.itemsize:
        flat = torch.frombuffer(bytearray(data), dtype=dtype)
    else:
        # Through its address: torch warns of memory that may not be written to, which most is.
        # The caller holds the request, and with it the memory, until it has its answer.
        flat = torch.frombuffer(
            (ctypes.c_char * len(data)).from_address(address(data)), dtype=dtype
        )
    shaped = flat.view(tensor.shape)
    return shaped if device.type == "cpu" else shaped.to(device)


# out --------------------------------------------------------------------------------------------


class Departure:
    """Turns what a model returned for one request into tensors of its answer.

    room    where large ones are to lie, if there is such a place
    inputs  what the model was given: outputs that lie in the same memory are copied
    own     every output in memory of its own: the answer outlives the model's next run
    """

    def __init__(
        self, room: Room | None, inputs: Iterable[torch.Tensor], *, own: bool = False
    ) -> None:
        self._room = room
        self._inputs = {t.untyped_storage().data_ptr() for t in inputs}
        self._own = own

    def tensor(self, name: str, value: torch.Tensor, datatype: str | None = None) -> Tensor:
        """`datatype`: what it has been declared as. Raises InferenceFailedError where it is something
        else, or cannot travel."""
        found = DATATYPES.get(value.dtype)
        if found is None or value.layout is not torch.strided or value.is_quantized:
            raise InferenceFailedError(
                f"the model returned '{name}' as {value.dtype} ({value.layout}), for which "
                "KServe V2 has no datatype"
            )
        if datatype is not None and datatype != found:
            raise InferenceFailedError(
                f"the model returned '{name}' as {found} ({value.dtype}); it is declared as "
                f"{datatype}"
            )
        value = value.detach().resolve_neg()
        return Tensor(name, found, tuple(value.shape), self._data(value))

    def _data(self, value: torch.Tensor) -> bytes | memoryview:
        size = value.numel() * value.itemsize
        if not size:
            return b""
        if size < COPY_BELOW:
            return bytes(_bytes(value.cpu().contiguous()))
        place = None if self._room is None else self._room.take(size)
        if place is not None:
            there = torch.frombuffer(place, dtype=value.dtype).view(value.shape)
            there.copy_(value)
            return place
        if value.device.type != "cpu":
            return _bytes(value.cpu().contiguous())
        if self._own or value.untyped_storage().data_ptr() in self._inputs:
            return _bytes(value.clone(memory_format=torch.contiguous_format))
        return _bytes(value.contiguous())


def _bytes(value: torch.Tensor) -> memoryview:
    """Of a contiguous tensor of the CPU; they live as long as this."""
    array: Any = value.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def check_rows(name: str, value: torch.Tensor, rows: int | None) -> None:
    """With `rows`: the first axis is the batch. Raises InferenceFailedError."""
    if rows is not None and (value.dim() == 0 or value.shape[0] != rows):
        raise InferenceFailedError(
            f"the model returned '{name}' with shape {list(value.shape)} for a batch of {rows}: "
            "the first axis of every output must be the batch (max_batch_size: 0 ends batching)"
        )


# names ------------------------------------------------------------------------------------------


def named(answer: Any, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """What a model returned, by name: a mapping's own, else `names` in order, else "output" (one) or
    "output_0" ... (several). Values that are no tensors are left out of a mapping.

    Raises InferenceFailedError.
    """
    if isinstance(answer, torch.Tensor):
        return {names[0] if names else "output": answer}
    fields = _fields(answer)
    if fields is not None:
        return {str(k): v for k, v in fields.items() if isinstance(v, torch.Tensor)}
    if not isinstance(answer, tuple | list):
        raise InferenceFailedError(
            "the model must return a tensor, a tuple, a list or a dict of tensors; it returned "
            f"{_kind(answer)}"
        )
    if names and len(answer) < len(names):
        raise InferenceFailedError(
            f"the model returned {len(answer)} tensors; the config lists {len(names)} outputs "
            f"({', '.join(names)})"
        )
    given = names or [f"output_{i}" for i in range(len(answer))]
    found = dict(zip(given, answer, strict=False))
    for name, value in found.items():
        if not isinstance(value, torch.Tensor):
            raise InferenceFailedError(
                f"the model returned {_kind(value)} as '{name}'; it must be a tensor"
            )
    return found


def _fields(answer: Any) -> dict[Any, Any] | None:
    """Of a mapping, a dataclass or a named tuple."""
    if hasattr(answer, "keys") and hasattr(answer, "__getitem__"):
        return {key: answer[key] for key in answer.keys()}  # noqa: SIM118 - no more is promised
    if hasattr(answer, "__dataclass_fields__"):
        return {key: getattr(answer, key) for key in answer.__dataclass_fields__}
    if isinstance(answer, tuple) and hasattr(answer, "_fields"):
        return {key: getattr(answer, key) for key in answer._fields}
    return None


def _kind(value: Any) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def rows_of(inputs: Iterable[torch.Tensor]) -> int | None:
    return next((t.shape[0] for t in inputs if t.dim()), None)
