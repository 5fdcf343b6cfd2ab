"""{"error": {"message", "type", "param", "code"}}, as Aphrodite says what went wrong."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from server import errors


def body_aphrodite(error: BaseException) -> tuple[int, Any]:
    """The status and the body."""
    status = errors.status_of(error)
    inner = {
        "message": errors.text_of(error),
        "type": HTTPStatus(status).phrase,
        "param": getattr(error, "param", None) or None,
        "code": status,
    }
    return status, {"error": inner}
