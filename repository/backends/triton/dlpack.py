"""DLPack capsules read and written without any framework: where the numbers lie, and what they are.

The structures are those of DLPack 1.x, dlpack.h. A capsule is only looked at, never consumed: it keeps
the memory as long as it is kept itself.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from ctypes import (
    POINTER,
    Structure,
    c_char_p,
    c_int32,
    c_int64,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
    c_void_p,
    cast,
    py_object,
    pythonapi,
)
from typing import Any, NamedTuple

import numpy as np

from repository.backends.triton.errors import TritonModelException
from repository.tensors import DATATYPES, Array

CPU, CUDA, PINNED = 1, 2, 3
BFLOAT = 4
# (code, bits) of DLDataType -> datatype of KServe V2
_TYPES = {
    (0, 8): "INT8", (0, 16): "INT16", (0, 32): "INT32", (0, 64): "INT64",
    (1, 8): "UINT8", (1, 16): "UINT16", (1, 32): "UINT32", (1, 64): "UINT64",
    (2, 16): "FP16", (2, 32): "FP32", (2, 64): "FP64", (BFLOAT, 16): "BF16", (6, 8): "BOOL",
}  # fmt: skip


class _Device(Structure):
    _fields_ = [("type", c_int32), ("id", c_int32)]


class _Type(Structure):
    _fields_ = [("code", c_uint8), ("bits", c_uint8), ("lanes", c_uint16)]


class _Tensor(Structure):
    _fields_ = [
        ("data", c_void_p),
        ("device", _Device),
        ("ndim", c_int32),
        ("dtype", _Type),
        ("shape", POINTER(c_int64)),
        ("strides", POINTER(c_int64)),
        ("byte_offset", c_uint64),
    ]


class _Versioned(Structure):
    _fields_ = [
        ("major", c_uint32),
        ("minor", c_uint32),
        ("manager", c_void_p),
        ("deleter", c_void_p),
        ("flags", c_uint64),
        ("tensor", _Tensor),
    ]


_is_valid = pythonapi.PyCapsule_IsValid
_is_valid.argtypes, _is_valid.restype = [py_object, c_char_p], ctypes.c_int
_pointer = pythonapi.PyCapsule_GetPointer
_pointer.argtypes, _pointer.restype = [py_object, c_char_p], c_void_p


class Seen(NamedTuple):
    """`address` of the first number, in the device's memory."""

    address: int
    device: tuple[int, int]
    datatype: str
    shape: tuple[int, ...]


class _Lent:
    """Memory of somebody else's, for numpy, which keeps this as long as its array."""

    def __init__(self, seen: Seen, capsule: Any) -> None:
        self._capsule = capsule
        self.__array_interface__ = {
            "version": 3,
            "data": (seen.address, False),
            "shape": seen.shape,
            "typestr": DATATYPES[seen.datatype].dtype.str,
        }


def capsule_of(lender: Any) -> Any:
    """Of a capsule, or of anything with `__dlpack__`. Raises TritonModelException."""
    if not hasattr(lender, "__dlpack__"):
        return lender
    try:
        return lender.__dlpack__()
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TritonModelException(f"the tensor cannot be lent by DLPack: {error}") from error


def look(capsule: Any) -> Seen:
    """Raises TritonModelException for what is no capsule, is used already, is not contiguous in C's
    order, or has numbers that KServe V2 does not know."""
    tensor = _read(capsule)
    kind = tensor.dtype
    datatype = _TYPES.get((kind.code, kind.bits)) if kind.lanes == 1 else None
    if datatype is None:
        raise TritonModelException(
            f"DLPack type (code {kind.code}, {kind.bits} bits, {kind.lanes} lanes) has no datatype"
        )
    shape = tuple(tensor.shape[: tensor.ndim])
    if tensor.strides and not _contiguous(shape, tuple(tensor.strides[: tensor.ndim])):
        raise TritonModelException(
            "the tensor is not contiguous in C's order; call .contiguous() on it first"
        )
    address = (tensor.data or 0) + tensor.byte_offset
    return Seen(address, (tensor.device.type, tensor.device.id), datatype, shape)


def borrow(seen: Seen, capsule: Any) -> Array:
    """The same memory as an array; BF16 as its bits in uint16."""
    if 0 in seen.shape:
        return np.empty(seen.shape, DATATYPES[seen.datatype].dtype)
    return np.asarray(_Lent(seen, capsule))


def lend(array: Array, datatype: str) -> Any:
    """A capsule for an array that may be written to. Raises TritonModelException for BYTES."""
    if datatype == "BYTES":
        raise TritonModelException("a tensor of BYTES cannot be lent by DLPack; use as_numpy()")
    capsule = np.ascontiguousarray(array).reshape(array.shape).__dlpack__()
    if datatype == "BF16":
        _read(capsule).dtype.code = BFLOAT
    return capsule


def _read(capsule: Any) -> _Tensor:
    found: _Tensor | None = None
    with suppress(ctypes.ArgumentError):  # it is nothing at all
        if _is_valid(capsule, b"dltensor"):
            found = cast(_pointer(capsule, b"dltensor"), POINTER(_Tensor)).contents
        elif _is_valid(capsule, b"dltensor_versioned"):
            versioned = _pointer(capsule, b"dltensor_versioned")
            found = cast(versioned, POINTER(_Versioned)).contents.tensor
    if found is None:
        raise TritonModelException(
            "from_dlpack takes a DLPack capsule that nobody has used yet, or a tensor with __dlpack__"
        )
    return found


def _contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size == 0:
            return True
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
