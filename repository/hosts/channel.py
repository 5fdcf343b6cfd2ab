"""The front's end of the socket to one worker.

Requests are answered by futures, found again by their number; there is no task per request. One is
written at once if the worker has nothing else to do, else together with the others of the same
iteration of the loop: waking a process costs more than all the rest. What a request has in the arena
is kept until it is answered, also if nobody waits for the answer any more: the worker still reads it.
The pieces of a text are told to whoever asked for it by a plain call.
Answers are read straight into the memory that they stay in: a small one is cut out of a scratch
buffer, a large one gets a buffer of its own size, which nobody joins or copies again.
Nothing here bounds how much is in flight (the batcher does) and nothing decides what a lost
connection means (the host does, which also learns how the process ended). Models that take requests as
they are, and ask other models, are `groups`' and `calls`' business.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias, cast

import msgspec
import numpy as np

from repository import figures
from repository.calling import Caller
from repository.errors import InvalidRequestError, RepositoryError, WorkerDiedError
from repository.generate import Ended, GenerateRequest, Piece
from repository.hosts import failures, frames
from repository.hosts.asking import Asking, Question
from repository.hosts.calls import Calls, Waits
from repository.hosts.frames import (
    ERROR,
    FIGURES,
    HEADER_SIZE,
    PIECES,
    REPLY,
    BrokenFrameError,
    Header,
    Kind,
)
from repository.hosts.groups import Groups
from repository.messages import InferRequest, InferResponse
from repository.prompt import Prompt
from repository.responding import Responses
from repository.tensors import Buffer

SCRATCH = 64 * 1024
SOCKET_BUFFER = 1 << 20
_read_failure = msgspec.msgpack.Decoder(failures.Failure).decode


class Telling:
    """What a generation was asked with: turns its last word into Ended."""

    __slots__ = ("tell",)

    def __init__(self, tell: Callable[[Piece], None]) -> None:
        self.tell = tell

    def __call__(self, payload: memoryview) -> Ended:
        return frames.read_ended(payload)


class Text(Prompt[Ended]):
    """A generation's last word. Its worker hears of it when it is cancelled."""

    __slots__ = ("leave",)

    leave: Callable[[], None]

    def cancel(self, msg: Any | None = None) -> bool:
        cancelled = super().cancel(msg)
        if cancelled:
            self.leave()
        return cancelled


# A future, and what turns its answer into what was asked: the question of an inference, or a function.
# A plain tuple, for the same reason as `frames.Header`.
_Waiting: TypeAlias = tuple[asyncio.Future[Any], Question | Callable[[memoryview], Any]]


class Channel(asyncio.BufferedProtocol):
    """`on_lost(why)` is called once: the other end closed, or broke the protocol ("" if it closed).

    Futures in flight stay unanswered until `fail` is called with the reason.

    figures   what its model counts itself, as it told it last; nobody has looked at it yet
    """

    def __init__(self, on_lost: Callable[[str], None], asking: Asking) -> None:
        self._on_lost = on_lost
        self._asking = asking
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._waiting: dict[int, _Waiting] = {}
        self._number = 0
        self._unsent: list[Buffer] = []
        self._scratch = np.empty(SCRATCH, np.uint8).data  # no memory before something comes
        self._large: memoryview | None = None
        self._have = 0
        self._failure = ""
        self._lost = False
        self._groups = Groups(asking, self._next, self._write)
        self._under_way = self._groups.under_way
        self._calls: Calls | None = None
        self.figures = b""

    @classmethod
    async def open(
        cls,
        sock: socket.socket,
        on_lost: Callable[[str], None],
        asking: Asking,
        caller: Caller | None,
        host: Waits,
    ) -> Channel:
        """Takes over `sock`. `caller`: whom its model asks for other models."""
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER)
        loop = asyncio.get_running_loop()
        _, made = await loop.create_unix_connection(lambda: cls(on_lost, asking), sock=sock)
        made._calls = Calls(caller, asking, host, made._write, made._groups.keep)
        return made

    # asking -------------------------------------------------------------------------------------

    @property
    def pending(self) -> int:
        """Requests without an answer, abandoned ones too: the worker is still busy with them. A group
        that it takes as it is counts once."""
        return len(self._waiting) + len(self._under_way)

    def _next(self) -> int:
        self._number += 1
        return self._number

    def converse(self, requests: Sequence[Responses]) -> asyncio.Future[None]:
        """As `Host.ask`."""
        return self._groups.ask(requests)

    def infer(self, request: InferRequest) -> asyncio.Future[InferResponse]:
        self._number = number = self._number + 1
        try:
            parts, question = self._asking.pack(number, request)
        except RepositoryError as error:
            return self._failed(error)
        except (TypeError, ValueError, OverflowError) as error:
            return self._failed(InvalidRequestError(f"the request cannot travel: {error}"))
        return self._send(number, parts, question)

    def generate(
        self, request: GenerateRequest, tell: Callable[[Piece], None]
    ) -> asyncio.Future[Ended]:
        """Cancelled, it stays in `pending` until the worker has said its last word of it."""
        self._number = number = self._number + 1
        try:
            parts = frames.pack(Kind.GENERATE, number, frames.encode(request))
        except RepositoryError as error:
            return self._failed(error)
        except (TypeError, ValueError, OverflowError) as error:
            return self._failed(InvalidRequestError(f"the request cannot travel: {error}"))
        if self._failure:
            return self._failed(WorkerDiedError(self._failure))
        text = Text(loop=self._loop)
        text.listener = None
        text.leave = partial(self._leave, number)
        self._waiting[number] = text, Telling(tell)
        self._write(parts)
        return text

    def _leave(self, number: int) -> None:
        if number in self._waiting:
            self._write(frames.pack(Kind.CANCEL, number, b""))

    def ask(self, kind: Kind, body: Any, read: Callable[[memoryview], Any]) -> asyncio.Future[Any]:
        self._number = number = self._number + 1
        return self._send(number, frames.pack(kind, number, frames.encode(body)), read)

    def stop(self) -> None:
        """Tells the worker to unload and exit after what was asked before."""
        self._write(frames.pack(Kind.STOP, 0, b""))

    def _send(
        self,
        number: int,
        parts: Sequence[Buffer],
        asked: Question | Callable[[memoryview], Any],
    ) -> asyncio.Future[Any]:
        if self._failure:
            return self._failed(WorkerDiedError(self._failure))
        future: Prompt[Any] = Prompt(loop=self._loop)
        future.listener = None
        self._waiting[number] = future, asked
        self._write(parts)
        return future

    def _write(self, parts: Sequence[Buffer]) -> None:
        if len(parts) == 1 and len(self._waiting) + len(self._under_way) > 1:
            if not self._unsent:
                self._loop.call_soon(self._flush)
            self._unsent.append(parts[0])
            return
        self._flush()
        # Into a connection that is lost and not yet explained nothing goes: `fail` will answer.
        if self._transport is not None and not self._lost:
            for part in parts:
                self._transport.write(part)

    def _flush(self) -> None:
        unsent, self._unsent = self._unsent, []
        if unsent and self._transport is not None and not self._lost:
            self._transport.write(unsent[0] if len(unsent) == 1 else b"".join(unsent))

    def _failed(self, error: RepositoryError) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = self._loop.create_future()
        future.set_exception(error)
        return future

    # ending -------------------------------------------------------------------------------------

    def fail(self, why: str) -> None:
        """Answers everything in flight, and everything asked from now on, with WorkerDiedError."""
        self._failure = why
        if self._calls is not None:
            self._calls.close()
        self._groups.fail(why)
        waiting, self._waiting = self._waiting, {}
        for future, _ in waiting.values():
            if not future.done():
                future.set_exception(WorkerDiedError(why))
        self.close()

    def close(self) -> None:
        if self._calls is not None:
            self._calls.close()
        self._unsent = []
        if self._transport is not None:
            self._transport.abort()

    async def over(self) -> None:
        """Returns when nothing that its model asked of the server is under way. After `close`."""
        if self._calls is not None:
            await self._calls.over()

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
                self._answer(frames.unpack(whole), whole[HEADER_SIZE:])
        except (BrokenFrameError, msgspec.MsgspecError) as error:
            self._lose(f"it broke the protocol: {error}")
            self.close()

    def _cut(self) -> None:
        """Takes whole frames out of the scratch buffer."""
        scratch, at, have = self._scratch, 0, self._have
        while have - at >= HEADER_SIZE:
            header = frames.unpack(scratch, at)
            end = at + HEADER_SIZE + header[0]
            if end > have:
                break
            payload = memoryview(bytes(scratch[at + HEADER_SIZE : end]))
            at = end
            self._answer(header, payload)
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

    def _answer(self, header: Header, payload: memoryview) -> None:
        number = header[2]
        waited = self._waiting.pop(number, None)
        if waited is None:
            self._unasked(header, payload)
            return
        future, asked = waited
        try:
            if header[3] == REPLY and type(asked) is Question:
                answer: Any = self._asking.open(asked, header, payload)
            else:
                answer = _other(asked, header, payload)
        except (BrokenFrameError, msgspec.MsgspecError):
            self._waiting[number] = waited
            raise
        if future.done():
            return
        if isinstance(answer, RepositoryError):
            future.set_exception(answer)
        else:
            future.set_result(answer)

    def _unasked(self, header: Header, payload: memoryview) -> None:
        """What is no answer to a question: part of one, or a question of the model's own."""
        if header[3] == PIECES:
            self._tell(payload[: header[1]])
        elif header[3] == FIGURES:
            if header[1] > figures.MOST_BYTES:
                raise BrokenFrameError(f"{header[1]} bytes of figures")
            self.figures = bytes(payload[: header[1]])
        elif self._groups.hear(header, payload):
            pass
        elif self._calls is None or not self._calls.hear(header, payload):
            raise BrokenFrameError(f"an answer to number {header[2]}, which nobody asked")

    def _tell(self, meta: memoryview) -> None:
        """What one step of the worker wrote. Of a text that nobody wants any more: nothing."""
        for number, piece in frames.read_pieces(meta):
            waited = self._waiting.get(number)
            if waited is None or type(waited[1]) is not Telling:
                raise BrokenFrameError(f"a piece of number {number}, which is no text that runs")
            if not waited[0].done():
                waited[1].tell(piece)

    def _lose(self, why: str) -> None:
        if not self._lost:
            self._lost = True
            self._on_lost(why)


def _other(
    asked: Question | Callable[[memoryview], Any], header: Header, payload: memoryview
) -> Any:
    """The answer to anything but an inference that succeeded; an error is returned."""
    _, meta, _, kind, *_ = header
    if kind == ERROR:
        return failures.from_wire(_read_failure(payload[:meta]))
    if kind != REPLY or isinstance(asked, Question):
        raise BrokenFrameError(f"an answer of kind {kind}")
    return asked(payload[:meta])
