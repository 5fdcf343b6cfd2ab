"""A request that is answered below ASGI, as its connection sees it.

uvicorn keeps the newest request of a connection as its `cycle`, and asks a cycle whether it is over,
lets it know that the client has left, and starts what waits behind it when it says so. An `Exchange`
is such a cycle, as far as uvicorn's and our own protocol look; and as far as the server looks at the
end, it is one of its tasks, which it may cancel.

Rules: nothing that is called here raises. A request ends once: answered, refused, or given up because
its client has left, and then whatever was done for it is cancelled. When it has ended, nothing holds
it any more: a body or an answer must not lie about because its connection is idle.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, Protocol

from uvicorn.protocols.http.httptools_impl import STATUS_LINE
from uvicorn.server import ServerState

from repository.messages import InferResponse
from repository.prompt import listen
from repository.tensors import Buffer
from server import errors
from server.call import Call, Door, Head
from server.codecs.v2_binary import JOIN_BELOW, Encoded
from server.heads import CLOSE, Header, answer_headers
from server.intake import Pieces
from server.patience import error_of

log = logging.getLogger("modeldepot.v2")


class Connection(Protocol):
    """What an exchange needs of its protocol."""

    transport: Any
    loop: asyncio.AbstractEventLoop
    server_state: ServerState

    def forget(self, exchange: Exchange) -> None: ...
    def on_response_complete(self) -> None: ...


class Exchange:
    __slots__ = (
        "_call", "_connection", "_pieces", "_waits_for", "disconnected", "head", "keep_alive",
        "response_complete", "response_started",
    )  # fmt: skip

    head: Head  # as soon as it was let in

    def __init__(self, connection: Connection, door: Door, path: str, keep_alive: bool) -> None:
        self._connection = connection
        self._call = Call(door, path)
        self._pieces: Pieces | None = None
        self._waits_for: asyncio.Future[Any] | None = None
        self.keep_alive = keep_alive
        self.disconnected = self.response_started = self.response_complete = False
        connection.server_state.tasks.add(self)  # type: ignore[arg-type]

    # the body -------------------------------------------------------------------------------------

    @property
    def missing(self) -> int:
        """Bytes of the body that have not come; at most 0 where its length is not known."""
        return self.head.length - (self._pieces.size if self._pieces is not None else 0)

    def add(self, piece: Buffer) -> None:
        """More of the body."""
        pieces = self._pieces
        if pieces is None:
            door = self._call.door
            pieces = self._pieces = Pieces(door.max_body, door.max_chunks)
        try:
            pieces.add(piece)
        except Exception as error:  # noqa: BLE001 - the edge: whatever it is, the client gets an answer
            self.refuse(error)

    def put_into(self, place: memoryview) -> None:
        """Moves what has come of the body."""
        if self._pieces is not None:
            self._pieces.put_into(place)
            self._pieces = None

    def ask(self, body: Buffer | None = None) -> None:
        """The body is complete: this, or what was added."""
        if body is None:
            body = b"" if self._pieces is None else self._pieces.joined()
        self._pieces = None
        call = self._call
        try:
            call.take(self.head, body)
            if call.is_long:
                self._wait(self._connection.loop.create_task(call.read()), self._ask)
                return
        except Exception as error:  # noqa: BLE001 - as above
            self.refuse(error)
        else:
            self._ask()

    # the answer -----------------------------------------------------------------------------------

    def _wait(
        self, future: asyncio.Future[Any], then: Callable[[asyncio.Future[Any]], None]
    ) -> None:
        """Nothing is waited for when the client has left."""
        self._waits_for = future
        listen(future, then)

    def _ask(self, before: asyncio.Future[None] | None = None) -> None:
        """`before`: what had to be waited for."""
        if before is not None and not self._went_well(before):
            return
        try:
            future = self._call.ask()
        except Exception as error:  # noqa: BLE001 - as above
            self._ask_later(error)
            return
        if future.done():
            self._hear(future)
        else:
            self._wait(future, self._hear)

    def _ask_later(self, error: Exception) -> None:
        """If its model loads meanwhile."""
        try:
            waiter = self._call.wait(error)
        except Exception as why:  # noqa: BLE001 - as above
            self.refuse(why)
            return
        if waiter is None:
            self.refuse(error)
        else:
            self._wait(waiter, self._ask)

    def _hear(self, future: asyncio.Future[InferResponse]) -> None:
        if not self._went_well(future):
            return
        call = self._call
        try:
            call.hear(future.result())
            if call.answers_long:
                self._wait(self._connection.loop.create_task(call.write()), self._pass_on)
                return
            encoded = call.answer()
        except Exception as error:  # noqa: BLE001 - as above
            self.refuse(error)
        else:
            self._answer(encoded)

    def _pass_on(self, written: asyncio.Future[Encoded]) -> None:
        if self._went_well(written):
            self._answer(written.result())

    def _went_well(self, future: asyncio.Future[Any]) -> bool:
        """Otherwise there is nothing more to do."""
        error = error_of(future)  # not raised: a traceback would tie it to what it belongs to
        if self.response_complete:
            return False
        self._waits_for = None
        if error is not None:
            self.refuse(error)
        return error is None

    def _answer(self, encoded: Encoded) -> None:
        header_length, buffers, total, coding = encoded
        head = _head(header_length, total, self.keep_alive, coding)
        self._write(STATUS_LINE[200], head, buffers, total)
        self._call.end(answered=self.response_started)
        self._over()

    def refuse(self, error: Exception) -> None:
        if self.response_complete:
            return
        status, headers, body = self._call.refuse(error)
        self._refuse(status, headers, body)

    def _refuse(self, status: int, headers: list[Header], body: bytes) -> None:
        if CLOSE in headers:
            self.keep_alive = False
        elif not self.keep_alive:
            headers.append(CLOSE)
        self._write(STATUS_LINE[status], lines_of(headers), [body], len(body))
        self._call.end()
        self._over()

    def _write(self, status: bytes, head: bytes, buffers: Sequence[Buffer], total: int) -> None:
        connection = self._connection
        transport = connection.transport
        if transport.is_closing():
            return  # there is nobody to tell
        self.response_started = True
        if connection.server_state.default_headers:
            status += lines_of(connection.server_state.default_headers)[:-2]
        try:
            if total <= JOIN_BELOW:
                transport.write(b"".join((status, head, *buffers)))
                return
            transport.write(status + head)
            for part in buffers:
                transport.write(part)  # as it is: the transport keeps it until it is sent
        except Exception:
            log.exception("an answer could not be written")
            self.keep_alive = False

    # the end --------------------------------------------------------------------------------------

    def _over(self) -> None:
        """It was answered, well or not."""
        connection = self._connection
        self.response_complete = True
        connection.forget(self)
        if not self.keep_alive:
            connection.transport.close()
        connection.on_response_complete()

    def give_up(self) -> None:
        """The client has left, or is told something else."""
        if self.response_complete:
            return
        self.response_complete = True
        if self._waits_for is not None:
            self._waits_for.cancel()
        self._call.end()
        self._connection.forget(self)

    def cancel(self, msg: str = "") -> None:
        """The server ends and does not wait any longer."""
        self._connection.loop.call_soon(self._cut_off)

    def _cut_off(self) -> None:
        if not self.response_complete:
            if self._waits_for is not None:
                self._waits_for.cancel()
            self.keep_alive = False
            self.refuse(errors.cut_off())

    # as uvicorn asks ------------------------------------------------------------------------------

    @property
    def message_event(self) -> Exchange:
        return self

    def set(self) -> None:
        """Something has changed: either the body, of which we know, or the client has left."""
        if self.disconnected:
            self.give_up()


class Ended:
    """What a connection's newest request is once it has ended; nobody's in particular."""

    response_started = response_complete = True
    keep_alive = disconnected = False

    @property
    def message_event(self) -> Ended:
        return self

    def set(self) -> None:
        pass

    def __setattr__(self, name: str, value: Any) -> None:
        """Whatever it is, it comes too late."""


ENDED = Ended()


@lru_cache(4096)
def _head(header_length: int | None, total: int, keep_alive: bool, coding: str | None) -> bytes:
    headers = answer_headers(header_length, total, coding)
    return lines_of(headers if keep_alive else [*headers, CLOSE])


def lines_of(headers: Iterable[Header]) -> bytes:
    """As they are sent, with the empty line behind them."""
    return b"".join([b"%b: %b\r\n" % header for header in headers]) + b"\r\n"
