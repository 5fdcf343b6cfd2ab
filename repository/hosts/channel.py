"""The front's end of the socket to one worker.

Requests are written at once and answered by futures, found again by their number; there is no task
per request. Answers are read straight into the memory that they stay in: a small one is cut out of
a scratch buffer, a large one gets a buffer of its own size, which nobody joins or copies again.
Nothing here bounds how much is in flight (the batcher does) and nothing decides what a lost
connection means (the host does, which also learns how the process ended).
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

import msgspec
import numpy as np

from repository.errors import InvalidRequestError, RepositoryError, WorkerDiedError
from repository.hosts import failures, frames
from repository.hosts.frames import HEADER_SIZE, BrokenFrameError, Kind
from repository.messages import InferRequest, InferResponse
from repository.tensors import Buffer

SCRATCH = 64 * 1024
SOCKET_BUFFER = 1 << 20
Read: TypeAlias = Callable[[memoryview, int], Any]
_read_failure = msgspec.msgpack.Decoder(failures.Failure).decode


class Channel(asyncio.BufferedProtocol):
    """`on_lost(why)` is called once: the other end closed, or broke the protocol ("" if it closed).

    Futures in flight stay unanswered until `fail` is called with the reason.
    """

    def __init__(self, on_lost: Callable[[str], None]) -> None:
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._waiting: dict[int, tuple[asyncio.Future[Any], Read]] = {}
        self._number = 0
        self._scratch = memoryview(bytearray(SCRATCH))
        self._large: memoryview | None = None
        self._have = 0
        self._failure = ""
        self._lost = False

    @classmethod
    async def open(cls, sock: socket.socket, on_lost: Callable[[str], None]) -> Channel:
        """Takes over `sock`."""
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER)
        loop = asyncio.get_running_loop()
        _, made = await loop.create_unix_connection(lambda: cls(on_lost), sock=sock)
        return made

    # asking -------------------------------------------------------------------------------------

    @property
    def pending(self) -> int:
        """Requests without an answer, abandoned ones too: the worker is still busy with them."""
        return len(self._waiting)

    def infer(self, request: InferRequest) -> asyncio.Future[InferResponse]:
        self._number = number = self._number + 1
        try:
            parts = frames.pack_infer(number, request)
        except RepositoryError as error:
            return self._failed(error)
        except (TypeError, ValueError, OverflowError) as error:
            return self._failed(InvalidRequestError(f"the request cannot travel: {error}"))
        return self._send(number, parts, frames.unpack_answer)

    def ask(self, kind: Kind, body: Any, read: Callable[[memoryview], Any]) -> asyncio.Future[Any]:
        self._number = number = self._number + 1
        parts = frames.pack(kind, number, frames.encode(body))
        return self._send(number, parts, lambda payload, meta: read(payload[:meta]))

    def stop(self) -> None:
        """Tells the worker to unload and exit after what was asked before."""
        self._write(frames.pack(Kind.STOP, 0, b""))

    def _send(self, number: int, parts: Sequence[Buffer], read: Read) -> asyncio.Future[Any]:
        if self._failure:
            return self._failed(WorkerDiedError(self._failure))
        future: asyncio.Future[Any] = self._loop.create_future()
        self._waiting[number] = (future, read)
        self._write(parts)
        return future

    def _write(self, parts: Sequence[Buffer]) -> None:
        # Into a connection that is lost and not yet explained nothing goes: `fail` will answer.
        if self._transport is not None and not self._lost:
            for part in parts:
                self._transport.write(part)

    def _failed(self, error: RepositoryError) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = self._loop.create_future()
        future.set_exception(error)
        return future

    # ending -------------------------------------------------------------------------------------

    def fail(self, why: str) -> None:
        """Answers everything in flight, and everything asked from now on, with WorkerDiedError."""
        self._failure = why
        waiting, self._waiting = self._waiting, {}
        for future, _ in waiting.values():
            if not future.done():
                future.set_exception(WorkerDiedError(why))
        self.close()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # asyncio.BufferedProtocol -------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        # An ended generation is kept for people to read; its buffers need not be.
        self._large = None
        self._scratch = memoryview(b"")
        self._lose("")

    def get_buffer(self, sizehint: int) -> memoryview:
        whole = self._scratch if self._large is None else self._large
        return whole[self._have :]

    def buffer_updated(self, nbytes: int) -> None:
        self._have += nbytes
        try:
            if self._large is None:
                self._cut()
            elif self._have == len(self._large):
                whole, self._large, self._have = self._large, None, 0
                _, meta, number, kind = frames.unpack(whole)
                self._answer(kind, number, whole[HEADER_SIZE:], meta)
        except (BrokenFrameError, msgspec.MsgspecError) as error:
            self._lose(f"it broke the protocol: {error}")
            self.close()

    def _cut(self) -> None:
        """Takes whole frames out of the scratch buffer."""
        scratch, at, have = self._scratch, 0, self._have
        while have - at >= HEADER_SIZE:
            length, meta, number, kind = frames.unpack(scratch, at)
            end = at + HEADER_SIZE + length
            if end > have:
                break
            payload = memoryview(bytes(scratch[at + HEADER_SIZE : end]))
            at = end
            self._answer(kind, number, payload, meta)
        rest = have - at
        if rest >= HEADER_SIZE:
            total = HEADER_SIZE + frames.unpack(scratch, at)[0]
            if total > SCRATCH:
                # np.empty leaves the pages untouched; a bytearray would write them all once more.
                self._large = np.empty(total, dtype=np.uint8).data
                self._large[:rest] = scratch[at:have]
                self._have = rest
                return
        if at and rest:
            scratch[:rest] = bytes(scratch[at:have])
        self._have = rest

    def _answer(self, kind: Kind, number: int, payload: memoryview, meta: int) -> None:
        waited = self._waiting.pop(number, None)
        if waited is None:
            raise BrokenFrameError(f"an answer to number {number}, which nobody asked")
        future, read = waited
        try:
            if kind is Kind.REPLY:
                answer = read(payload, meta)
            elif kind is Kind.ERROR:
                answer = failures.from_wire(_read_failure(payload[:meta]))
            else:
                raise BrokenFrameError(f"an answer of kind {kind.name}")
        except (BrokenFrameError, msgspec.MsgspecError):
            self._waiting[number] = waited
            raise
        if future.done():
            return
        if isinstance(answer, RepositoryError):
            future.set_exception(answer)
        else:
            future.set_result(answer)

    def _lose(self, why: str) -> None:
        if not self._lost:
            self._lost = True
            self._on_lost(why)
