"""The heads of answers: the headers that all ways of answering a request share."""

from __future__ import annotations

from typing import TypeAlias

from server import errors

Header: TypeAlias = tuple[bytes, bytes]  # names in lower case

CODE_HEADER = b"x-modeldepot-code"
JSON = (b"content-type", b"application/json")
BINARY = (b"content-type", b"application/octet-stream")
CLOSE = (b"connection", b"close")
VARY = (b"vary", b"accept-encoding")


def answer_headers(
    header_length: int | None, total: int, coding: str | None = None
) -> list[Header]:
    """Of a good answer. `header_length` counts bytes before they were compressed, `total` after."""
    headers = [BINARY if header_length else JSON, (b"content-length", b"%d" % total)]
    if coding is not None:
        headers += [(b"content-encoding", coding.encode()), VARY]
    if header_length:
        headers.append((b"inference-header-content-length", b"%d" % header_length))
    return headers


def refusal_headers(error: Exception, length: int, *, read: bool) -> list[Header]:
    """Of an error's body of `length` bytes. `read`: the request's body has been."""
    headers = [JSON, (b"content-length", b"%d" % length)]
    headers.append((CODE_HEADER, errors.code_of(error).encode()))
    headers += [(k.lower().encode(), v.encode()) for k, v in errors.headers_of(error).items()]
    if not read:
        headers.append(CLOSE)  # what is left of the body would be taken for the next request
    return headers
