"""Inference below ASGI: answered in the callbacks of the connection that it came on.

A request makes no task, no scope and no coroutine; its stages (`server.call`) are called as its bytes
come and as its future is done. While it runs, an `Exchange` stands where uvicorn expects the cycle of
a request, so that whatever is asked behind it waits as it would behind any other.

A client says the same head again and again. On an idle connection the bytes of the last one are
known, and what they say: then the parser does not see the message at all.

Rules: what is not plain POST .../infer, or would have to wait for its turn, goes the ASGI way. A head
is known only in the exact bytes that the parser took for one, and only from a request that began its
piece of data and announced its length. What the gate said holds for its epoch. It must not know what
the bytes of a body say.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple
from urllib.parse import unquote

import httptools

from server import errors
from server.call import Door, Head
from server.exchange import ENDED, Exchange
from server.intake import LONGEST_NUMBER
from server.protocol import BODY, IDLE, Protocol
from server.straight import Straight, place_for

PREFIX, SUFFIX = b"/v2/models/", "/infer"
LONGEST_KNOWN = 4096  # bytes of a head that is worth remembering
STRAIGHT_FROM = 64 * 1024  # bytes of a body yet to come for which changing protocols pays
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Known(NamedTuple):
    """A head of this connection: its bytes, what they say, and the epoch in which it was let in."""

    raw: bytes
    url: bytes
    path: str
    headers: list[tuple[bytes, bytes]]
    head: Head
    epoch: int


class FastProtocol(Protocol):
    """`door` is what the ASGI route has."""

    cycle: Any  # the newest request: uvicorn's, an Exchange, or ENDED

    def __init__(self, *args: Any, door: Door, **more: Any) -> None:
        super().__init__(*args, **more)
        self._door = door
        self._known: Known | None = None
        self._learning: Known | None = None  # of the head that came with this piece of data
        self._fresh = False  # a head that completes now began this piece of data
        self._left = 0  # bytes of a body that the parser does not see
        self._straight: Straight | None = None

    # reading --------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        known = self._known
        if self._left:
            self._go_on(data)
        elif (
            known is not None
            and self._stage is IDLE
            and data.startswith(known.raw)
            and not self._pending
            and not self.flow.write_paused
            and self._refusal is None
            and not self._lingering
        ):
            self._repeat(known, data)
        else:
            self._parse(data, fresh=self._stage is IDLE)

    def _parse(self, data: bytes, *, fresh: bool) -> None:
        self._fresh = fresh
        super().data_received(data)
        if self._learning is not None:
            self._learn(data)
        if self._stage is BODY:
            self._straighten()

    def _parse_anew(self) -> None:
        super()._parse_anew()
        self._fresh = False  # what is parsed next are not the bytes that came

    def _begin(self) -> None:
        """A head is complete."""
        fresh, self._fresh, self._learning = self._fresh, False, None
        if self.transport.is_closing():
            return  # it came behind one that was answered by hanging up
        url = self.url
        if (
            not url.startswith(PREFIX)
            or self._pending
            or self.flow.write_paused
            or self.parser.get_method() != b"POST"
            or self.limit_concurrency is not None
        ):
            super()._begin()
            return
        address = httptools.parse_url(url)
        path = address.path.decode("ascii")
        if "%" in path:
            path = unquote(path)
        if not path.endswith(SUFFIX) or "//" in path:
            super()._begin()
            return
        self._stage = BODY
        parser = self.parser
        keep_alive: bool = parser.get_http_version() != "1.0" and parser.should_keep_alive()
        exchange = self._exchange(path, keep_alive)
        try:
            epoch = self._door.epoch()
            exchange.head = head = self._door.admit(
                "POST", path, self.headers, address.query or b""
            )
        except Exception as error:  # noqa: BLE001 - the edge: whatever it is, the client gets an answer
            exchange.refuse(error)
            return
        if self.expect_100_continue:
            self.transport.write(CONTINUE)
        elif fresh and keep_alive and head.length >= 0:
            self._learning = Known(b"", url, path, self.headers, head, epoch)

    def _exchange(self, path: str, keep_alive: bool) -> Exchange:
        self.cycle = self._current = exchange = Exchange(self, self._door, path, keep_alive)
        return exchange

    def on_body(self, body: bytes) -> None:
        cycle = self.cycle
        if type(cycle) is not Exchange:
            super().on_body(body)
            return
        self._count_piece(body)
        if not cycle.response_complete:
            cycle.add(body)

    def on_message_complete(self) -> None:
        cycle = self.cycle
        if type(cycle) is not Exchange:
            super().on_message_complete()
        elif self._again is None:
            self._stage = IDLE
            if not cycle.response_complete:
                cycle.ask()

    # a head that is known -------------------------------------------------------------------------

    def _learn(self, data: bytes) -> None:
        found, self._learning = self._learning, None
        end = data.find(b"\r\n\r\n") + 4
        # Nothing but this head, and of its body what the parser made of it.
        if (
            found is not None
            and 4 < end <= LONGEST_KNOWN
            and end + self._received == len(data)
            and data.startswith(b"POST ")
        ):
            self._known = found._replace(raw=data[:end])

    def _repeat(self, known: Known, data: bytes) -> None:
        """A request with the same head, on an idle connection."""
        self._heard = True
        self.url = known.url
        exchange = self._exchange(known.path, keep_alive=True)
        exchange.head = known.head
        begin = len(known.raw)
        end = begin + known.head.length
        missing = end - len(data)
        if missing > 0:
            self._stage = BODY
            self._pieces = self._received = 0
        epoch = self._door.epoch()
        if known.epoch != epoch:
            self._known = None
            try:
                self._door.authorize(known.headers)
            except Exception as error:  # noqa: BLE001 - as above
                exchange.refuse(error)
                return
            self._known = known._replace(epoch=epoch)
        if missing > 0:
            if len(data) > begin:
                exchange.add(memoryview(data)[begin:])
            self._left = missing
            self._straighten()
            return
        exchange.ask(memoryview(data)[begin:end])
        if missing < 0:
            self._parse(data[end:], fresh=False)

    def _go_on(self, data: bytes) -> None:
        """The rest of the body of such a request, or some of it."""
        self._heard = True
        exchange, left = self.cycle, self._left
        try:
            self._count_piece(data)
        except errors.ServerError as error:
            self._refuse(error)
            return
        if len(data) < left:
            self._left = left - len(data)
            exchange.add(data)
            return
        self._left = 0
        self._stage = IDLE
        exchange.add(data[:left])
        if not exchange.response_complete:
            exchange.ask()
        if len(data) > left:
            self._parse(data[left:], fresh=False)

    # a body that comes straight -------------------------------------------------------------------

    def _straighten(self) -> None:
        """Lets what is missing of a large body come straight to where it will lie."""
        exchange = self.cycle
        if (
            type(exchange) is not Exchange
            or self._straight is not None
            or exchange.missing < STRAIGHT_FROM
        ):
            return
        model, version = exchange.head.route
        length, said = exchange.head.length, exchange.head.json_length
        packed = exchange.head.packing is not None  # no tensor's bytes, then
        room = None if said is None or packed else partial(self._door.models.room, model, version)
        header_length = int(said) if said and said.isdigit() and len(said) <= LONGEST_NUMBER else 0
        place = place_for(length, header_length, room)
        if place is None:
            return
        filled = length - exchange.missing
        exchange.put_into(place)
        self._left = 0
        self._straight = Straight(self, self._real, place, filled)

    def heard(self) -> None:
        self._heard = True

    def arrived(self, body: memoryview) -> None:
        """All of it."""
        self._straight = None
        self._parse_anew()
        self.cycle.ask(body)

    # the end --------------------------------------------------------------------------------------

    def forget(self, exchange: Exchange) -> None:
        """It has ended."""
        self.tasks.discard(exchange)
        self._left = 0
        if self.cycle is exchange:
            self.cycle = ENDED
        self._current = None
        if self._straight is not None:
            self._straight.give_back()
            self._straight = None
