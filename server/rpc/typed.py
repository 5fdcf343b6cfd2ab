"""Tensors that a request brings as lists of numbers or texts (`InferTensorContents`), made to wire form.

Numbers of fixed width lie in a message as they lie in a tensor, and so do truth values; whole numbers
are varints, which numpy reads many at once. Making a Python object of each would hold up everybody else
for a second, so the message's class never sees them: they are cut out before.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np

from repository.errors import InvalidRequestError, InvalidTensorError
from repository.tensors import DATATYPES, LENGTH, Array, Buffer
from server.rpc.wire import MALFORMED, cut, field, fields_of

# Of a datatype: the field of its values, and that field's number.
FIELDS: dict[str, tuple[str, int]] = {
    "BOOL": ("bool_contents", 1),
    "INT8": ("int_contents", 2),
    "INT16": ("int_contents", 2),
    "INT32": ("int_contents", 2),
    "INT64": ("int64_contents", 3),
    "UINT8": ("uint_contents", 4),
    "UINT16": ("uint_contents", 4),
    "UINT32": ("uint_contents", 4),
    "UINT64": ("uint64_contents", 5),
    "FP32": ("fp32_contents", 6),
    "FP64": ("fp64_contents", 7),
    "BYTES": ("bytes_contents", 8),
}
INPUTS, CONTENTS = 5, 5  # numbers of fields: of a request, of an input
MOST_AT_ONCE = (
    1 << 18
)  # bytes of varints that are read in one step: it takes ten times as much memory
ENOUGH = 64  # fields that are looked at beyond those that must be there
LONGEST = 10  # bytes of a varint
_TRUTH = bytes((0, 1))


def cut_contents(message: bytes) -> tuple[bytes, dict[int, memoryview]]:
    """A ModelInferRequest without the values of its inputs, and these, by their place among the inputs.
    Raises InvalidRequestError."""
    parts: list[Buffer] = []
    found: dict[int, memoryview] = {}
    view, begin, at = memoryview(message), 0, 0
    for key, start, data, end in fields_of(message):
        if key >> 3 != INPUTS:
            continue
        rest, contents = cut(view[data:end], CONTENTS)
        if contents:
            # An empty one stands for what was cut out: that it was there is not forgotten.
            found[at] = contents[0] if len(contents) == 1 else memoryview(b"".join(contents))
            parts += (view[begin:start], _input(rest))
            begin = end
        at += 1
    if not found:
        return message, found
    return b"".join((*parts, view[begin:])), found


def _input(rest: bytes) -> bytes:
    return field(INPUTS, rest + field(CONTENTS, b""))


def to_bytes(name: str, datatype: str, elements: int, contents: memoryview) -> Buffer:
    """`contents`: an InferTensorContents as it came. Whole numbers wrap around as they are made to fit.

    Raises InvalidRequestError, InvalidTensorError.
    """
    where = FIELDS.get(datatype)
    if where is None:
        raise InvalidRequestError(
            f"{datatype} has no values in 'contents'; send input '{name}' in raw_input_contents"
        )
    of, number = where
    # Each field brings a value or more: with so many of them, a few more prove that there are too many.
    seen = islice(fields_of(contents), elements + ENOUGH)
    values = [contents[data:end] for key, _, data, end in seen if key >> 3 == number]
    data: Buffer
    if datatype == "BYTES":
        data, count = (
            b"".join([p for raw in values for p in (LENGTH.pack(len(raw)), raw)]),
            len(values),
        )
    else:
        data, count = _numbers(datatype, values[0] if len(values) == 1 else b"".join(values))
    if count != elements:
        raise InvalidTensorError(
            f"unexpected explicit tensor data for input '{name}' of type '{datatype}': its shape "
            f"needs {elements} values in {of}, it has {count}"
        )
    return data


def _numbers(datatype: str, data: Buffer) -> tuple[Buffer, int]:
    """In wire form, and how many they are."""
    known = DATATYPES[datatype]
    if known.dtype.kind == "f":
        count, left = divmod(len(data), known.size)
        if left:
            raise InvalidRequestError(f"{MALFORMED}a number in it ends too early")
        return data, count
    if datatype == "BOOL" and not bytes(data).translate(None, _TRUTH):
        return data, len(data)
    found: Any = varints(memoryview(data))
    found = (found != 0) if datatype == "BOOL" else found.astype(known.dtype)
    return (memoryview(found).cast("B") if len(found) else b""), len(found)


def varints(data: memoryview) -> Array:
    """All numbers of a packed field, uint64; those that were negative as their two's complement. Raises
    InvalidRequestError."""
    pieces: list[Array] = []
    at, end = 0, len(data)
    if end and data[-1] & 0x80:
        raise InvalidRequestError(f"{MALFORMED}a number in it ends too early")
    while at < end:
        stop = min(at + MOST_AT_ONCE, end)
        while data[stop - 1] & 0x80:  # not in the middle of one; the last byte of all ends one
            stop += 1
        pieces.append(_varints(np.frombuffer(data[at:stop], np.uint8)))
        at = stop
    return np.concatenate(pieces) if pieces else np.zeros(0, np.uint64)


def _varints(data: Array) -> Array:
    last = np.flatnonzero(data < 0x80)
    first = np.concatenate(([0], last[:-1] + 1))
    more = last - first
    longest = int(more.max())
    if longest >= LONGEST:
        raise InvalidRequestError(f"{MALFORMED}a number in it does not end")
    found = (data[first] & 0x7F).astype(np.uint64)
    for i in range(1, longest + 1):
        longer = np.flatnonzero(more >= i)
        part = (data[first[longer] + i] & 0x7F).astype(np.uint64)
        found[longer] |= part << np.uint64(7 * i)
    return found
