"""The header of a safetensors file: eight bytes of length, JSON, then the tensors without a gap.

Held against the size of the file before anything is believed: whoever has a `Header` knows that every
tensor lies inside the file, that its datatype and shape fill its bytes, and that none overlap.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from typing import Annotated

import msgspec

from repository.errors import IncompleteFilesError

MAX_HEADER = 16 << 20  # bytes of JSON, a hundred thousand tensors: the front must not stand still
MAX_AXES = 64
MAX_NUMBERS = 1 << 62  # of a tensor without its axes of size 0: more is no shape to any library
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip

Offset = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class Entry(msgspec.Struct, frozen=True):
    """`data_offsets`: begin and end, in bytes from where the tensors begin."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[Offset, Offset]


@dataclass(frozen=True, slots=True)
class Header:
    """`begin`: where in the file the tensors begin. `tensors` in the order of their bytes."""

    begin: int
    tensors: dict[str, Entry]

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return max((entry.data_offsets[1] for entry in self.tensors.values()), default=0)


def header_of(fd: int, size: int) -> Header:
    """Of an open file of `size` bytes. Raises IncompleteFilesError, OSError. The texts do not name the
    file."""
    raw = os.pread(fd, 8, 0)
    if len(raw) < 8:
        raise IncompleteFilesError(f"the file has {size} bytes, its header alone needs 8")
    (length,) = struct.unpack("<Q", raw)
    if length > MAX_HEADER:
        raise IncompleteFilesError(
            f"it declares a header of {length} bytes, at most {MAX_HEADER} are allowed; "
            "is it a safetensors file?"
        )
    if length > size - 8:
        raise IncompleteFilesError(
            f"it declares a header of {length} bytes, but has only {size} in all"
        )
    tensors = _entries(os.pread(fd, length, 8))
    end = 0
    for entry in tensors.values():
        begin, stop = entry.data_offsets
        if begin != end or stop < begin or not _fits(entry, stop - begin):
            raise IncompleteFilesError(
                "its header contradicts itself: tensors overlap or leave gaps"
            )
        end = stop
    if end != size - 8 - length:
        raise IncompleteFilesError(
            f"its tensors need {8 + length + end} bytes, the file has {size}"
        )
    return Header(8 + length, tensors)


def _entries(raw: bytes) -> dict[str, Entry]:
    try:
        header = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        header.pop("__metadata__", None)
        found = [(name, msgspec.json.decode(entry, type=Entry)) for name, entry in header.items()]
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise IncompleteFilesError("its header is not a safetensors header") from error
    return dict(sorted(found, key=lambda one: one[1].data_offsets))


def _fits(entry: Entry, length: int) -> bool:
    bits = BITS.get(entry.dtype)  # a datatype of the future is the worker's to judge
    if any(size < 0 for size in entry.shape) or len(entry.shape) > MAX_AXES:
        return False
    if math.prod(size for size in entry.shape if size) > MAX_NUMBERS:
        return False
    return bits is None or math.prod(entry.shape) * bits == length * 8
