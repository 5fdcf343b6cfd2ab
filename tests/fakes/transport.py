"""A transport that goes nowhere: it remembers what it was given."""

from __future__ import annotations

import asyncio
from typing import Any


class FakeTransport(asyncio.Transport):
    """`said`: each write. `protocol`: who it speaks to now."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[bytes | memoryview] = []
        self.protocol: Any = None
        self.reading = True
        self.closing = self.eof = False

    def write(self, data: Any) -> None:
        assert not self.closing and not self.eof
        self.said.append(data)

    def heard(self) -> bytes:
        """All that was said since the last time."""
        said, self.said = b"".join(self.said), []
        return said

    def set_protocol(self, protocol: Any) -> None:
        assert not self.reading  # a transport that reads has chosen how
        self.protocol = protocol

    def get_protocol(self) -> Any:
        return self.protocol

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def is_reading(self) -> bool:
        return self.reading

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    abort = close

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.eof = True

    def get_write_buffer_size(self) -> int:
        return 0

    def lose(self) -> None:
        """The client has gone."""
        self.closing = True
        self.protocol.connection_lost(None)
