"""Reading the JSON body of an OpenAI request into a struct, and saying what is wrong with it.

Every field that OpenAI documents is known, so that what we cannot do is refused by its name and not
left out in silence. Rules: nothing is coerced; a field that is not known is refused with the nearest
that is; a field that is there twice is refused (each reader would take another one for good).
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from typing import Any, TypeVar

import msgspec

from repository.errors import InvalidRequestError

S = TypeVar("S", bound=msgspec.Struct)

_PLACE = re.compile(r"(.*?) - at `(?:key in )?\$\.?(.*?)`", re.S)
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.S)
_KEYS = msgspec.json.Decoder(dict[str, msgspec.Raw])
MARKS = (b",", b"[", b"{")
MOST_VALUES = 2**19
MOST_FIELDS = 100
DEEPEST = 32  # levels of what is handed on as it came
LONGEST_SHOWN = 60  # characters of a client's own word


class FieldError(InvalidRequestError):
    """`param`: the field that is wrong, as OpenAI's errors name it ("messages[0].content")."""

    code = "invalid_field"

    def __init__(self, message: str, *, param: str = "") -> None:
        super().__init__(message)
        self.param = param


def wrong(param: str, what: str) -> FieldError:
    """`what` is wrong with it: "is missing". Without a param: the text as it is."""
    return FieldError(f"'{param}' {what}" if param else what, param=param)


def read(raw: bytes, kind: type[S]) -> S:
    """Raises InvalidRequestError (mostly FieldError)."""
    if not raw:
        raise InvalidRequestError("the body is empty; send a JSON object")
    # Reading holds up everybody else, and it is values that take time, not their length.
    if sum(map(raw.count, MARKS)) > MOST_VALUES:
        raise InvalidRequestError(
            f"the body has more than {MOST_VALUES} commas and brackets; send a shorter one, or several"
        )
    try:
        fields = _KEYS.decode(raw)
        if len(fields) <= MOST_FIELDS:  # of more, one is unknown
            _check_once(raw, fields)
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        raise _explained(str(error), kind) from error
    except msgspec.DecodeError as error:
        raise InvalidRequestError(f"the body is not JSON: {error}") from error
    except UnicodeDecodeError as error:
        raise InvalidRequestError("the body is not JSON: it is not UTF-8") from error
    except RecursionError as error:
        raise InvalidRequestError("the body is nested too deeply") from error


def _check_once(raw: bytes, fields: Iterable[str]) -> None:
    """The quick look finds a name that stands for a key twice, at any depth; only then is it worth
    reading all of it with a reader that tells."""
    for name in fields:
        key = msgspec.json.encode(name)
        if raw.count(key) > 1 and len(re.findall(re.escape(key) + rb"\s*:", raw)) > 1:
            break
    else:
        return
    for name in _twice(raw):
        raise wrong(shown(name), "is there twice; say it once")


def _twice(raw: bytes) -> list[str]:
    """Names of the outermost object that are there more than once."""
    pairs: list[tuple[str, Any]] = []

    def keep(found: list[tuple[str, Any]]) -> None:
        pairs[:] = found  # the outermost object is the last to end

    json.loads(raw, object_pairs_hook=keep)
    names = [name for name, _ in pairs]
    return [name for name in dict.fromkeys(names) if names.count(name) > 1]


def _explained(message: str, kind: type[msgspec.Struct]) -> FieldError:
    place = _PLACE.fullmatch(message)
    what, param = (place[1], place[2]) if place else (message, "")
    if unknown := _UNKNOWN.fullmatch(what):
        return _unknown(unknown[1], param, kind)
    missing = re.fullmatch(r"Object missing required field `(.*)`", what)
    if missing:
        return wrong(_below(param, missing[1]), "is missing")
    what = what.replace("Expected", "should be", 1).replace("Invalid enum", "has an unknown", 1)
    what = what.replace("Number out", "is a number out", 1)
    return wrong(param.replace("[...]", "[]"), what if param else f"the body {what}")


def _unknown(name: str, param: str, kind: type[msgspec.Struct]) -> FieldError:
    """Nested ones are few: they are told without the nearest."""
    if param:
        return wrong(_below(param, shown(name)), "is not a known field; leave it out")
    known = [f.encode_name for f in msgspec.structs.fields(kind)]
    near = difflib.get_close_matches(name[:LONGEST_SHOWN], known, 1, 0.5)
    hint = f"did you mean '{near[0]}'?" if near else "leave it out"
    return wrong(shown(name), f"is not a known field; {hint}")


def _below(param: str, name: str) -> str:
    return f"{param}.{name}" if param else name


def shown(word: str) -> str:
    cut = word if len(word) <= LONGEST_SHOWN else word[: LONGEST_SHOWN - 3] + "..."
    return cut if cut.isprintable() else ascii(cut)[1:-1]


def check_depth(value: Any, param: str, levels: int = DEEPEST) -> None:
    """Raises FieldError for what is nested deeper than that."""
    level = [value]
    for _ in range(levels):
        level = [
            item
            for outer in level
            if isinstance(outer, (list, dict))
            for item in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise wrong(param, f"is nested deeper than {levels} levels")
