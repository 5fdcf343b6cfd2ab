"""{"code", "type", "message"}, as DJL Serving says what went wrong."""

from __future__ import annotations

from typing import Any

from server import errors

TYPES = {
    400: "BadRequestException",
    404: "ResourceNotFoundException",
    405: "MethodNotAllowedException",
    409: "ConflictException",
    424: "ModelException",
}


def body_djl(error: BaseException) -> tuple[int, Any]:
    """The status and the body."""
    status = errors.status_of(error)
    kind = TYPES.get(status, "InternalServerException")
    return status, {"code": status, "type": kind, "message": errors.text_of(error)}
