"""A large body goes straight from the socket to where it will lie: no copy, no parser.

While it comes, the connection's transport speaks to a `Straight` in place of the protocol, which has
it back at the last byte (or earlier, when it gives the request up). What the client sends behind the
body is left to the protocol: no more bytes are asked for than are missing.

Rules: a place is memory that nothing was written to before bytes come, so that announcing a length
costs us nothing; what lies behind the JSON header lies at a multiple of ALIGN. It must not know what
the bytes say.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

import numpy as np

from repository.tensors import ALIGN, address

NOWHERE = memoryview(b"")

Room = Callable[[int], memoryview | None]


def place_for(size: int, header_length: int, room: Room | None) -> memoryview | None:
    """`size` bytes, the one after `header_length` aligned. None where there is no memory: then the
    body comes as others do."""
    found = None if room is None else room(size + ALIGN)
    if found is None:
        try:
            found = np.empty(size + ALIGN, np.uint8).data
        except MemoryError:
            return None
    start = -(address(found) + header_length) % ALIGN
    return found[start : start + size]


class Receiver(Protocol):
    """The protocol that lends its transport."""

    def heard(self) -> None: ...
    def arrived(self, body: memoryview) -> None: ...
    def connection_lost(self, exc: Exception | None) -> None: ...
    def eof_received(self) -> None: ...
    def pause_writing(self) -> None: ...
    def resume_writing(self) -> None: ...


class Straight(asyncio.BufferedProtocol):
    """Fills `place` from `filled` on, then gives the transport back and says that it `arrived`."""

    def __init__(
        self, receiver: Receiver, transport: asyncio.Transport, place: memoryview, filled: int
    ) -> None:
        self._receiver, self._transport = receiver, transport
        self._place, self._filled = place, filled
        self._hand_to(self)

    def give_back(self) -> None:
        """The transport speaks to the receiver again. It may remember us for as long as it lives
        (uvloop does), so the place is let go here."""
        self._hand_to(self._receiver)  # type: ignore[arg-type]
        self._place = NOWHERE

    def _hand_to(self, protocol: asyncio.BaseProtocol) -> None:
        # A transport decides when it begins to read whether it reads into a buffer of the protocol's.
        transport = self._transport
        if not transport.is_closing():
            transport.pause_reading()
            transport.set_protocol(protocol)
            transport.resume_reading()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._place[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        self._receiver.heard()
        self._filled += nbytes
        if self._filled == len(self._place):
            place = self._place
            self.give_back()
            self._receiver.arrived(place)

    def connection_lost(self, exc: Exception | None) -> None:
        self._receiver.connection_lost(exc)

    def eof_received(self) -> None:
        self._receiver.eof_received()

    def pause_writing(self) -> None:
        self._receiver.pause_writing()

    def resume_writing(self) -> None:
        self._receiver.resume_writing()
