"""Taking in the body of an inference request, within limits on bytes and on pieces.

Rules: nothing is allocated because a client announced it; a body that cannot be wanted is refused
before it is read; a client that leaves half-way leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple
from urllib.parse import parse_qs

from litestar.types import Receive

from repository.errors import InvalidRequestError
from repository.tensors import Buffer
from server.errors import PayloadTooLargeError, UnsupportedMediaError

MAX_BODY = 64 * 1024**2  # bytes
MAX_CHUNKS = 65_536  # non-empty pieces that a body may arrive in
LEAST_PIECE = 256  # bytes, on average, of a body in more pieces: below a network's packets
LONGEST_NUMBER = 18  # digits
ADAPTER_HEADER = b"x-amzn-sagemaker-adapter-identifier"


class ClientGoneError(Exception):
    """Nobody is there any more to be told anything."""


class Announced(NamedTuple):
    """What the headers say. `length`: bytes of the body, -1 where it is not said; `json_length`:
    Inference-Header-Content-Length as it came, None where it did not; likewise `packing`
    (Content-Encoding) and `accepts` (Accept-Encoding), all of them where there are several."""

    length: int
    json_length: bytes | None
    packing: bytes | None = None
    accepts: bytes | None = None


def read_headers(
    headers: Iterable[tuple[bytes, bytes]], max_body: int = MAX_BODY, *, packed: bool = False
) -> Announced:
    """Names in lower case (ASGI). `packed`: a body may be compressed, in ways that the caller knows.
    Raises PayloadTooLargeError, UnsupportedMediaError."""
    length, json_length, packing, accepts = -1, None, None, None
    for name, value in headers:
        if name == b"content-length":
            if not value.isdigit() or len(value) > LONGEST_NUMBER:
                raise InvalidRequestError("Content-Length is not a number of bytes")
            length = int(value)
        elif name == b"inference-header-content-length":
            if json_length not in (None, value):
                raise InvalidRequestError("Inference-Header-Content-Length is there twice")
            json_length = value
        elif name == b"accept-encoding":
            accepts = value if accepts is None else b"%b,%b" % (accepts, value)
        elif name == b"content-encoding":
            packing = value if packing is None else b"%b,%b" % (packing, value)
            if packed or value.lower() in (b"", b"identity"):
                continue
            raise UnsupportedMediaError(
                "Unsupported compression type: send the body as it is, without Content-Encoding",
                headers={"Accept-Encoding": "identity"},
            )
    check_size(length, max_body)
    return Announced(length, json_length, packing, accepts)


def adapter_of(query: bytes, headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The adapter that `?adapter=` or, before it, SageMaker's header names, for all rows and whatever
    the body says. None: neither does; an empty name is none."""
    found = None
    if query:
        found = parse_qs(query.decode("latin-1")).get("adapter", [None])[-1]
    for name, value in headers:
        if name == ADAPTER_HEADER and value:
            found = value.decode("latin-1")
    return found


class Pieces:
    """A body as it comes, piece by piece."""

    __slots__ = ("_max_body", "_max_chunks", "_pieces", "size")

    def __init__(self, max_body: int = MAX_BODY, max_chunks: int = MAX_CHUNKS) -> None:
        self._max_body, self._max_chunks = max_body, max_chunks
        self._pieces: list[Buffer] = []
        self.size = 0

    def add(self, piece: Buffer) -> None:
        """Raises PayloadTooLargeError as soon as a limit is passed."""
        self._pieces.append(piece)
        self.size += len(piece)
        check_size(self.size, self._max_body)
        refusal = too_many_pieces(len(self._pieces), self.size, self._max_chunks)
        if refusal is not None:
            raise refusal

    def joined(self) -> Buffer:
        """All of it, without a copy where it came in one piece."""
        pieces = self._pieces
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def put_into(self, place: memoryview) -> None:
        at = 0
        for piece in self._pieces:
            place[at : at + len(piece)] = piece
            at += len(piece)


async def read_body(
    receive: Receive, length: int, *, max_body: int = MAX_BODY, max_chunks: int = MAX_CHUNKS
) -> Buffer:
    """All of it. Raises PayloadTooLargeError as soon as a limit is passed, ClientGoneError when the
    client leaves before it has sent `length` bytes (-1: it announced nothing)."""
    pieces = Pieces(max_body, max_chunks)
    while True:
        message: Any = await receive()
        if message["type"] != "http.request":
            raise ClientGoneError
        piece = message.get("body", b"")
        if piece:
            pieces.add(piece)
        if not message.get("more_body", False):
            break
    if pieces.size < length:
        raise ClientGoneError
    return pieces.joined()


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


def check_size(size: int, limit: int) -> None:
    """Raises PayloadTooLargeError."""
    if size > limit:
        raise PayloadTooLargeError(
            f"Request of {size} bytes exceeds the maximum allowed input size of {limit} bytes. "
            f"Use --http-max-input-size to increase the limit."
        )
