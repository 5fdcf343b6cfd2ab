"""Many requests as one, and one response as many, on wire bytes.

Row-major data lets the first axis be joined and cut by joining and slicing bytes, so nothing is
decoded here; only BYTES, whose elements vary in length, are walked to find where a row ends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from repository.errors import InferenceFailedError, InvalidTensorError
from repository.forms import Form, Group, form_of
from repository.messages import InferRequest, InferResponse
from repository.tensors import DATATYPES, Buffer, Tensor, skip_bytes

JOIN_BELOW = 64 * 1024  # bytes of a merged tensor that are cheaper to join than to send apart


def place(request: InferRequest, most: int) -> tuple[int, Group]:
    """How many rows it has, and its group: requests of equal groups may be merged.

    One whose inputs have no common first axis counts as `most`: it fills a batch of its own.
    """
    form = request.form or form_of(request.inputs, request.outputs, request.parameters)
    if form.rows is None or form.group is None:
        return most, ()
    return form.rows, form.group


def merge(requests: Sequence[InferRequest]) -> InferRequest:
    """All rows of requests of one group, in order. In wire form that is joining bytes: done here for
    a tensor of up to JOIN_BELOW bytes; a longer one's data is a list of buffers, for the host to lay
    them one behind the other where the model reads them."""
    first = requests[0]
    inputs = []
    rows = 0
    for at, tensor in enumerate(first.inputs):
        parts = [request.inputs[at] for request in requests]
        rows = sum([part.shape[0] for part in parts])
        buffers: list[Buffer] = [part.data for part in parts]
        data: Any = buffers
        if sum(map(len, buffers)) <= JOIN_BELOW:
            data = b"".join(buffers)
        inputs.append(Tensor(tensor.name, tensor.datatype, (rows, *tensor.shape[1:]), data))
    form = first.form
    if form is not None:
        form = form.resized(rows) if form.fixed and form.rows else None
    return InferRequest(inputs, first.outputs, "", first.parameters, form)


def split(whole: InferResponse, rows: Sequence[int]) -> list[InferResponse]:
    """One response per request, without copying.

    Raises InferenceFailedError unless the first axis of every output is the sum of `rows`.
    """
    form = whole.form
    if form is not None and form.fixed and form.rows and form.rows == sum(rows):
        parts = _cut(whole, form, rows)
        if parts:
            return parts
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


def _cut(whole: InferResponse, form: Form, rows: Sequence[int]) -> list[InferResponse]:
    """As `split`, where the form says all that is to be known; nothing if it does not fit the bytes."""
    views = [memoryview(output.data) for output in whole.outputs]
    at = [0] * len(views)
    parts = []
    for count in rows:
        mine = form.resized(count)
        outputs = []
        for i, (name, datatype, shape, size) in enumerate(mine.blanks):
            begin = at[i]
            at[i] = end = begin + size
            outputs.append(Tensor(name, datatype, shape, views[i][begin:end]))
        parts.append(InferResponse(outputs, whole.parameters, compute_s=whole.compute_s, form=mine))
    return parts if at == [len(view) for view in views] else []


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
