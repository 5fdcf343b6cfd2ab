"""What a body of POST /v1/load_model or /v1/unload_model asks for.

Three forms of a load, as Aphrodite took them: nothing; JSON, nested ({"model", "config": {...}}) or
flat ({"model", "max_model_len": ...}); a form with a YAML file `config` and a field `model`. `-` in a
key is read as `_`. Which keys a model's config may have is the repository's business.

Whatever cannot be read is an InvalidRequestError (a 400 on this face, also where the media type is the
wrong one): nothing is loaded in place of what could not be understood.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

from multipart import MultipartError, MultipartSegment, PushMultipartParser

from repository.errors import ConfigError, InvalidRequestError
from repository.folder.read_yaml import MAX_DEPTH, read_mapping
from repository.names import shown
from server.limits import decode

Source: TypeAlias = Literal["request", "uploaded", "model_dir", "server"]

PARTS = ("config", "model")  # of a form
MANY = 8  # parts that are read before a form is refused
BAD_YAML = "Invalid YAML config file: "
BAD_JSON = "Invalid JSON in request body: "
BAD_FORM = "Invalid form in request body: "
AS_JSON = "send JSON with 'Content-Type: application/json'"
WAYS = f"{AS_JSON}, a YAML file with -F config=@config.yaml, or no body at all"  # to load
WAYS_OUT = f"{AS_JSON}, or no body at all"  # to unload
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")


class Order(NamedTuple):
    """One load. `model` None: the default one. `config` None: what the model's folder says.

    `named_by`: where the model's name comes from.
    """

    model: str | None = None
    config: dict[str, Any] | None = None
    named_by: Source = "server"

    @property
    def bare(self) -> bool:
        """Nothing was said: what served at the start is meant, as it was."""
        return self.model is None and self.config is None


class _Upload(NamedTuple):
    """A config as it was sent, and how its errors begin."""

    values: dict[str, Any]
    bad: str


def read_load(kind: str, params: Mapping[str, str], raw: bytes) -> Order:
    """`kind`, `params`: the content type, in lower case, and what stands behind it.

    Slow for a large YAML file (a tenth of a second): run it beside the event loop. Raises
    InvalidRequestError.
    """
    if kind == "multipart/form-data":
        return _of_form(_parts(raw, params.get("boundary", "")))
    body = _json(kind, raw, WAYS)
    return Order() if body is None else _of_json(body)


def read_unload(kind: str, raw: bytes) -> str | None:
    """The model's name; None: all of them. Raises InvalidRequestError."""
    body = _json(kind, raw, WAYS_OUT)
    if not body:
        return None
    unknown = [key for key in body if key != "model"]
    if unknown:
        raise InvalidRequestError(f"unknown key '{shown(unknown[0])}'; known is 'model'")
    return _name(body["model"], "no body at all unloads every model")


# JSON --------------------------------------------------------------------------------------------


def _json(kind: str, raw: bytes, ways: str) -> dict[str, Any] | None:
    """None: there is no body. `ways`: what can be sent."""
    if not raw:
        return None
    if kind not in ("", "application/json") and not kind.endswith("+json"):
        looks = "this looks like JSON; " if raw.lstrip()[:1] in (b"{", b"[") else ""
        raise InvalidRequestError(f"cannot read a body of type '{shown(kind)}': {looks}{ways}")
    try:
        body = decode(raw, Any)
    except InvalidRequestError as error:
        why = str(error).removeprefix("the body is not JSON: ")
        raise InvalidRequestError(f"{BAD_JSON}{why}") from error
    if not isinstance(body, dict):
        raise InvalidRequestError(f'{BAD_JSON}it must be an object such as {{"model": NAME}}')
    return body


def _of_json(body: dict[str, Any]) -> Order:
    """Flat keys stand beside `config`, and give way to it where both say something. A `model` or
    `config` that is null says nothing."""
    model = body.pop("model", None)
    nested = body.pop("config", None)
    if nested is not None and not isinstance(nested, dict):
        raise InvalidRequestError(f"{BAD_JSON}'config' must be an object of keys and values")
    upload = _Upload(_plain(body, BAD_JSON), BAD_JSON)
    if nested is not None:
        upload.values.update(_plain(nested, BAD_JSON))
    elif not upload.values:
        return _order(model, None)
    return _order(model, upload)


# forms -------------------------------------------------------------------------------------------


def _parts(raw: bytes, boundary: str) -> dict[str, tuple[str, bytes]]:
    """The form's parts by name: name of the file, and bytes."""
    found: dict[str, tuple[str, bytes]] = {}
    content = bytearray()
    part: MultipartSegment | None = None
    try:
        with PushMultipartParser(boundary, max_segment_count=MANY) as parser:
            for event in parser.parse(raw):
                if isinstance(event, MultipartSegment):
                    part = event
                    content = bytearray()
                elif event:
                    content += event
                elif part is not None:
                    _take(found, part, bytes(content))
    except MultipartError as error:
        raise InvalidRequestError(f"{BAD_FORM}it is no form, or it is cut off; {WAYS}") from error
    return found


def _take(found: dict[str, tuple[str, bytes]], part: MultipartSegment, content: bytes) -> None:
    name = part.name or ""
    if name not in PARTS:
        raise InvalidRequestError(
            f"{BAD_FORM}unknown part '{shown(name)}'; known are {', '.join(PARTS)} (other keys go "
            "into the YAML file)"
        )
    if name in found:
        raise InvalidRequestError(f"{BAD_FORM}the part '{name}' is there twice")
    found[name] = part.filename or "", content


def _of_form(parts: dict[str, tuple[str, bytes]]) -> Order:
    if not parts:
        raise InvalidRequestError(f"{BAD_FORM}it has neither 'config' nor 'model'")
    model: str | None = None
    if "model" in parts:
        try:
            model = parts["model"][1].decode()
        except UnicodeDecodeError as error:
            raise InvalidRequestError(f"{BAD_FORM}'model' is not UTF-8") from error
    if "config" not in parts:
        return _order(model, None)
    return _order(model, _yaml(*parts["config"]))


def _yaml(name: str, raw: bytes) -> _Upload:
    source = name if _FILE.fullmatch(name) else "config.yaml"
    try:
        values = read_mapping(raw, source).values
    except ConfigError as error:
        hint = f"; {error.hint}" if error.hint else ""
        raise InvalidRequestError(f"{BAD_YAML}{error}{hint}") from error
    if not values:
        raise InvalidRequestError(
            f"{BAD_YAML}{source}: there is nothing in it; to load a model as its folder says, send its "
            "name alone"
        )
    return _Upload(_plain(values, BAD_YAML), BAD_YAML)


# both --------------------------------------------------------------------------------------------


def _order(model: Any, upload: _Upload | None) -> Order:
    """A model that is named twice must be named the same."""
    named = None if model is None else _name(model, "leave it out for the default model")
    if upload is None:
        return Order(named, None, "server" if named is None else "request")
    values, bad = upload
    if "model" not in values:
        return Order(named, values, "server" if named is None else "request")
    inner = _name(values.pop("model"), "leave it out for the default model", bad)
    if named not in (None, inner):
        raise InvalidRequestError(
            f"two models are named: '{shown(named or '')}' by the request and '{shown(inner)}' in the "
            "config; leave one of them out"
        )
    return Order(inner, values, "uploaded" if named is None else "request")


def _name(value: Any, instead: str, bad: str = "") -> str:
    if not isinstance(value, str) or not value:
        raise InvalidRequestError(f"{bad}'model' must be the name of a model; {instead}")
    return value


def _plain(values: Mapping[str, Any], bad: str) -> dict[str, Any]:
    """The same with `_` for `-`, if all of it is plain data."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name in found:
            raise InvalidRequestError(f"{bad}the key '{shown(name)}' is there twice")
        if reason := _odd(value, 1):
            raise InvalidRequestError(f"{bad}{shown(name)}: {reason}")
        found[name] = value
    return found


def _odd(value: Any, depth: int) -> str:
    """Why it is not what JSON and YAML both have; empty: it is."""
    if isinstance(value, (dict, list)):
        if depth >= MAX_DEPTH:
            return f"nested deeper than {MAX_DEPTH} levels"
        inner = value.values() if isinstance(value, dict) else value
        return next(filter(None, (_odd(one, depth + 1) for one in inner)), "")
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is no number"
    if isinstance(value, int) and abs(value) >= 2**63:
        return "the number has too many digits"
    if value is None or isinstance(value, (str, bool, int, float)):
        return ""
    return f"a {type(value).__name__} is not plain data; put it in quotes"
