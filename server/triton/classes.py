"""Triton's classification extension: in place of an output, its highest values and what they stand for.

An element of the answer is "VALUE:INDEX", and ":LABEL" where the index has one; highest first, and of
equal values the lowest index first. Floats have six decimals and integers none, as std::to_string
writes them. NaN comes last. Nothing here knows requests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from repository.errors import InvalidRequestError
from repository.tensors import LENGTH, Array, Tensor

NOT_NUMBERS = ("BYTES", "BOOL")


def check_classes(datatype: str) -> None:
    """Raises InvalidRequestError for a datatype whose values are no scores."""
    if datatype in NOT_NUMBERS:
        raise InvalidRequestError(
            f"class result not available for output due to unsupported type '{datatype}'"
        )


def classified(tensor: Tensor, n: int, labels: Sequence[str], *, batched: bool) -> Tensor:
    """The `n` highest of each row of the first axis where it is `batched`, else of all: BYTES, shape
    [rows, k] or [k], where k is the smaller of `n` and the number of values.

    Raises InvalidRequestError.
    """
    check_classes(tensor.datatype)
    values = tensor.array()
    if tensor.datatype == "BF16":  # its bits, the upper half of a float's
        values = (values.astype(np.uint32) << 16).view(np.float32)
    axis = values.shape[:1] if batched else ()
    rows = values.reshape(math.prod(axis), math.prod(values.shape[len(axis) :]))
    kept = min(n, rows.shape[1])
    parts: list[bytes] = []
    for row in rows:
        for index, text in _told(row, kept):
            label = f":{labels[index]}" if index < len(labels) and labels[index] else ""
            raw = f"{text}:{index}{label}".encode()
            parts += (LENGTH.pack(len(raw)), raw)
    shape = (*axis, kept)
    return Tensor(tensor.name, "BYTES", shape, b"".join(parts))


def _told(row: Array, n: int) -> list[tuple[int, str]]:
    places = highest(row, n)
    form = "%f" if row.dtype.kind == "f" else "%d"
    return [
        (index, form % value) for index, value in zip(places, row[places].tolist(), strict=True)
    ]


def highest(values: Array, n: int) -> list[int]:
    """Where the `n` highest are, in order. Only these are sorted, whatever there is besides."""
    size = len(values)
    if values.dtype.kind == "f":
        values = np.where(np.isnan(values), -np.inf, values)
    if not n:
        return []
    if n < size:
        least = np.partition(values, size - n)[size - n]
        above = np.flatnonzero(values > least)
        places = np.concatenate([above, np.flatnonzero(values == least)[: n - len(above)]])
    else:
        places = np.arange(size)
    # Turned around twice: a stable sort that descends.
    order = np.argsort(values[places][::-1], kind="stable")[::-1]
    found: list[int] = places[len(places) - 1 - order].tolist()
    return found
