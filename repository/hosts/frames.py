"""The frames that a host and its worker exchange over one unix stream socket.

A frame is a header, metadata (msgpack), places and raw tensor bytes, these padded to ALIGN so that
tensors lie aligned in the worker's page-aligned buffer:

    length u32 | meta u32 | id u64 | kind u8 | room u8 | places u16 | zeros u32 | compute f64
    || metadata | places | padding || blob, padded ...

`length` counts everything behind the header, `meta` the metadata alone. A request is answered by a
REPLY or ERROR of the same id, in the order in which requests came (but a GENERATE, which is answered
when its text has ended and whose pieces are told as they are written; and the requests of an ASK). Both
sides refuse a frame longer than LIMIT before they allocate anything for it. This module does no I/O.

The metadata of an INFER or its REPLY is all that a Form holds and nothing else, so that equal forms
are equal bytes, which are read once. What differs from one to the next stands in the header
(`compute`: the seconds inside the backend) and in the places.

Without places every tensor is one blob of the frame. With places each says where the next so many
bytes of the tensors are, in order: (INLINE, n): the next blob; (at, n): n bytes at `at` in the arena
(see `arena`). Several places may make up one tensor. With `room` the last place of an INFER is where
the answer's large outputs may be written.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import msgspec

from repository.adapters.orders import AdapterOrder, AdapterReport
from repository.config import ModelConfig
from repository.errors import InvalidTensorError
from repository.forms import Blank, Form
from repository.generate import Ended, GenerateRequest, Piece
from repository.messages import Loaded
from repository.tensors import ALIGN, Buffer, Shape

LIMIT = 2**31  # bytes of one frame
HEADER = struct.Struct("<IIQBBH4xd")
HEADER_SIZE = HEADER.size
PLACE = struct.Struct("<QQ")
INLINE = 2**64 - 1
MOST_PLACES = 2**16 - 1
PADDING = tuple(b"\0" * n for n in range(ALIGN))
JOIN_BELOW = 64 * 1024  # parts smaller than this are cheaper to copy together than to send apart
FIRST_CALL = 2**62  # ids that workers give begin here, so that they are never those of the front
JOINED_UP_TO = 256 * 1024  # bytes of a frame of small tensors
_LONGEST = LIMIT - HEADER_SIZE


class Kind(enum.IntEnum):
    PREPARE = 1  # LoadOrder -> Prepared
    LOAD = 2  # LoadOrder -> Loaded
    INFER = 3  # a form, places, blobs -> a form, places, blobs
    MEMORY = 4  # nothing -> device -> kind -> bytes
    STOP = 5  # nothing -> the end of the stream
    REPLY = 6
    ERROR = 7  # Failure
    GENERATE = 8  # GenerateRequest -> PIECES ..., Ended
    CANCEL = 9  # nothing; the id is that of a GENERATE. No answer of its own
    PIECES = 10  # what one step wrote: (id of a GENERATE, Piece) of several. No request asks for it
    ADAPT = 11  # list[AdapterOrder] -> list[AdapterReport]
    SLEEP = 12  # nothing -> nothing, once all that was begun before has ended
    WAKE = 13  # nothing -> nothing
    VALIDATE = 14  # LoadOrder -> nothing; in place of LOAD

    # Models that take several requests as they are (see `conversing`).
    ASK = 15  # list[(id of an INFER, the request's own id)]: these INFERs follow at once, as one group
    RETURNED = 16  # of an ASK: the model can take the next one
    ANSWER = 17  # as REPLY, of an INFER of a group; more may follow. REPLY is the last one
    END = 18  # of an INFER of a group: there are no more. So is ERROR
    READ = (
        19  # int: so many answers to the request (or, from a worker: to its call) have been taken
    )
    FREED = 20  # list[(id, which)]: what lay in the arena for it is used no more (see `Lot`)

    # What a model asks of the server; the ids are its worker's own, from FIRST_CALL on.
    CALL = 21  # CallOrder, blobs -> CALLED ..., CALL_END or CALL_ERROR
    CALLED = 22  # one answer, as REPLY; more may follow
    CALL_END = 23  # bool: what `is_ready` came to, else true
    CALL_ERROR = 24  # Failure
    LEAVE = 25  # nothing: the rest of the call is not wanted. CALL_END still comes
    MANAGE = 26  # ManageOrder -> CALL_END or CALL_ERROR

    IS_READY = 27  # nothing -> bool: what the model says of itself
    FIGURES = 28  # list[Figures]: what a model counts itself, all of it. No request asks for it


# Plain numbers: making a Kind of one costs more than reading the whole header.
INFER, STOP, REPLY, ERROR = int(Kind.INFER), int(Kind.STOP), int(Kind.REPLY), int(Kind.ERROR)
GENERATE, CANCEL, PIECES = int(Kind.GENERATE), int(Kind.CANCEL), int(Kind.PIECES)
SLEEP, ASK, RETURNED = int(Kind.SLEEP), int(Kind.ASK), int(Kind.RETURNED)
ANSWER, END, READ, FREED = int(Kind.ANSWER), int(Kind.END), int(Kind.READ), int(Kind.FREED)
CALL, CALLED, CALL_END = int(Kind.CALL), int(Kind.CALLED), int(Kind.CALL_END)
CALL_ERROR, LEAVE, MANAGE = int(Kind.CALL_ERROR), int(Kind.LEAVE), int(Kind.MANAGE)
FIGURES = int(Kind.FIGURES)


class BrokenFrameError(Exception):
    """The other side does not keep to the protocol. The connection cannot be used any more."""


# (length, meta, id, kind, room, places, compute), as in HEADER. A plain tuple: giving it names costs
# more than all the rest of reading a small frame.
Header: TypeAlias = tuple[int, int, int, int, int, int, float]


class LoadOrder(msgspec.Struct, array_like=True):
    """`backends.base.Order` and the backend's name. `snapshot`: a path that does not exist yet,
    where a private copy of the files may be made; `private`: `path` is it."""

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
    private: bool = False
    extra: dict[str, Any] = {}


class Prepared(msgspec.Struct, array_like=True):
    """`path`: where the model is to be loaded from."""

    path: str


# What was sent through the arena: (id of an INFER, 0), or (-id of a CALL, n) for the n-th answer to it.
Lot: TypeAlias = tuple[int, int]


class CallOrder(msgspec.Struct, array_like=True):
    """`blanks` and what follows: the request. `blocks`: nothing else of this instance runs before it is
    answered, for the model's own thread waits for it."""

    model: str
    version: int | None
    blocks: bool
    id: str
    blanks: list[Blank]
    outputs: tuple[str, ...] = ()
    parameters: dict[str, Any] = {}


class ManageOrder(msgspec.Struct, array_like=True):
    """`config`: what overrides the folder's, as JSON, and `files`: path -> content, in place of the
    folder's; both only to load. `dependents`: of an ensemble, also the models that only it needs; only
    to unload."""

    what: Literal["load", "unload", "is_ready"]
    model: str
    version: int | None = None
    config: str | None = None
    files: dict[str, bytes] = {}
    dependents: bool = False


class _Stated(msgspec.Struct, array_like=True, gc=False):
    """A form in metadata."""

    blanks: list[Blank]
    outputs: tuple[str, ...]
    parameters: dict[str, Any]


encode = msgspec.msgpack.Encoder().encode
read_order = msgspec.msgpack.Decoder(LoadOrder).decode
read_prepared = msgspec.msgpack.Decoder(Prepared).decode
read_loaded = msgspec.msgpack.Decoder(Loaded).decode
read_memory = msgspec.msgpack.Decoder(dict[str, dict[str, int]]).decode
read_generate = msgspec.msgpack.Decoder(GenerateRequest).decode
read_pieces = msgspec.msgpack.Decoder(list[tuple[int, Piece]]).decode
read_ended = msgspec.msgpack.Decoder(Ended).decode
read_orders = msgspec.msgpack.Decoder(list[AdapterOrder]).decode
read_reports = msgspec.msgpack.Decoder(list[AdapterReport]).decode
read_group = msgspec.msgpack.Decoder(list[tuple[int, str]]).decode
read_count = msgspec.msgpack.Decoder(int).decode
read_freed = msgspec.msgpack.Decoder(list[Lot]).decode
read_call = msgspec.msgpack.Decoder(CallOrder).decode
read_manage = msgspec.msgpack.Decoder(ManageOrder).decode
read_verdict = msgspec.msgpack.Decoder(bool).decode
read_nothing = msgspec.msgpack.Decoder(None).decode
_read_stated = msgspec.msgpack.Decoder(_Stated).decode


def state(
    blanks: Sequence[tuple[str, str, Shape, int]],
    outputs: Sequence[str] = (),
    parameters: dict[str, Any] | None = None,
) -> bytes:
    """A form as metadata."""
    return encode((blanks, outputs, parameters or {}))


class Written:
    """A form as it is written: all of its frames but their numbers and the tensors' bytes."""

    __slots__ = ("_head", "_length", "_pads", "largest", "meta")

    def __init__(self, meta: bytes, sizes: Sequence[int]) -> None:
        self.meta = meta
        self.largest = max(sizes, default=0)
        self._head = meta + (PADDING[-len(meta) % ALIGN] if sizes else b"")
        self._pads = [PADDING[-size % ALIGN] for size in sizes]
        self._length = len(self._head) + sum(size + -size % ALIGN for size in sizes)

    def frame(
        self, kind: int, number: int, blobs: Sequence[Buffer], compute_s: float = 0.0
    ) -> list[Buffer]:
        """As `pack` without places. For small tensors: everything is joined."""
        length = self._length
        if length > JOINED_UP_TO:
            return pack(kind, number, self.meta, blobs, compute_s=compute_s)
        header = HEADER.pack(length, len(self.meta), number, kind, 0, 0, compute_s)
        pieces: list[Buffer] = [header, self._head]
        for blob, pad in zip(blobs, self._pads, strict=True):
            pieces += (blob, pad)
        whole = b"".join(pieces)
        if len(whole) != HEADER_SIZE + length:  # the stream would never recover from it
            raise InvalidTensorError("a tensor is not as long as its form says")
        return [whole]


class Read(NamedTuple):
    """A form as it was read. `spans`: where the blobs of a frame without places are behind its
    header, `end`: how long it is at least."""

    form: Form
    sizes: tuple[int, ...]
    spans: tuple[slice, ...]
    end: int


class Forms(dict[bytes, Read]):
    """Forms by the metadata that states them: each is read once, as long as they are not too many.
    A long one is not remembered: a client may say as much in its parameters as it likes.
    Looking one up raises BrokenFrameError, msgspec.MsgspecError."""

    MOST = 256
    LONGEST = 8192  # bytes of metadata

    def __missing__(self, meta: bytes) -> Read:
        stated = _read_stated(meta)
        sizes = tuple(blank.size for blank in stated.blanks)
        if min(sizes, default=0) < 0:
            raise BrokenFrameError("a tensor of less than nothing")
        at = len(meta) + -len(meta) % ALIGN
        spans = []
        for size in sizes:
            spans.append(slice(at, at + size))
            at += size + -size % ALIGN
        end = spans[-1].stop if spans else 0
        form = Form(stated.blanks, stated.outputs, stated.parameters)
        found = Read(form, sizes, tuple(spans), end)
        if len(meta) <= self.LONGEST:
            if len(self) >= self.MOST:
                self.clear()
            self[meta] = found
        return found


def pack(
    kind: int,
    number: int,
    meta: bytes,
    blobs: Sequence[Buffer] = (),
    *,
    places: bytes = b"",
    room: bool = False,
    compute_s: float = 0.0,
) -> list[Buffer]:
    """The frame as parts to be sent one after the other: small neighbours are joined, large blobs
    are not copied. Raises InvalidTensorError for a frame beyond LIMIT."""
    length = len(meta) + len(places)
    gap = -length % ALIGN if blobs else 0
    length += gap
    small: list[Buffer] = [b"", meta, places, PADDING[gap]]
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
    if length > _LONGEST:
        raise InvalidTensorError(f"{length} bytes in one message; at most {LIMIT} are possible")
    header = HEADER.pack(
        length, len(meta), number, kind, room, len(places) // PLACE.size, compute_s
    )
    if not parts:
        small[0] = header
        return [b"".join(small)]
    parts[0] = header + bytes(parts[0])
    if any(small):
        parts.append(b"".join(small))
    return parts


def unpack(header: Buffer, at: int = 0) -> Header:
    """The header at `at`; of any kind. Raises BrokenFrameError."""
    found = cast("Header", HEADER.unpack_from(header, at))
    length = found[0]
    if length > _LONGEST or found[1] + found[5] * PLACE.size > length:
        raise BrokenFrameError(f"a frame of {length} bytes with {found[1]} bytes of metadata")
    return found


def blobs_of(payload: memoryview, read: Read) -> list[memoryview]:
    """The tensors' bytes in a frame without places. Raises BrokenFrameError."""
    _, _, spans, end = read
    if end > len(payload):
        raise BrokenFrameError("a tensor ends behind its frame")
    return [payload[span] for span in spans]


def blobs_behind(payload: memoryview, meta: int, sizes: Sequence[int]) -> list[memoryview]:
    """As `blobs_of`, behind any metadata. Raises BrokenFrameError."""
    at, found = meta + -meta % ALIGN, []
    for size in sizes:
        if size < 0 or (at + size > len(payload) and size):
            raise BrokenFrameError("a tensor ends behind its frame, or before it begins")
        found.append(payload[at : at + size])
        at += size + -size % ALIGN
    return found


def places_of(
    payload: memoryview, meta: int, count: int
) -> tuple[list[tuple[int, int]], list[memoryview]]:
    """The places of a frame, and its blobs. Raises BrokenFrameError."""
    at = meta + count * PLACE.size
    places: list[tuple[int, int]] = list(PLACE.iter_unpack(payload[meta:at]))
    at += -at % ALIGN
    blobs, end = [], 0
    for size in [size for where, size in places if where == INLINE]:
        end = at + size
        blobs.append(payload[at:end])
        at = end + -size % ALIGN
    if end > len(payload):
        raise BrokenFrameError("a tensor ends behind its frame")
    return places, blobs
