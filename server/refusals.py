"""What the door itself refuses a request with, as one tree.

ServerError                     raised by the door itself
├── MalformedHttpError    400   bytes that are no request
├── LoadRefusedError      400   a load in Triton's way: its name, its parameters, or the model failed
├── UnauthorizedError     401   no key, or one that we do not know
├── ForbiddenError        403   a good key without the scope
├── NoSuchPathError       404
├── WrongVerbError        405
├── TooSlowError          408   a client that stopped half-way
├── PayloadTooLargeError  413   (V2: 400, as Triton's clients expect)
├── UnsupportedMediaError 415
├── TooManyRequestsError  429
├── HeadTooLargeError     431
├── FailedToLoadError     500   a load in Triton's way that found nothing it could try
└── UnsupportedError      501   a part of a protocol that this server does not speak

MiscountError             400   a tensor of JSON with too few or too many elements (V2: 500, as Triton)

Plain classes that need no framework, so that a process which only reads and writes bodies can raise
them too. How they are shown: `server.errors`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from repository.errors import InvalidTensorError


class ServerError(Exception):
    """`headers` go onto the answer as they are."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"

    def __init__(
        self,
        message: str,
        *,
        headers: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.headers = dict(headers or {})
        self.retry_after_s = retry_after_s


class MalformedHttpError(ServerError):
    status = 400
    code = "malformed_http"

    def __init__(self, message: str = "") -> None:
        super().__init__(message or "this is not HTTP/1.1, or it is damaged: send a whole request")


class LoadRefusedError(ServerError):
    status = 400
    code = "load_refused"


class FailedToLoadError(ServerError):
    status = 500
    code = "failed_to_load"


class UnauthorizedError(ServerError):
    status = 401
    code = "unauthorized"

    def __init__(self, message: str, *, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message, headers={"WWW-Authenticate": "Bearer"} | dict(headers or {}))


class ForbiddenError(ServerError):
    status = 403
    code = "forbidden"


class NoSuchPathError(ServerError):
    status = 404
    code = "no_such_path"


class WrongVerbError(ServerError):
    """`allow`: the verbs that would do, such as "POST"."""

    status = 405
    code = "method_not_allowed"

    def __init__(self, allow: str) -> None:
        super().__init__("Method Not Allowed", headers={"Allow": allow})


class TooSlowError(ServerError):
    status = 408
    code = "too_slow"


class PayloadTooLargeError(ServerError):
    status = 413
    code = "payload_too_large"


class UnsupportedMediaError(ServerError):
    status = 415
    code = "unsupported_media"


class TooManyRequestsError(ServerError):
    status = 429
    code = "too_many_requests"


class HeadTooLargeError(ServerError):
    status = 431
    code = "head_too_large"


class UnsupportedError(ServerError):
    status = 501
    code = "unsupported"


class MiscountError(InvalidTensorError):
    pass
