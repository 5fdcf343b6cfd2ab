"""What a scribe and the server hand each other: shared memory with bytes in it, a *sheet*.

    sheet     what is told of the bytes (msgpack), then the bytes: parts, each from a multiple of ALIGN
    message   its kind and how long what is told is; one packet, with the sheet's file descriptor

A sheet has no name in any file system and is gone with the last process that holds it open or mapped.
It is written by one side, once, before the other sees it. Nothing here knows who asks whom.
"""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from repository.errors import InferenceFailedError, InvalidRequestError, InvalidTensorError
from repository.forms import Blank
from repository.messages import Parameters
from repository.tensors import ALIGN, Buffer, Shape
from server.codecs.v2_plan import Extras, Piece, Plan
from server.refusals import MiscountError, UnsupportedError

PACKET = 64  # bytes; more than any message has
MOST_TOLD = 256 * 1024  # bytes that a request says besides its data: the server's loop reads them
LONGEST_TEXT = 64 * 1024  # characters of an error; clients are shown less

ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (
        InferenceFailedError,
        InvalidRequestError,
        InvalidTensorError,
        MiscountError,
        UnsupportedError,
    )
}


class Message(msgspec.Struct, array_like=True):
    """`kind` READ and WRITE go to a scribe; PLAN, JSON and ERROR come back."""

    kind: str
    told: int


READ, WRITE, PLAN, JSON, ERROR = "read", "write", "plan", "json", "error"


class ToldPiece(NamedTuple):
    """A Piece without its bytes. `brought`: how many there are, -1 where they follow the JSON."""

    name: str
    datatype: str
    shape: Shape
    size: int
    brought: int


class ToldPlan(msgspec.Struct, array_like=True):
    pieces: list[ToldPiece]
    outputs: tuple[str, ...]
    binary: frozenset[str]
    rest_binary: bool
    id: str
    parameters: Parameters
    extras: Extras | None = None


class ToldAnswer(msgspec.Struct, array_like=True):
    """Of an answer all but its bytes, and of its plan what concerns answers. For a tensor that does
    not become JSON the sheet has a hole, which takes no memory and reads as zeros."""

    plan: ToldPlan
    tensors: list[Blank]
    parameters: Parameters
    model: str
    version: int


class ToldError(msgspec.Struct, array_like=True):
    kind: str
    text: str


tell = msgspec.msgpack.Encoder().encode
read_message = msgspec.msgpack.Decoder(Message).decode
read_plan = msgspec.msgpack.Decoder(ToldPlan).decode
read_answer = msgspec.msgpack.Decoder(ToldAnswer).decode
read_error = msgspec.msgpack.Decoder(ToldError).decode


def told_of(plan: Plan) -> ToldPlan:
    pieces = [
        ToldPiece(p.name, p.datatype, p.shape, p.size, -1 if p.data is None else len(p.data))
        for p in plan.pieces
    ]
    return ToldPlan(
        pieces, plan.outputs, plan.binary, plan.rest_binary, plan.id, plan.parameters, plan.extras
    )


def plan_of(told: ToldPlan, parts: Sequence[Buffer]) -> Plan:
    """`parts`: the bytes of the pieces that brought some."""
    left = iter(parts)
    pieces = [
        Piece(name, datatype, shape, size, None if brought < 0 else next(left))
        for name, datatype, shape, size, brought in told.pieces
    ]
    return Plan(
        tuple(pieces),
        told.outputs,
        told.binary,
        told.rest_binary,
        told.id,
        told.parameters,
        extras=told.extras,
    )


# the bytes ----------------------------------------------------------------------------------------


def write(told: bytes, parts: Sequence[Buffer | int]) -> int:
    """A new sheet's file descriptor, the caller's to close. An int is a hole of so many bytes.

    Large parts are copied by the kernel while other threads run. Raises OSError.
    """
    sheet = os.memfd_create("modeldepot-sheet", os.MFD_CLOEXEC)
    try:
        sizes = [part if isinstance(part, int) else len(part) for part in parts]
        places, end = _places(len(told), sizes)
        os.ftruncate(sheet, end)
        _put(sheet, told, 0)
        for at, part in zip(places, parts, strict=True):
            if not isinstance(part, int):
                _put(sheet, part, at)
    except BaseException:
        os.close(sheet)
        raise
    return sheet


def _places(told: int, sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where each part begins, and where the sheet ends."""
    places = []
    end = told
    for size in sizes:
        at = end + -end % ALIGN
        places.append(at)
        end = at + size
    return places, end


def _put(sheet: int, data: Buffer, at: int) -> None:
    left = memoryview(data)
    while left:
        done = os.pwrite(sheet, left, at)
        left, at = left[done:], at + done


class Sheet:
    """One that somebody else wrote, mapped, read only. Takes over the file descriptor.

    Whoever keeps a part keeps the memory of all."""

    def __init__(self, fd: int, told: int) -> None:
        try:
            size = os.fstat(fd).st_size
            # An empty file cannot be mapped.
            self._all = memoryview(mmap.mmap(fd, size, prot=mmap.PROT_READ) if size else b"")
        finally:
            os.close(fd)
        self._told = told

    @property
    def told(self) -> memoryview:
        return self._all[: self._told]

    @property
    def rest(self) -> memoryview:
        """The only part."""
        (at,), _ = _places(self._told, [0])
        return self._all[at:]

    def parts(self, sizes: Sequence[int]) -> list[memoryview]:
        places, _ = _places(self._told, sizes)
        return [self._all[at : at + size] for at, size in zip(places, sizes, strict=True)]


# the socket ---------------------------------------------------------------------------------------


def send(sock: socket.socket, kind: str, told: int, fd: int) -> None:
    """Raises OSError."""
    socket.send_fds(sock, [tell(Message(kind, told))], [fd])


def receive(sock: socket.socket) -> tuple[str, Sheet] | None:
    """None: the other side is gone. Raises OSError, among them BlockingIOError."""
    data, fds, _, _ = socket.recv_fds(sock, PACKET, 1)
    if not data:
        return None
    message: Any = read_message(data)
    return message.kind, Sheet(fds[0], message.told)
