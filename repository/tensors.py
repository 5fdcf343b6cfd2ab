"""Named tensors in wire form: what goes into a model and what comes out.

A tensor travels as the bytes of KServe V2's binary tensor extension: row-major, little-endian;
BYTES elements are each preceded by their length (uint32, little-endian). Nothing here copies those
bytes on the way through, and concatenating the data of two tensors along the first axis is
concatenating their bytes, which is all that batching needs.
"""

from __future__ import annotations

import ctypes
import math
import struct
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from repository.errors import InvalidTensorError

Buffer: TypeAlias = bytes | bytearray | memoryview
Array: TypeAlias = npt.NDArray[Any]
Shape: TypeAlias = tuple[int, ...]

LENGTH = struct.Struct("<I")
ALIGN = 64  # bytes; a tensor begins at a multiple of it, as vector units and devices like


@dataclass(frozen=True, slots=True)
class Datatype:
    """One datatype of KServe V2. `size` is bytes per element, 0 for BYTES (variable).

    numpy has no bfloat16, so BF16 appears in arrays as its bits in uint16.
    """

    name: str
    dtype: np.dtype[Any]
    size: int


def _table() -> dict[str, Datatype]:
    plain = {
        "BOOL": "?", "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8",
        "INT8": "i1", "INT16": "<i2", "INT32": "<i4", "INT64": "<i8",
        "FP16": "<f2", "FP32": "<f4", "FP64": "<f8", "BF16": "<u2",
    }  # fmt: skip
    table = {n: Datatype(n, np.dtype(d), np.dtype(d).itemsize) for n, d in plain.items()}
    table["BYTES"] = Datatype("BYTES", np.dtype(object), 0)
    return table


DATATYPES: dict[str, Datatype] = _table()
_OF_NUMPY = {d.dtype: n for n, d in DATATYPES.items() if n not in ("BF16", "BYTES")}


class Tensor(msgspec.Struct, gc=False):
    """`data` is the wire form. `shape` has no -1. Its size is checked by `check_size`."""

    name: str
    datatype: str
    shape: Shape
    data: Buffer

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def array(self) -> Array:
        """A view, shaped, that may be read-only; BYTES become an object array of bytes.

        Raises InvalidTensorError where the data does not fill the shape.
        """
        if self.datatype == "BYTES":
            found = unpack_bytes(self.data)
            self._check_elements(len(found))
            flat: Array = np.empty(len(found), dtype=object)
            flat[:] = found
        else:
            self.check_size()
            flat = np.frombuffer(self.data, DATATYPES[self.datatype].dtype)
        try:
            return flat.reshape(self.shape)
        except ValueError as error:  # too many axes, or a size beyond what numpy can count
            raise InvalidTensorError(
                f"tensor '{self.name}' cannot have shape {list(self.shape)}: {error}"
            ) from error

    @classmethod
    def of(cls, name: str, array: Array, datatype: str | None = None) -> Tensor:
        """From any array. `datatype` overrides what numpy says (BF16 is given as uint16)."""
        if datatype is None:
            datatype = datatype_of(array.dtype)
        if datatype == "BYTES":
            return cls(name, datatype, tuple(array.shape), pack_bytes(array))
        wanted = DATATYPES[datatype].dtype
        # ascontiguousarray would turn a scalar into one row; its shape is taken before.
        plain = np.ascontiguousarray(array, dtype=wanted)
        return cls(name, datatype, tuple(array.shape), plain.reshape(-1).view(np.uint8).data)

    def check_size(self) -> None:
        """Raises InvalidTensorError unless the data is exactly as long as the shape says."""
        known = DATATYPES.get(self.datatype)
        if known is None:
            raise InvalidTensorError(
                f"tensor '{self.name}' has datatype '{self.datatype}', unknown to KServe V2"
            )
        if min(self.shape, default=0) < 0:
            raise InvalidTensorError(
                f"tensor '{self.name}' has shape {list(self.shape)}; no size may be negative"
            )
        if known.size == 0:
            self._check_elements(count_bytes(self.data, most=2 * self.elements + 1000))
        elif len(self.data) != known.size * self.elements:
            raise InvalidTensorError(
                f"input byte size mismatch for input '{self.name}'. Expected "
                f"{known.size * self.elements}, got {len(self.data)}"
            )

    def _check_elements(self, count: int) -> None:
        if count != self.elements:
            raise InvalidTensorError(
                f"input '{self.name}' holds {count} elements; shape {list(self.shape)} "
                f"needs {self.elements}"
            )


def address(data: Buffer) -> int:
    """Of the first byte in memory. `data` must not be empty."""
    try:  # seven times as fast, where `data` may be written to
        return ctypes.addressof(ctypes.c_char.from_buffer(data))
    except TypeError:
        found: int = np.frombuffer(data, np.uint8).__array_interface__["data"][0]
        return found


def datatype_of(dtype: np.dtype[Any]) -> str:
    if dtype.kind in "OSU":
        return "BYTES"
    name = _OF_NUMPY.get(dtype.newbyteorder("<") if dtype.itemsize > 1 else dtype)
    if name is None:
        raise InvalidTensorError(f"numpy type {dtype} has no KServe V2 datatype")
    return name


def pack_bytes(array: Array) -> bytes:
    """Wire form of an array of bytes or text (as UTF-8); anything else is written as its `str`.

    Raises InvalidTensorError for text that UTF-8 cannot say.
    """
    parts: list[bytes] = []
    for item in array.reshape(-1):
        raw = bytes(item) if isinstance(item, (bytes, bytearray, memoryview)) else _utf8(item)
        parts += (LENGTH.pack(len(raw)), raw)
    return b"".join(parts)


def _utf8(item: object) -> bytes:
    try:
        return str(item).encode()
    except UnicodeEncodeError as error:
        raise InvalidTensorError(f"a BYTES element is no valid text: {error.reason}") from error


def unpack_bytes(data: Buffer) -> list[bytes]:
    """The elements. Raises InvalidTensorError if a length runs past the end."""
    found: list[bytes] = []
    at, end = 0, len(data)
    while at < end:
        begin, at = at + LENGTH.size, skip_bytes(data, at, 1)
        found.append(bytes(data[begin:at]))
    return found


def count_bytes(data: Buffer, *, most: int | None = None) -> int:
    """How many elements there are, without copying them. It gives up at `most`: nobody else is
    answered while it counts. Raises as `unpack_bytes` does."""
    end, head, read = len(data), LENGTH.size, LENGTH.unpack_from
    count = at = before = 0
    last = end - head
    while at <= last:
        before = at
        at += head + read(data, at)[0]
        count += 1
        if count == most:
            return count
    if at != end:
        skip_bytes(data, before if at > end else at, 1)  # says what is wrong there
    return count


def skip_bytes(data: Buffer, at: int, count: int) -> int:
    """Where the element that is `count` elements after the one at `at` begins (or the end).

    Raises InvalidTensorError if there are not so many, or a length runs past the end. However many
    are asked for, it ends with the data.
    """
    end, head, read = len(data), LENGTH.size, LENGTH.unpack_from
    for _ in range(count):
        if end - at < head:
            raise InvalidTensorError(
                "a BYTES tensor ends inside an element's length"
                if at < end
                else "a BYTES tensor ends before its last element"
            )
        (length,) = read(data, at)
        at += head
        if length > end - at:
            raise InvalidTensorError(
                f"a BYTES element declares {length} bytes; only {end - at} are left"
            )
        at += length
    return at
