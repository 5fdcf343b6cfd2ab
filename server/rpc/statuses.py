"""What went wrong -> a status of gRPC. The texts are those of `server.errors`, as they are.

The numbers of HTTP are the middle: a family has one number there and one status here, so that a client
that changes its protocol sees the same difference between errors.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias
from urllib.parse import quote

import grpc

from repository.errors import ConflictError, RejectedError, RequestCancelledError
from server import errors

MOST_TEXT = 6000  # bytes of a text as it is sent; with 8 KiB of metadata, clients give up

Code: TypeAlias = Any  # grpc.StatusCode, which has no types
_C = grpc.StatusCode
CODES: dict[int, Code] = {
    400: _C.INVALID_ARGUMENT,
    401: _C.UNAUTHENTICATED,
    403: _C.PERMISSION_DENIED,
    404: _C.NOT_FOUND,
    405: _C.UNIMPLEMENTED,
    408: _C.DEADLINE_EXCEEDED,
    409: _C.FAILED_PRECONDITION,
    413: _C.RESOURCE_EXHAUSTED,
    415: _C.UNIMPLEMENTED,
    424: _C.FAILED_PRECONDITION,
    429: _C.RESOURCE_EXHAUSTED,
    431: _C.RESOURCE_EXHAUSTED,
    500: _C.INTERNAL,
    501: _C.UNIMPLEMENTED,
    503: _C.UNAVAILABLE,
    507: _C.RESOURCE_EXHAUSTED,
}
CODE_KEY, RETRY_KEY, REQUEST_ID_KEY = "x-modeldepot-code", "retry-after", "x-request-id"
Metadata = tuple[tuple[str, str], ...]


def code_of(error: BaseException) -> Code:
    if isinstance(error, ConflictError) and isinstance(error, RejectedError):
        return _C.ALREADY_EXISTS  # for HTTP a bad request, as Triton says
    if isinstance(error, RequestCancelledError):
        return _C.CANCELLED
    return CODES.get(errors.status_v2(error), _C.INTERNAL)


def text_of(error: BaseException) -> str:
    """As over HTTP; what makes it too long for a header is left out of its middle."""
    text = errors.text_of(error).encode(errors="replace").decode()
    while len(quote(text, safe=" !\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~")) > MOST_TEXT:
        third = len(text) // 3
        text = f"{text[:third]} ... {text[-third:]}"
    return text


def trailing_of(error: BaseException, request_id: str = "") -> Metadata:
    """The stable word that clients may branch on, and when to ask again."""
    found = [(CODE_KEY, errors.code_of(error))]
    wait_s = errors.headers_of(error).get("Retry-After")
    if wait_s is not None:
        found.append((RETRY_KEY, wait_s))
    if request_id:
        found.append((REQUEST_ID_KEY, request_id))
    return tuple(found)


def headers_of(metadata: Iterable[Any]) -> list[tuple[bytes, bytes]]:
    """Names are in lower case already, as HTTP/2 has them."""
    return [
        (name.encode(), value if isinstance(value, bytes) else value.encode("latin-1", "replace"))
        for name, value in metadata or ()
    ]
