"""The frames that a host and its worker exchange over one unix stream socket.

A frame is a header, metadata (msgpack) and raw tensor bytes, each padded to ALIGN so that tensors
lie aligned in the worker's page-aligned buffer:

    length u32 | meta u32 | id u64 | kind u8 | zeros to 32 || metadata, padded || blob, padded ...

`length` counts everything behind the header, `meta` the metadata without its padding. A request is
answered by a REPLY or ERROR of the same id, in the order in which requests came. Both sides refuse
a frame longer than LIMIT before they allocate anything for it. This module does no I/O.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from typing import Any

import msgspec

from repository.config import ModelConfig
from repository.errors import InvalidTensorError
from repository.messages import InferRequest, InferResponse, Loaded
from repository.tensors import Buffer, Tensor

LIMIT = 2**31  # bytes of one frame
ALIGN = 64
HEADER = struct.Struct("<IIQB15x")
HEADER_SIZE = HEADER.size
PADDING = tuple(b"\0" * n for n in range(ALIGN))
JOIN_BELOW = 64 * 1024  # parts smaller than this are cheaper to copy together than to send apart


class Kind(enum.IntEnum):
    PREPARE = 1  # LoadOrder -> Prepared
    LOAD = 2  # LoadOrder -> Loaded
    INFER = 3  # Asked + blobs -> Answered + blobs
    MEMORY = 4  # nothing -> dict[str, int]
    STOP = 5  # nothing -> the end of the stream
    REPLY = 6
    ERROR = 7  # Failure


class BrokenFrameError(Exception):
    """The other side does not keep to the protocol. The connection cannot be used any more."""


class LoadOrder(msgspec.Struct, array_like=True):
    """`backends.base.Order` and the backend's name. `snapshot`: a path that does not exist yet,
    where a private copy of the files may be made."""

    backend: str
    model: str
    version: int
    path: str
    model_file: str
    config: ModelConfig
    device: str
    threads: int
    instance: int
    snapshot: str = ""
    extra: dict[str, Any] = {}


class Prepared(msgspec.Struct, array_like=True):
    """`path`: where the model is to be loaded from."""

    path: str


class Part(msgspec.Struct, array_like=True, gc=False):
    name: str
    datatype: str
    shape: tuple[int, ...]
    size: int


class Asked(msgspec.Struct, array_like=True, gc=False):
    inputs: list[Part]
    outputs: tuple[str, ...]
    id: str
    parameters: dict[str, Any]


class Answered(msgspec.Struct, array_like=True, gc=False):
    outputs: list[Part]
    parameters: dict[str, Any]
    compute_s: float


encode = msgspec.msgpack.Encoder().encode
read_asked = msgspec.msgpack.Decoder(Asked).decode
read_answered = msgspec.msgpack.Decoder(Answered).decode
read_order = msgspec.msgpack.Decoder(LoadOrder).decode
read_prepared = msgspec.msgpack.Decoder(Prepared).decode
read_loaded = msgspec.msgpack.Decoder(Loaded).decode
read_sizes = msgspec.msgpack.Decoder(dict[str, int]).decode


def pack(kind: Kind, number: int, meta: bytes, blobs: Sequence[Buffer] = ()) -> list[Buffer]:
    """The frame as parts to be sent one after the other: small neighbours are joined, large blobs
    are not copied. Raises InvalidTensorError for a frame beyond LIMIT."""
    size = len(meta)
    gap = -size % ALIGN if blobs else 0
    length = size + gap
    small: list[Buffer] = [b"", meta, PADDING[gap]]
    parts: list[Buffer] = []
    for blob in blobs:
        n = len(blob)
        gap = -n % ALIGN
        length += n + gap
        if n < JOIN_BELOW:
            small += (blob, PADDING[gap])
        else:
            parts += (b"".join(small), blob)
            small = [PADDING[gap]]
    if length > LIMIT - HEADER_SIZE:
        raise InvalidTensorError(f"{length} bytes in one message; at most {LIMIT} are possible")
    header = HEADER.pack(length, size, number, kind)
    if not parts:
        small[0] = header
        return [b"".join(small)]
    parts[0] = header + bytes(parts[0])
    if any(small):
        parts.append(b"".join(small))
    return parts


def unpack(header: Buffer, at: int = 0) -> tuple[int, int, int, Kind]:
    """(length, meta, id, kind) of the header at `at`. Raises BrokenFrameError."""
    length, meta, number, kind = HEADER.unpack_from(header, at)
    if length > LIMIT - HEADER_SIZE or meta > length:
        raise BrokenFrameError(f"a frame of {length} bytes with {meta} bytes of metadata")
    try:
        return length, meta, number, Kind(kind)
    except ValueError:
        raise BrokenFrameError(f"a frame of kind {kind}") from None


def pack_infer(number: int, request: InferRequest) -> list[Buffer]:
    tensors = request.inputs
    parts = [Part(t.name, t.datatype, t.shape, len(t.data)) for t in tensors]
    asked = Asked(parts, request.outputs, request.id, request.parameters)
    return pack(Kind.INFER, number, encode(asked), [t.data for t in tensors])


def unpack_infer(payload: memoryview, meta: int) -> InferRequest:
    asked = read_asked(payload[:meta])
    return InferRequest(
        _tensors(asked.inputs, payload, meta), asked.outputs, asked.id, asked.parameters
    )


def pack_answer(number: int, response: InferResponse) -> list[Buffer]:
    tensors = response.outputs
    parts = [Part(t.name, t.datatype, t.shape, len(t.data)) for t in tensors]
    answered = Answered(parts, response.parameters, response.compute_s)
    return pack(Kind.REPLY, number, encode(answered), [t.data for t in tensors])


def unpack_answer(payload: memoryview, meta: int) -> InferResponse:
    answered = read_answered(payload[:meta])
    return InferResponse(
        _tensors(answered.outputs, payload, meta),
        answered.parameters,
        compute_s=answered.compute_s,
    )


def _tensors(parts: list[Part], payload: memoryview, meta: int) -> list[Tensor]:
    tensors: list[Tensor] = []
    at = meta + -meta % ALIGN
    for part in parts:
        end = at + part.size
        if part.size < 0 or end > len(payload):
            raise BrokenFrameError(f"tensor '{part.name}' ends behind its frame")
        tensors.append(Tensor(part.name, part.datatype, part.shape, payload[at:end]))
        at = end + -part.size % ALIGN
    return tensors
