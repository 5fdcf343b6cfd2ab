"""Taking in a body: limits on its bytes and on its pieces, and on what its headers say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from repository.errors import InvalidRequestError
from server.errors import PayloadTooLargeError
from server.intake import (
    LEAST_PIECE,
    MAX_CHUNKS,
    ClientGoneError,
    read_body,
    read_headers,
    too_many_pieces,
)

LENGTH = b"inference-header-content-length"


def arriving(pieces: Sequence[bytes], *, whole: bool = True) -> Any:
    """`whole` false: the client leaves after the last piece."""
    messages: list[dict[str, Any]] = [
        {"type": "http.request", "body": piece, "more_body": not whole or at < len(pieces) - 1}
        for at, piece in enumerate(pieces)
    ]
    messages.append({"type": "http.disconnect"})

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    return receive


async def test_a_large_body_may_come_in_as_many_pieces_as_the_network_makes_of_it() -> None:
    pieces = [b"x" * LEAST_PIECE] * 200
    body = await read_body(arriving(pieces), -1, max_chunks=5)
    assert len(body) == 200 * LEAST_PIECE
    assert too_many_pieces(10 * MAX_CHUNKS, 10 * MAX_CHUNKS * LEAST_PIECE) is None


async def test_a_body_in_tiny_pieces_is_refused_once_there_are_too_many() -> None:
    assert await read_body(arriving([b"x"] * 5), 5, max_chunks=5) == b"xxxxx"
    with pytest.raises(PayloadTooLargeError, match="more than 5 tiny pieces"):
        await read_body(arriving([b"x"] * 6), 6, max_chunks=5)


async def test_whoever_leaves_early_is_gone() -> None:
    for receive in (arriving([b"12"], whole=False), arriving([b"12"])):
        with pytest.raises(ClientGoneError):
            await read_body(receive, 3)


def test_the_length_of_the_header_is_said_once() -> None:
    assert read_headers([(LENGTH, b"7"), (LENGTH, b"7")]).json_length == b"7"
    with pytest.raises(InvalidRequestError, match="twice"):
        read_headers([(LENGTH, b"7"), (LENGTH, b"8")])
