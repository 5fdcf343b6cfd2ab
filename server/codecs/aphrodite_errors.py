"""{"error": {"message", "type", "param", "code"}}, as Aphrodite says what went wrong."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from repository.errors import ConfigError
from server import errors


def body_aphrodite(error: BaseException) -> tuple[int, Any]:
    """The status and the body."""
    status = errors.status_of(error)
    inner = {
        "message": _text(error),
        "type": HTTPStatus(status).phrase,
        "param": getattr(error, "param", None) or None,
        "code": status,
    }
    return status, {"error": inner}


def _text(error: BaseException) -> str:
    """With what to do about it: who sends a config has nothing but this text to mend it by."""
    text = errors.text_of(error)
    if isinstance(error, ConfigError) and error.hint and error.hint not in text:
        return f"{text}; {error.hint}"
    return text
