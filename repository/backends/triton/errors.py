"""Errors in the words of a model written for Triton, and in ours.

What a model answers with (TritonError) has one of eight codes. They become classes of ours, so that
every door finds its number by the one map; what other models answered with comes back as codes.
"""

from __future__ import annotations

import enum
from typing import ClassVar

from repository.errors import (
    AlreadyThereError,
    CapacityError,
    ConflictError,
    InferenceFailedError,
    InvalidRequestError,
    NotFoundError,
    RejectedError,
    RepositoryError,
    RequestCancelledError,
    UnavailableError,
    UnsupportedRequestError,
)


class ErrorCode(enum.IntEnum):
    """As TRITONSERVER_Error_Code counts them."""

    UNKNOWN = 0
    INTERNAL = 1
    NOT_FOUND = 2
    INVALID_ARG = 3
    UNAVAILABLE = 4
    UNSUPPORTED = 5
    ALREADY_EXISTS = 6
    CANCELLED = 7


OURS: dict[ErrorCode, type[RepositoryError]] = {
    ErrorCode.UNKNOWN: InferenceFailedError,
    ErrorCode.INTERNAL: InferenceFailedError,
    ErrorCode.NOT_FOUND: NotFoundError,
    ErrorCode.INVALID_ARG: InvalidRequestError,
    ErrorCode.UNAVAILABLE: UnavailableError,
    ErrorCode.UNSUPPORTED: UnsupportedRequestError,
    ErrorCode.ALREADY_EXISTS: AlreadyThereError,
    ErrorCode.CANCELLED: RequestCancelledError,
}
THEIRS: dict[type[RepositoryError], ErrorCode] = {  # the first that fits
    AlreadyThereError: ErrorCode.ALREADY_EXISTS,
    NotFoundError: ErrorCode.NOT_FOUND,
    RejectedError: ErrorCode.INVALID_ARG,
    UnavailableError: ErrorCode.UNAVAILABLE,
    CapacityError: ErrorCode.UNAVAILABLE,
    UnsupportedRequestError: ErrorCode.UNSUPPORTED,
    ConflictError: ErrorCode.ALREADY_EXISTS,
    RequestCancelledError: ErrorCode.CANCELLED,
}


class TritonModelException(Exception):  # noqa: N818 - the name that models know
    """What every call in `triton_python_backend_utils` raises, and what a model may raise."""

    def message(self) -> str:
        return str(self)


class TritonError:
    """What one request fails with. No exception: it is put into an InferenceResponse."""

    UNKNOWN: ClassVar = ErrorCode.UNKNOWN
    INTERNAL: ClassVar = ErrorCode.INTERNAL
    NOT_FOUND: ClassVar = ErrorCode.NOT_FOUND
    INVALID_ARG: ClassVar = ErrorCode.INVALID_ARG
    UNAVAILABLE: ClassVar = ErrorCode.UNAVAILABLE
    UNSUPPORTED: ClassVar = ErrorCode.UNSUPPORTED
    ALREADY_EXISTS: ClassVar = ErrorCode.ALREADY_EXISTS
    CANCELLED: ClassVar = ErrorCode.CANCELLED

    def __init__(self, message: str, code: int = ErrorCode.INTERNAL) -> None:
        try:
            self._code = ErrorCode(code)
        except ValueError as error:
            raise TritonModelException(
                f"{code!r} is no error code; use one of TritonError's"
            ) from error
        self._message = str(message)

    def message(self) -> str:
        return self._message

    def code(self) -> ErrorCode:
        return self._code

    def __str__(self) -> str:
        return self._message


def ours(error: TritonError) -> RepositoryError:
    return OURS[error.code()](error.message())


def theirs(error: RepositoryError) -> TritonError:
    code = next((c for kind, c in THEIRS.items() if isinstance(error, kind)), ErrorCode.INTERNAL)
    return TritonError(str(error), code)
