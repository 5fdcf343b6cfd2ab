"""Taking in the body of an inference request, within limits on bytes and on pieces.

Rules: nothing is allocated because a client announced it; a body that cannot be wanted is refused
before it is read; a client that leaves half-way leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from litestar.types import Receive

from repository.errors import InvalidRequestError
from server.errors import PayloadTooLargeError, UnsupportedMediaError

MAX_BODY = 64 * 1024**2  # bytes
MAX_CHUNKS = 65_536  # non-empty pieces that a body may arrive in
LEAST_PIECE = 256  # bytes, on average, of a body in more pieces: below a network's packets
LONGEST_NUMBER = 18  # digits


class ClientGoneError(Exception):
    """Nobody is there any more to be told anything."""


class Announced(NamedTuple):
    """What the headers say. `length`: bytes of the body, -1 where it is not said; `json_length`:
    Inference-Header-Content-Length as it came, None where it did not."""

    length: int
    json_length: bytes | None


def read_headers(headers: Iterable[tuple[bytes, bytes]], max_body: int = MAX_BODY) -> Announced:
    """Names in lower case (ASGI). Raises PayloadTooLargeError, UnsupportedMediaError."""
    length, json_length = -1, None
    for name, value in headers:
        if name == b"content-length":
            if not value.isdigit() or len(value) > LONGEST_NUMBER:
                raise InvalidRequestError("Content-Length is not a number of bytes")
            length = int(value)
        elif name == b"inference-header-content-length":
            if json_length not in (None, value):
                raise InvalidRequestError("Inference-Header-Content-Length is there twice")
            json_length = value
        elif name == b"content-encoding" and value.lower() not in (b"", b"identity"):
            raise UnsupportedMediaError(
                "Unsupported compression type: send the body as it is, without Content-Encoding",
                headers={"Accept-Encoding": "identity"},
            )
    if length > max_body:
        raise _too_large(length, max_body)
    return Announced(length, json_length)


async def read_body(
    receive: Receive, length: int, *, max_body: int = MAX_BODY, max_chunks: int = MAX_CHUNKS
) -> bytes:
    """All of it. Raises PayloadTooLargeError as soon as a limit is passed, ClientGoneError when the
    client leaves before it has sent `length` bytes (-1: it announced nothing)."""
    chunks: list[bytes] = []
    size = 0
    while True:
        message: Any = await receive()
        if message["type"] != "http.request":
            raise ClientGoneError
        chunk = message.get("body", b"")
        if chunk:
            chunks.append(chunk)
            size += len(chunk)
            if size > max_body:
                raise _too_large(size, max_body)
            refusal = too_many_pieces(len(chunks), size, max_chunks)
            if refusal is not None:
                raise refusal
        if not message.get("more_body", False):
            break
    if size < length:
        raise ClientGoneError
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def too_many_pieces(
    pieces: int, size: int, max_chunks: int = MAX_CHUNKS
) -> PayloadTooLargeError | None:
    """What to refuse a body with that costs more for its pieces than for its bytes. A large one may
    well come in many: the network cuts it."""
    if pieces <= max_chunks or size >= pieces * LEAST_PIECE:
        return None
    return PayloadTooLargeError(
        f"the request's body comes in more than {max_chunks} tiny pieces; send larger ones"
    )


def _too_large(size: int, limit: int) -> PayloadTooLargeError:
    return PayloadTooLargeError(
        f"Request of {size} bytes exceeds the maximum allowed input size of {limit} bytes. "
        f"Use --max-body to increase the limit."
    )
