"""The query of DELETE /models, as Marqo's clients send it: names are in it raw, `/` and `+` included.

So a `+` is no space here: no model's name has one. What else is in the query is nobody's business.
"""

from __future__ import annotations

from urllib.parse import unquote

from server.codecs.marqo_errors import ParameterError

MISSING, EMPTY, TWICE = "value_error.missing", "value_error.empty", "value_error.ambiguous"


def eject_query(raw: bytes) -> tuple[str, str]:
    """The model's name and the device, empty where none is named. Raises ParameterError."""
    given: dict[str, set[str]] = {}
    for part in raw.decode("latin-1").split("&"):
        name, _, value = part.partition("=")
        given.setdefault(unquote(name), set()).add(unquote(value))
    model, device = _only(given, "model_name"), _only(given, "model_device")
    if model is None:
        raise ParameterError("model_name", "field required", MISSING)
    if not model:
        raise ParameterError("model_name", "it is empty; GET /models lists the loaded ones", EMPTY)
    return model, device or ""


def _only(given: dict[str, set[str]], name: str) -> str | None:
    values = given.get(name, {None})
    if len(values) > 1:
        raise ParameterError(name, "given twice, with different values", TWICE)
    return next(iter(values))
