"""Many requests as one, and one response as many, on wire bytes.

Row-major data lets the first axis be joined and cut by joining and slicing bytes, so nothing is
decoded here; only BYTES, whose elements vary in length, are walked to find where a row ends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

from repository.errors import InferenceFailedError, InvalidTensorError
from repository.messages import InferRequest, InferResponse
from repository.tensors import DATATYPES, Buffer, Tensor, skip_bytes

Group: TypeAlias = tuple[Any, ...]


def place(request: InferRequest, most: int) -> tuple[int, Group]:
    """How many rows it has, and its group: requests of equal groups may be merged.

    One whose inputs have no common first axis counts as `most`: it fills a batch of its own.
    """
    inputs = request.inputs
    rows = {tensor.shape[:1] for tensor in inputs}
    if len(rows) != 1 or rows == {()}:
        return most, ()
    group = [(tensor.name, tensor.datatype, tensor.shape[1:]) for tensor in inputs]
    return inputs[0].shape[0], (group, request.outputs, request.parameters)


def merge(requests: Sequence[InferRequest]) -> InferRequest:
    """All rows of requests of one group, in order. In wire form that is joining bytes."""
    first = requests[0]
    inputs = []
    for at, tensor in enumerate(first.inputs):
        parts = [request.inputs[at] for request in requests]
        rows = sum(part.shape[0] for part in parts)
        data = b"".join([part.data for part in parts])
        inputs.append(Tensor(tensor.name, tensor.datatype, (rows, *tensor.shape[1:]), data))
    return InferRequest(inputs, first.outputs, "", first.parameters)


def split(whole: InferResponse, rows: Sequence[int]) -> list[InferResponse]:
    """One response per request, without copying.

    Raises InferenceFailedError unless the first axis of every output is the sum of `rows`.
    """
    parts = [
        InferResponse([], dict(whole.parameters), compute_s=whole.compute_s)
        for _ in range(len(rows))
    ]
    for output in whole.outputs:
        ends = _ends(output, rows)
        data = memoryview(output.data)
        begin = 0
        for part, count, end in zip(parts, rows, ends, strict=True):
            shape = (count, *output.shape[1:])
            part.outputs.append(Tensor(output.name, output.datatype, shape, data[begin:end]))
            begin = end
    return parts


def _ends(output: Tensor, rows: Sequence[int]) -> list[int]:
    """Where each request's bytes end."""
    total, shape, data = sum(rows), output.shape, output.data
    if shape[:1] != (total,):
        raise InferenceFailedError(
            f"output '{output.name}' has shape {list(shape)} for a batch of {total}: the first "
            f"axis of every output must be the batch (max_batch_size: 0 ends batching)"
        )
    if output.datatype not in DATATYPES:
        raise InferenceFailedError(f"output '{output.name}' has no datatype '{output.datatype}'")
    per_row = math.prod(shape[1:])
    try:
        ends = _walk(data, rows, per_row, DATATYPES[output.datatype].size)
    except InvalidTensorError as error:
        raise InferenceFailedError(f"output '{output.name}': {error}") from error
    if ends[-1] != len(data):
        raise InferenceFailedError(
            f"output '{output.name}' has {len(data)} bytes; shape {list(shape)} needs {ends[-1]}"
        )
    return ends


def _walk(data: Buffer, rows: Sequence[int], per_row: int, size: int) -> list[int]:
    ends, at = [], 0
    for count in rows:
        many = count * per_row
        at = at + many * size if size else skip_bytes(data, at, many)
        ends.append(at)
    return ends
