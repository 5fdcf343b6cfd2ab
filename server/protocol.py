"""HTTP/1.1 on one connection: uvicorn's protocol, with bounds on what a client can make us keep.

uvicorn trusts whoever is in front of it. Alone, it keeps a head of any length (and copies it again
with every piece), waits for ever for one that stops half-way, answers what is not HTTP in plain text
and out of turn, and hangs up on a client that is still sending, which then never reads the answer.

Rules: a head has MOST_HEAD bytes and HEAD_S seconds; a body may be slow, not silent; whoever does not
read is let go; what cannot be understood is answered in JSON, after everything that was asked before
it; an answer that comes early is followed by reading on for a while. An Upgrade is ignored, as a server
may. Nothing here knows a route, a key or a model (how an error looks where the client asked is the
business of `server.shapes`). All of it is on the hot path: no clock is read for a request, and callbacks
do little.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from server import errors
from server.intake import MAX_CHUNKS, too_many_pieces
from server.shapes import shape

MOST_HEAD = 64 * 1024  # bytes of a request line and its headers
MOST_PIPELINED = 128  # requests that wait behind one another on a connection
MOST_AHEAD = 32  # of these, while more is read: who sends on and on is made to wait, not refused
HEAD_S = 30.0  # from the connection, or the last answer, to the end of the next head
BODY_S = 30.0  # without a byte of a body that was begun
UNREAD_S = 60.0  # without a byte taken of an answer
LINGER_S = 2.0  # of silence after an early answer
LONGEST_LINGER_S = 30.0
LOOK_S = 1.0  # how often the clocks are looked at


# Where in its input a connection is. Plain numbers: an Enum's members cost ten times as much to name.
IDLE, HEAD, BODY = range(3)


class Protocol(HttpToolsProtocol):
    """The times are attributes so that tests can be impatient."""

    head_s: ClassVar[float] = HEAD_S
    body_s: ClassVar[float] = BODY_S
    unread_s: ClassVar[float] = UNREAD_S

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._real = transport
        self._stage = IDLE
        self._since = self._heard_at = self._sent_at = self.loop.time()
        self._heard = self._answered = False  # since `look` looked
        self._fed = self._first = 0  # bytes with the head in them, and of the first piece of these
        self._size = 0  # bytes of the piece that is being parsed
        self._pieces = self._received = self._unsent = 0
        self._framing = 0  # bytes in pieces of a body that brought nothing of it
        self._refusal: errors.ServerError | None = None
        self._why: errors.ServerError | None = None  # what a callback of the parser found wrong
        self._again: bytes | None = None  # a head that asked for an upgrade, without it
        self._lingering = self._going = False
        self._current: Any = None  # the request that is being answered; `cycle` is the newest
        self._held: tuple[Any, Any] | None = None  # the next one, while the last answer is unread
        super().connection_made(_Transport(self))  # type: ignore[arg-type]

    def connection_lost(self, exc: Exception | None) -> None:
        self._going = True
        self._held = None
        super().connection_lost(exc)
        current = self._current
        if current is not None and not current.response_complete:
            current.disconnected = True  # uvicorn tells only the newest
            current.message_event.set()

    @property
    def _pending(self) -> bool:
        """Something that was asked has not been answered. (`cycle` is the newest request.)"""
        return self.cycle is not None and not self.cycle.response_complete

    # reading --------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        self._heard = True
        again = self._feed(data)
        while again is not None:  # no recursion: as many may be in one piece as fit into it
            again = self._feed(again)

    def _feed(self, data: bytes) -> bytes | None:
        """What is to be fed next, if the parser stopped at an upgrade."""
        if self._refusal is not None or self._lingering:
            return None
        again: bytes | None = None
        size = self._size = len(data)
        self._fed = self._fed + size if self._stage is HEAD else size
        if self._stage is BODY:
            self._framing += size
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            again = self._once_more(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self._refuse(self._why or errors.MalformedHttpError())
        if self._stage is HEAD:
            # What was before the head in its first piece is no part of it, and nobody knows how much.
            self._first = self._first or size
            if self._fed - self._first > MOST_HEAD and self._refusal is None:
                self._refuse(_head_too_large())
        elif self._framing > MOST_HEAD and self._stage is BODY and self._refusal is None:
            self._refuse(_framing_too_large())
        return again

    def _once_more(self, rest: bytes) -> bytes | None:
        """The parser stops at every request that asks for an upgrade; it is given the same request
        once more, without the wish."""
        if self._again is None:
            self._refuse(errors.MalformedHttpError())
            return None
        head, self._again = self._again, None
        self._parse_anew()
        return head + rest

    def _parse_anew(self) -> None:
        """With a parser that has seen nothing yet: the next byte begins a request."""
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._stage = IDLE

    def on_message_begin(self) -> None:
        self._stage = HEAD
        self._fed, self._first = self._size, 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """As uvicorn's, but what follows a body has no say in what is done with it; and the parser
        leaves the blanks behind a value."""
        if self._stage is HEAD:
            name, value = name.lower(), value.rstrip(b" \t")
            if name == b"expect" and value.lower() == b"100-continue":
                self.expect_100_continue = True
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self._fed > MOST_HEAD and self._head() > MOST_HEAD:
            self._stop(_head_too_large())
        if self.parser.should_upgrade():
            self._again = self._without_upgrade()
            return
        if len(self.pipeline) >= MOST_PIPELINED:
            self._stop(errors.TooManyRequestsError("too many requests in one go; read the answers"))
        self._pieces = self._received = self._framing = 0
        self._begin()
        self._stage = BODY

    def _begin(self) -> None:
        """Answers the request whose head is complete, or lets it wait for its turn."""
        super().on_headers_complete()

    def _count_piece(self, body: bytes) -> None:
        self._framing = 0
        self._pieces += 1
        self._received += len(body)
        if self._pieces > MAX_CHUNKS:
            refusal = too_many_pieces(self._pieces, self._received)
            if refusal is not None:
                self._stop(refusal)

    def read_on(self) -> None:
        """Asked by uvicorn whenever an answer is complete or a request looks whether its client is
        still there. It has just noted that nothing is paused any more."""
        if len(self.pipeline) < MOST_AHEAD:
            self._real.resume_reading()
        else:
            self.flow.read_paused = True

    # These two do what uvicorn's do, without asking for an upgrade once more.

    def on_body(self, body: bytes) -> None:
        self._count_piece(body)
        cycle = self.cycle
        if cycle.response_complete:
            return
        cycle.body += body
        if len(cycle.body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        cycle.message_event.set()

    def on_message_complete(self) -> None:
        if self._again is not None:
            return
        self._stage = IDLE
        cycle = self.cycle
        if not cycle.response_complete:
            cycle.more_body = False
            cycle.message_event.set()

    def _head(self) -> int:
        """Bytes of the head that is complete now."""
        return len(self.url) + sum(len(name) + len(value) for name, value in self.headers)

    def _stop(self, error: errors.ServerError) -> None:
        """Makes the parser stop; `data_received` goes on from there."""
        self._why = error
        raise error

    def _without_upgrade(self) -> bytes:
        method = self.parser.get_method()
        if method == b"CONNECT":
            self._stop(errors.MalformedHttpError("CONNECT is for proxies; this is none"))
        lines = [b"%s %s HTTP/%s" % (method, self.url, self.parser.get_http_version().encode())]
        lines += [b"%s: %s" % header for header in _plain(self.headers)]
        return b"\r\n".join([*lines, b"", b""])

    # writing --------------------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        """As uvicorn's, without a timer for what may be the last answer: `look` sees to that."""
        self._answered = True
        self._current = None
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif self._refusal is not None:
            self._say_why()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        """Not while an answer is unread: a connection would hold two, and a body."""
        self._current = cycle
        if self.flow.write_paused:
            self.flow.pause_reading()
            self._held = cycle, app
        else:
            super()._start_asgi_task(cycle, app)

    def resume_writing(self) -> None:
        self._unsent = 0
        super().resume_writing()
        held, self._held = self._held, None
        if held is not None and not held[0].disconnected:
            self.flow.resume_reading()
            self._start_asgi_task(*held)

    def _refuse(self, error: errors.ServerError) -> None:
        """Answers once everything before it was answered, then hangs up."""
        self._refusal = error
        cycle = self.cycle
        if self._stage is not BODY:
            if not self._pending:
                self._say_why()
        elif self.pipeline and self.pipeline[0][0] is cycle:
            self.pipeline.popleft()  # its turn has not come, and will not
        else:
            begun = cycle.response_started
            cycle.disconnected = True
            cycle.message_event.set()
            if begun:  # half an answer cannot become another one
                self.transport.close()
            else:
                self._say_why()

    def _say_why(self) -> None:
        error = self._refusal
        if error is None or self.transport.is_closing():
            return
        path = getattr(self, "url", b"").partition(b"?")[0].decode("latin-1")
        status, body = shape(path.rstrip("/"), error)
        self.transport.write(
            STATUS_LINE[status]
            + b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body)
            + b"connection: close\r\n\r\n"
            + body
        )
        self.transport.close()

    # hanging up -----------------------------------------------------------------------------------

    def hang_up(self) -> None:
        """Bytes that nobody reads make the kernel reset the connection, and the client loses the
        answer with it. So what it still sends is read, for a while, and forgotten."""
        unread = self._stage is not IDLE or self._refusal is not None
        if self._going or self._lingering or not unread or not self._real.can_write_eof():
            self._real.close()
            return
        self._lingering = True
        self.transport.is_closing = _yes  # type: ignore[method-assign]
        self._since = self._heard_at = self.loop.time()
        self.flow.resume_reading()
        self._real.write_eof()

    def eof_received(self) -> None:
        if self._lingering:
            self._real.close()

    def shutdown(self) -> None:
        self._going = True
        if self._lingering:
            self._real.close()
        else:
            super().shutdown()

    # patience -------------------------------------------------------------------------------------

    def look(self, now: float) -> None:
        """Lets go of a client that keeps us waiting. Asked every LOOK_S."""
        if self._heard:
            self._heard, self._heard_at = False, now
        if self._answered:
            self._answered, self._since = False, now
        silent_s, open_s = now - self._heard_at, now - self._since
        if self._lingering:
            if silent_s > LINGER_S or open_s > LONGEST_LINGER_S:
                self._real.close()
            return
        if self.pipeline and len(self.cycle.body) <= HIGH_WATER_LIMIT:
            self.flow.resume_reading()  # otherwise it would not be seen that the client has left
        self._look_whether_it_reads(now)
        if self._refusal is None:
            self._look_whether_it_sends(silent_s, open_s)

    def _look_whether_it_sends(self, silent_s: float, open_s: float) -> None:
        if self._stage is BODY:
            if not self._pending and open_s > LONGEST_LINGER_S:
                self._real.close()  # answered long ago, and it still sends
            elif silent_s > self.body_s and not self.flow.read_paused:
                self._refuse(errors.TooSlowError(f"no more of the body came for {self.body_s:g} s"))
        elif self._pending:
            return
        elif self._stage is HEAD:
            if open_s > self.head_s:
                self._refuse(errors.TooSlowError(f"the head did not come in {self.head_s:g} s"))
        elif open_s > (self.head_s if self.cycle is None else self.timeout_keep_alive):
            self._real.close()

    def _look_whether_it_reads(self, now: float) -> None:
        unsent = self._real.get_write_buffer_size()
        if not unsent or unsent < self._unsent or not self._unsent:
            self._sent_at = now
        elif now - self._sent_at > self.unread_s:
            self._real.abort()
        self._unsent = unsent


class _Transport:
    """The connection's transport, but `close` is the protocol's to do."""

    __slots__ = (
        "close", "get_extra_info", "is_closing", "pause_reading", "resume_reading", "write"
    )  # fmt: skip

    def __init__(self, protocol: Protocol) -> None:
        real = protocol._real
        self.close: Callable[[], None] = protocol.hang_up
        self.write = real.write
        self.pause_reading = real.pause_reading
        self.resume_reading: Callable[[], None] = protocol.read_on
        self.get_extra_info = real.get_extra_info
        self.is_closing = real.is_closing


def _yes() -> bool:
    return True


def _head_too_large() -> errors.ServerError:
    return errors.HeadTooLargeError(
        f"the request's address and headers have more than {MOST_HEAD} bytes; send fewer"
    )


def _framing_too_large() -> errors.ServerError:
    return errors.HeadTooLargeError(
        f"more than {MOST_HEAD} bytes came between two pieces of the body, or behind it; send fewer"
    )


def _plain(headers: Iterable[tuple[bytes, bytes]]) -> Iterable[tuple[bytes, bytes]]:
    """Without what asks for an upgrade."""
    for name, value in headers:
        if name == b"connection":
            tokens = [t.strip() for t in value.split(b",")]
            value = b", ".join(t for t in tokens if t.lower() not in _UPGRADES)
        if name not in _UPGRADES and (value or name != b"connection"):
            yield name, value


_UPGRADES = frozenset({b"upgrade", b"http2-settings"})


async def watch_over(connections: Iterable[Any]) -> None:
    """Looks at every connection's clocks, for ever."""
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(LOOK_S)
        now = loop.time()
        for connection in tuple(connections):
            connection.look(now)
