"""Errors: an example of each, rendered by the very code that renders the real one; how they look."""

from __future__ import annotations

from typing import Any

import msgspec

from repository.errors import (
    AdapterNotFoundError,
    ConflictError,
    DrainingError,
    InvalidRequestError,
    LoadFailedError,
    ModelNotFoundError,
    NoRoomError,
)
from server import errors
from server.auth import NOBODY
from server.openapi.operation import Operation
from server.shapes import shape

GIB = 1024**3

USUAL: dict[int, BaseException] = {
    400: InvalidRequestError("the body is not JSON: Input data was truncated"),
    401: errors.UnauthorizedError(NOBODY),
    403: errors.ForbiddenError("key 'ci' lacks the scope 'admin'"),
    404: ModelNotFoundError("the repository has no model 'iris2'; did you mean 'iris'?"),
    405: errors.WrongVerbError("POST"),
    409: ConflictError("a request runs; nothing was unloaded"),
    413: errors.PayloadTooLargeError("the body has more than 1048576 bytes"),
    415: errors.UnsupportedMediaError("send JSON (content-type: application/json), not 'text/xml'"),
    424: AdapterNotFoundError("The adapter a1 has not been registered"),
    429: errors.TooManyRequestsError("this key has too many calls under way", retry_after_s=1),
    500: LoadFailedError("model 'iris' version 1: the file is no ONNX model"),
    501: errors.UnsupportedError("shared memory regions are not supported"),
    503: DrainingError("the server is shutting down", retry_after_s=1),
    507: NoRoomError(
        "model 'big' needs 9.0 GiB on cpu, 4.0 GiB are free",
        needed=9 * GIB,
        free=4 * GIB,
        residents={"iris:1": 2 * GIB},
    ),
}
WHY: dict[int, str] = {
    400: "The request is wrong; the text says what to change. Nothing was done.",
    401: "No key, or one that is not known.",
    403: "The key lacks the scope that this call needs, or a path leads where none may.",
    404: "There is no such thing.",
    405: "Another verb would do: see the header Allow.",
    409: "The right request in the wrong state; nothing was changed.",
    413: "The body is too long.",
    415: "The body is of another media type than JSON, or packed.",
    422: "A parameter is missing.",
    424: "What the request relies on cannot serve it.",
    429: "Too many at once; ask again after Retry-After seconds.",
    500: "The model, or the server, broke; the text says why.",
    501: "A part of the protocol that this server does not speak.",
    503: "Not now; ask again, after Retry-After seconds where it says so.",
    507: "It does not fit into memory, or the disk cannot keep it; the text has the numbers.",
}


def rendered(op: Operation, error: BaseException) -> tuple[int, Any]:
    """Status and body, as this call would answer."""
    if op.face.shape is not None:
        return op.face.shape(error)
    status, body = shape(op.sample_path, error)
    return status, msgspec.json.decode(body)


def openai(error: BaseException) -> tuple[int, Any]:
    return errors.status_of(error), errors.body_openai(error)


# How they look ------------------------------------------------------------------------------------


class Reason(msgspec.Struct):
    """`param`: the field that is wrong, where one is. `code`: a stable word to branch on. The last
    seven, in bytes, where there is no room; `asleep`: those of the residents that sleep; `foreign`:
    what others than this server use of the device."""

    message: str
    type: str
    param: str | None
    code: str
    needed: int | msgspec.UnsetType = msgspec.UNSET
    free: int | msgspec.UnsetType = msgspec.UNSET
    device: str | msgspec.UnsetType = msgspec.UNSET
    residents: dict[str, int] | msgspec.UnsetType = msgspec.UNSET
    pinned: list[str] | msgspec.UnsetType = msgspec.UNSET
    asleep: dict[str, int] | msgspec.UnsetType = msgspec.UNSET
    foreign: int | msgspec.UnsetType = msgspec.UNSET


class NativeError(msgspec.Struct):
    """As PolarGrid documents errors, in both spellings."""

    error: Reason
    detail: str


class OpenAIError(msgspec.Struct):
    """As OpenAI's clients read errors."""

    error: Reason


class V2Error(msgspec.Struct):
    """As KServe V2 has it."""

    error: str


class MarqoError(msgspec.Struct):
    """As Marqo's clients read errors. `detail` in place of `message`: what is wrong with a
    parameter."""

    code: str
    type: str
    link: str | None
    message: str | msgspec.UnsetType = msgspec.UNSET
    detail: Any = msgspec.UNSET


class AphroditeReason(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: int


class AphroditeError(msgspec.Struct):
    """As Aphrodite has it."""

    error: AphroditeReason


class DjlError(msgspec.Struct):
    """As DJL Serving has it."""

    code: int
    type: str
    message: str
