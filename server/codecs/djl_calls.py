"""What is said in a call about adapters: the query and a JSON body with the same keys, as one.

    name src preload pin    what they are to DJL Serving
    all others              options, handed to the model as texts

Rules: of a key that both have, the query's counts. One that a query has twice is refused: each reader
would take another one. JSON's null is as good as none. So is an empty text, but for `preload` and `pin`,
which must be true or false.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias
from urllib.parse import parse_qsl

import msgspec

from repository.errors import InvalidRequestError
from repository.names import shown

KNOWN = frozenset({"name", "src", "preload", "pin"})
TRUTHS: Mapping[str, bool] = {"true": True, "false": False}
LONGEST_SHOWN = 60  # characters of a client's own word
MOST_DIGITS = 18

Said: TypeAlias = dict[str, str]


def said(query: bytes, body: Mapping[str, Any] | None = None) -> Said:
    """Raises InvalidRequestError."""
    found = {key: _text(key, value) for key, value in (body or {}).items() if value is not None}
    return found | _of_query(query)


def _of_query(query: bytes) -> Said:
    pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True)
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise InvalidRequestError(f"'{shown(twice, LONGEST_SHOWN)}' is there twice; say it once")
    return found


def _text(key: str, value: Any) -> str:
    """As a query would say it."""
    if isinstance(value, str):
        return value
    if isinstance(value, (bool, int, float)) and key not in ("name", "src"):
        return msgspec.json.encode(value).decode()
    kinds = "a text" if key in ("name", "src") else "a text, a number or true or false"
    raise InvalidRequestError(f"'{shown(key, LONGEST_SHOWN)}' must be {kinds}")


def required(found: Said, key: str) -> str:
    """Raises InvalidRequestError, in DJL's words."""
    value = found.get(key, "")
    if not value:
        raise InvalidRequestError(f"The parameter {key} is required")
    return value


def truth(found: Said, key: str) -> bool | None:
    """None: not said. Raises InvalidRequestError for what is neither true nor false, which DJL would
    take for false."""
    value = found.get(key)
    if value is None:
        return None
    if (known := TRUTHS.get(value.lower())) is None:
        raise InvalidRequestError(
            f"'{key}' must be true or false, not '{shown(value, LONGEST_SHOWN)}'"
        )
    return known


def options(found: Said) -> Said:
    return {key: value for key, value in found.items() if key not in KNOWN}


def number(found: Said, key: str) -> int | None:
    """None: not said. Raises InvalidRequestError."""
    value = found.get(key, "")
    if not value:
        return None
    digits = value.removeprefix("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= MOST_DIGITS):
        raise InvalidRequestError(
            f"'{key}' must be a whole number, not '{shown(value, LONGEST_SHOWN)}'"
        )
    return int(value)
