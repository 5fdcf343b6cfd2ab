"""{"message", "code", "type", "link"}, as Marqo says what went wrong: its clients look for `code` and
`type`, and call an error without them "unhandled_error". Missing parameters are told in a list.
"""

from __future__ import annotations

from typing import Any

from repository.names import shown
from server import errors


class NotCachedError(errors.ServerError):
    """No such model is loaded there. `device` empty: on none."""

    status = 404
    code = "model_not_in_cache"

    def __init__(self, model: str, device: str = "") -> None:
        where = f" device `{shown(device)}`" if device else ""
        super().__init__(f"The model_name `{shown(model)}`{where} is not cached or found")


class NoCudaError(errors.ServerError):
    status = 400
    code = "hardware_compatability_error"  # as Marqo spells it

    def __init__(self) -> None:
        super().__init__("CUDA is not available on this instance")


class ParameterError(errors.ServerError):
    """A parameter of the query that is missing, empty or given twice."""

    status = 422
    code = "unprocessable_entity"

    def __init__(self, name: str, message: str, kind: str) -> None:
        super().__init__(f"{name}: {message}")
        self.detail = [{"loc": ["query", name], "msg": message, "type": kind}]


def body_marqo(error: BaseException) -> tuple[int, Any]:
    """The status and the body."""
    status = errors.status_of(error)
    kind = "invalid_request" if status < 500 else "internal"
    rest = {"code": errors.code_of(error), "type": kind}
    if isinstance(error, ParameterError):
        return status, {"detail": error.detail, **rest, "link": ""}
    return status, {"message": errors.text_of(error), **rest, "link": None}
