"""{"code", "type", "message"}, as DJL Serving says what went wrong.

`type` is the name of an exception: DJL's own for what DJL refuses too, words like them for the rest.
"""

from __future__ import annotations

from typing import Any

from repository.errors import UnsupportedSourceError
from server import errors

STATUS: dict[type[BaseException], int] = {UnsupportedSourceError: 409}

TYPES = {
    401: "UnauthorizedException",
    403: "ForbiddenException",
    404: "NotFoundException",
    405: "MethodNotAllowedException",
    409: "ConflictException",
    424: "FailedDependencyException",
    503: "ServiceUnavailableException",
    507: "InsufficientCapacityException",
}


def body_djl(error: BaseException) -> tuple[int, Any]:
    """The status and the body."""
    status = STATUS.get(type(error)) or errors.status_of(error)
    rest = "BadRequestException" if status < 500 else "InternalServerException"
    message = errors.text_of(error)
    return status, {"code": status, "type": TYPES.get(status, rest), "message": message}
