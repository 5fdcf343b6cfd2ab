"""{"message", "code", "type", "link"}, as Marqo says what went wrong."""

from __future__ import annotations

from typing import Any

from server import errors


def body_marqo(error: BaseException) -> tuple[int, Any]:
    """The status and the body."""
    status = errors.status_of(error)
    kind = "invalid_request" if status < 500 else "internal"
    body = {
        "message": errors.text_of(error),
        "code": errors.code_of(error),
        "type": kind,
        "link": None,
    }
    return status, body
