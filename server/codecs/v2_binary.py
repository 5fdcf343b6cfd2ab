"""KServe V2's infer bodies: a JSON header and, behind it, the bytes of binary tensors.

request    split → plan_of (in v2_plan) → assemble: tensors are views of the body
response   encode: a list of buffers; large tensors are handed on as they are, never joined
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import msgspec

from repository.errors import (
    InferenceFailedError,
    InvalidRequestError,
    InvalidTensorError,
)
from repository.messages import InferRequest, InferResponse, Parameters, TensorSpec
from repository.tensors import DATATYPES, LENGTH, Buffer, Shape, Tensor
from server.codecs.v2_json import to_json
from server.codecs.v2_plan import Plan

JOIN_BELOW = 64 * 1024  # bytes up to which one buffer is cheaper than several
MOST_READY = 16  # forms of answers to one form of request whose JSON is kept

_NO_BYTES = memoryview(b"")


# requests -----------------------------------------------------------------------------------------


def split(body: Buffer, header_length: bytes | None) -> tuple[bytes, memoryview]:
    """The JSON header and what follows. Without `header_length`, the value of
    Inference-Header-Content-Length, all is header. An empty header means a raw binary request."""
    if header_length is None:
        return bytes(body), _NO_BYTES
    if not header_length.isdigit() or len(header_length) > 18:
        raise InvalidRequestError(
            "Inference-Header-Content-Length must be the number of bytes of the request's JSON"
        )
    length = int(header_length)
    if length > len(body):
        raise InvalidRequestError(
            f"Inference-Header-Content-Length is {length}; the body has only {len(body)} bytes"
        )
    view = memoryview(body)
    return bytes(view[:length]), view[length:]


def assemble(plan: Plan, blobs: memoryview, model: str) -> InferRequest:
    """The request, its binary tensors being views of `blobs`, in the order of the inputs."""
    at, end = 0, len(blobs)
    inputs: list[Tensor] = []
    for name, datatype, shape, size, data in plan.pieces:
        if data is None:
            if size > end - at:
                raise InvalidRequestError(
                    f"unexpected size for input '{name}', expecting {size - (end - at)} additional "
                    f"bytes for model '{model}'"
                )
            data = blobs[at : at + size]
            at += size
        inputs.append(Tensor(name, datatype, shape, data))
    if at != end:
        raise InvalidRequestError(f"unexpected additional input data for model '{model}'")
    return InferRequest(inputs, plan.outputs, plan.id, plan.parameters, plan.form)


def raw_request(
    signature: Sequence[TensorSpec], body: memoryview, model: str, *, batched: bool
) -> InferRequest:
    """A body that is nothing but the data of the model's only input, as a batch of one.

    One dimension may be left open by the model; it follows from the body's length. A BYTES input
    takes the whole body as its one element.
    """
    if len(signature) != 1:
        raise InvalidTensorError(
            f"Raw request must only have 1 input (found 1) to be deduced but got {len(signature)} "
            f"inputs in '{model}' model configuration"
        )
    wanted = signature[0]
    shape = (1, *wanted.shape[1:]) if batched else wanted.shape
    size = DATATYPES[wanted.datatype].size
    if size == 0:
        if not all(d in (1, -1) for d in shape):
            raise InvalidTensorError(
                f"For BYTE datatype raw input '{wanted.name}', the model must have input shape [1]; "
                f"'{model}' has {list(wanted.shape)}"
            )
        shape = tuple(1 for _ in shape)
        data: Buffer = LENGTH.pack(len(body)) + body
    else:
        shape = _fill(wanted.name, shape, size, len(body))
        data = body
    return InferRequest([Tensor(wanted.name, wanted.datatype, shape, data)])


def _fill(name: str, shape: Shape, size: int, length: int) -> Shape:
    """`shape` with its -1, of which there may be one, made to fit `length` bytes."""
    fixed = math.prod(d for d in shape if d != -1) * size
    if shape.count(-1) > 1:
        raise InvalidTensorError(
            f"The shape of the raw input '{name}' can not be deduced because there are more than one "
            f"variable-sized dimension: {list(shape)}. Send a request with a JSON header"
        )
    if -1 in shape and fixed and length % fixed == 0:
        return tuple(length // fixed if d == -1 else d for d in shape)
    if -1 in shape or length != fixed:
        raise InvalidTensorError(
            f"input byte size mismatch for input '{name}'. Expected {fixed}"
            f"{' or a multiple' if -1 in shape else ''}, got {length}"
        )
    return shape


# responses ----------------------------------------------------------------------------------------


class _Sizes(msgspec.Struct, gc=False):
    binary_data_size: int


class _BinaryOutput(msgspec.Struct, gc=False):
    name: str
    datatype: str
    shape: Shape
    parameters: _Sizes


class _Region(msgspec.Struct, gc=False):
    shared_memory_region: str
    shared_memory_offset: int
    shared_memory_byte_size: int


class _GivenOutput(msgspec.Struct, gc=False):
    """Its bytes are in a client's shared memory."""

    name: str
    datatype: str
    shape: Shape
    parameters: _Region


class _JsonOutput(msgspec.Struct, gc=False):
    name: str
    datatype: str
    shape: Shape
    data: msgspec.Raw


class _Reply(msgspec.Struct, gc=False, kw_only=True, omit_defaults=True):
    id: str = ""
    model_name: str
    model_version: str
    parameters: Parameters = msgspec.field(default_factory=dict)
    outputs: list[Any]  # of _BinaryOutput, _GivenOutput and _JsonOutput


_ENCODE = msgspec.json.Encoder().encode


class Encoded(NamedTuple):
    """A body in pieces. `header_length`: bytes of JSON, None where all of it is. `coding`: what it is
    compressed with; the JSON had so many bytes before."""

    header_length: int | None
    buffers: list[Buffer]
    total: int  # bytes
    coding: str | None = None


def encode(plan: Plan, response: InferResponse, model: str, version: int) -> Encoded:
    """Raises InvalidRequestError for an output that cannot be told in the form asked for.

    With a plan and an answer whose forms are known, the JSON was written before.
    """
    asked, told = plan.form, response.form
    if asked is None or told is None:
        return _encode(plan, response, model, version)[0]
    ready: dict[Any, _Ready] | None = asked.reply
    if ready is None:
        ready = asked.reply = {}
    key = (told, model, version)
    known = ready.get(key)
    if known is None:
        encoded, known = _encode(plan, response, model, version)
        if known is not None:
            if len(ready) >= MOST_READY:
                ready.clear()
            ready[key] = known
        return encoded
    outputs = response.outputs
    return _joined(known, [outputs[i].data for i in known.picks])


class _Ready(NamedTuple):
    """The JSON of an answer that is all binary. `picks`: which outputs follow it, in order."""

    header: bytes
    picks: tuple[int, ...]
    total: int  # bytes


def _joined(ready: _Ready, blobs: list[Buffer]) -> Encoded:
    if not blobs:
        return Encoded(None, [ready.header], ready.total)
    buffers: list[Buffer] = [ready.header, *blobs]
    if ready.total <= JOIN_BELOW:
        buffers = [b"".join(buffers)]
    return Encoded(len(ready.header), buffers, ready.total)


def _encode(
    plan: Plan, response: InferResponse, model: str, version: int
) -> tuple[Encoded, _Ready | None]:
    """With what of it holds for every answer of that form; None: its JSON has the values in it."""
    outputs: list[_BinaryOutput | _GivenOutput | _JsonOutput] = []
    given = None if plan.extras is None else plan.extras.given
    blobs: list[Buffer] = []
    picks: list[int] = []
    total = 0
    for i, tensor in _asked(plan.outputs, response.outputs, model):
        name, datatype, shape = tensor.name, tensor.datatype, tensor.shape
        if given and name in given:
            region = _Region(given[name].region, given[name].offset, len(tensor.data))
            outputs.append(_GivenOutput(name, datatype, shape, region))
            continue
        if not plan.wants_binary(name):
            outputs.append(_JsonOutput(name, datatype, shape, to_json(tensor)))
            continue
        size = len(tensor.data)
        outputs.append(_BinaryOutput(name, datatype, shape, _Sizes(size)))
        if size:
            blobs.append(tensor.data)
            picks.append(i)
            total += size
    reply = _Reply(
        id=plan.id,
        model_name=model,
        model_version=str(version),
        parameters=response.parameters,
        outputs=outputs,
    )
    header = _ENCODE(reply)
    ready = _Ready(header, tuple(picks), len(header) + total)
    lasting = all(type(output) is _BinaryOutput for output in outputs)
    return _joined(ready, blobs), ready if lasting else None


def _asked(
    names: tuple[str, ...], outputs: list[Tensor], model: str
) -> Iterable[tuple[int, Tensor]]:
    """The outputs that were named, in that order, each with its place; all where none was."""
    if not names:
        return enumerate(outputs)
    by_name = {t.name: (i, t) for i, t in enumerate(outputs)}
    missing = [n for n in names if n not in by_name]
    if missing:
        raise InferenceFailedError(
            f"model '{model}' did not return the requested output '{missing[0]}'"
        )
    return [by_name[n] for n in names]
