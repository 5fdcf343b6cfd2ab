"""The one map: what went wrong → a number, a text and headers at the door.

Faces choose how a body looks; the number, the code and the text always come from here. A text shown
to a client is one that we wrote: a foreign exception is logged with its traceback and shown as
INTERNAL_TEXT.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import msgspec
from litestar.exceptions import HTTPException

from repository.errors import (
    CapacityError,
    ConflictError,
    DependencyError,
    DrainingError,
    FailedError,
    InvalidTensorError,
    NoRoomError,
    NotFoundError,
    OutOfBoundsError,
    RejectedError,
    RepositoryError,
    RequestCancelledError,
    UnavailableError,
    UnsupportedRequestError,
)
from server.refusals import (
    ForbiddenError,
    HeadTooLargeError,
    MalformedHttpError,
    MiscountError,
    NoSuchPathError,
    PayloadTooLargeError,
    ServerError,
    TooManyRequestsError,
    TooSlowError,
    UnauthorizedError,
    UnsupportedError,
    UnsupportedMediaError,
    WrongVerbError,
)

__all__ = [  # what is raised with the map is found with the map
    "ForbiddenError",
    "HeadTooLargeError",
    "MalformedHttpError",
    "MiscountError",
    "NoSuchPathError",
    "PayloadTooLargeError",
    "ServerError",
    "TooManyRequestsError",
    "TooSlowError",
    "UnauthorizedError",
    "UnsupportedError",
    "UnsupportedMediaError",
    "WrongVerbError",
]

log = logging.getLogger(__name__)

LONGEST_TEXT = 2000  # characters
INTERNAL_TEXT = "internal server error; its log says more"


FAMILIES: dict[type[RepositoryError], int] = {
    NotFoundError: 404,
    OutOfBoundsError: 403,
    RejectedError: 400,
    ConflictError: 409,
    DependencyError: 424,
    CapacityError: 507,
    UnavailableError: 503,
    UnsupportedRequestError: 501,
    RequestCancelledError: 499,
    FailedError: 500,
}

# Where KServe V2's clients expect another number than the rest of the world.
V2_STATUS: dict[type[BaseException], int] = {
    PayloadTooLargeError: 400,
    MiscountError: 500,
    RequestCancelledError: 400,
}

TYPES: dict[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    424: "failed_dependency_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    499: "cancelled_error",
    501: "unsupported_error",
    503: "unavailable_error",
    507: "capacity_error",
}


def cut_off() -> DrainingError:
    """For a request that had not ended when the server did."""
    return DrainingError(
        "the server is shutting down, and this had not ended when its grace was over",
        retry_after_s=5.0,
    )


def status_of(error: BaseException) -> int:
    if isinstance(error, RepositoryError):
        return next((n for family, n in FAMILIES.items() if isinstance(error, family)), 500)
    if isinstance(error, ServerError):
        return error.status
    return error.status_code if isinstance(error, HTTPException) else 500


def status_v2(error: BaseException) -> int:
    return V2_STATUS.get(type(error)) or status_of(error)


def code_of(error: BaseException) -> str:
    """A stable word that clients may branch on."""
    if isinstance(error, (RepositoryError, ServerError)):
        return error.code
    if isinstance(error, HTTPException) and error.status_code < 500:
        return {404: "no_such_path", 405: "method_not_allowed"}.get(error.status_code, "rejected")
    return "internal"


def text_of(error: BaseException) -> str:
    """What a client may read. What it sent comes back to it in parts only."""
    if isinstance(error, (RepositoryError, ServerError)):
        text = str(error) or code_of(error)
        return text if len(text) <= LONGEST_TEXT else f"{text[:1500]} ... {text[-400:]}"
    if isinstance(error, HTTPException) and error.status_code < 500:
        return _litestar_text(error)
    return INTERNAL_TEXT


def _litestar_text(error: HTTPException) -> str:
    """The framework's own refusals, with the fields that it names (its detail alone says only where
    the request went)."""
    extra = error.extra
    if error.status_code == 400 and isinstance(extra, list) and extra:
        found = [p for p in extra if isinstance(p, Mapping) and "message" in p]
        parts = [f"{p['key']}: {p['message']}" if "key" in p else str(p["message"]) for p in found]
        if parts:
            return "; ".join(parts)
    return error.detail


def said_of(error: InvalidTensorError, id: str, model: str) -> InvalidTensorError:
    """What a model refuses, in the words of Triton's core: with the request's id, and the model's name
    where bytes were counted. Before a name that the model does not know it has no id."""
    text = str(error)
    if text.startswith("unexpected inference "):
        return error
    if text.startswith("input byte size mismatch"):
        text = text.replace("'. Expected ", f"' for model '{model}'. Expected ", 1)
    return InvalidTensorError(f"[request id: {id or '<id_unknown>'}] {text}")


def headers_of(error: BaseException) -> dict[str, str]:
    """Retry-After in whole seconds, at least 1, and what the error itself brings."""
    headers: dict[str, str] = {}
    if isinstance(error, (ServerError, HTTPException)):
        headers.update(error.headers or {})
    wait_s = getattr(error, "retry_after_s", None)
    if isinstance(wait_s, (int, float)) and math.isfinite(wait_s):
        headers["Retry-After"] = str(max(1, math.ceil(wait_s)))
    return headers


def is_foreign(error: BaseException) -> bool:
    """Nobody here meant to raise it."""
    if isinstance(error, HTTPException):
        return error.status_code >= 500
    return not isinstance(error, (RepositoryError, ServerError))


def note(error: BaseException, where: str) -> None:
    """Logs what the client is not told. `where`: the request, such as "POST /v1/models/load"."""
    if is_foreign(error):
        log.error("unexpected error in %s", where, exc_info=error)


def body_v2(text: str) -> bytes:
    """KServe V2's error body, compact: its users search for it literally."""
    return encode({"error": text})


def body_native(error: BaseException) -> dict[str, Any]:
    """Both spellings that PolarGrid documents; the first has OpenAI's four keys. A refusal for want
    of room brings its numbers."""
    inner = body_openai(error)["error"]
    if isinstance(error, NoRoomError):
        inner |= {
            "needed": error.needed,
            "free": error.free,
            "device": error.device,
            "residents": error.residents,
            "pinned": error.pinned,
            "asleep": error.asleep,
            "foreign": error.foreign,
        }
    return {"error": inner, "detail": inner["message"]}


def body_openai(error: BaseException) -> dict[str, Any]:
    """OpenAI's four keys. `param`: the field that is wrong, where one is."""
    return {
        "error": {
            "message": text_of(error) + _way_out(error),
            "type": TYPES.get(status_of(error), "server_error"),
            "param": getattr(error, "param", None) or None,
            "code": code_of(error),
        }
    }


def _way_out(error: BaseException) -> str:
    """What to do about the framework's own short words."""
    if not isinstance(error, HTTPException):
        return ""
    if error.status_code == 405:
        allow = (error.headers or {}).get("allow") or (error.headers or {}).get("Allow")
        return f"; use {allow}" if allow else ""
    return "; GET /v1/models lists the models" if error.status_code == 404 else ""


def encode(body: Any) -> bytes:
    """JSON, whatever the strings hold: a lone surrogate from a client must not cost the answer."""
    try:
        return msgspec.json.encode(body)
    except UnicodeEncodeError:
        return msgspec.json.encode(_printable(body))


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, dict):
        return {_printable(k): _printable(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_printable(v) for v in value]
    return value
