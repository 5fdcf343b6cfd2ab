"""KServe V2's model repository extension, as Triton has it.

    POST /v2/repository/index                  every model, its versions, and why one does not serve
    POST /v2/repository/models/NAME/load       answers when every version serves, or why not
    POST /v2/repository/models/NAME/unload     answers soon; whatever runs ends behind it

Names may hold '/'. Bodies are JSON whatever their media type, and may be left out. Those that bring a
model's files may be as long as inference requests, if files may be brought at all; they are read and
decoded beside the loop.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from typing import Any

from litestar import Request, Response, Router, post
from litestar.di import NamedDependency
from litestar.exceptions import InternalServerException

from repository.errors import InvalidRequestError
from repository.repository import Repository
from server import errors
from server.errors import NoSuchPathError, PayloadTooLargeError, UnsupportedError
from server.limits import ASKED, MANAGEMENT_BODY, decode
from server.refusals import FailedToLoadError, LoadRefusedError
from server.settings import Settings
from server.triton import control
from server.triton.index import index

BELOW = "/v2/repository/"
MODELS, LOAD, UNLOAD, INDEX = "models/", "/load", "/unload", "index"
OTHER = "'repository_name' specification is not supported"
CHUNK = 1 << 20  # characters of base64 at a time; a multiple of 4
MOST_PARAMETERS = 2000  # more than a load may bring files; each costs a step on the loop
LONGEST_NOTED = 1000  # characters of a parameter that the audit log is given
Ask = Request[Any, Any, Any]
Reply = Response[bytes]


@post("/index", status_code=200, request_max_body_size=None)
async def listed(request: Ask, models: NamedDependency[Repository]) -> Reply:
    asked = request.scope["state"][ASKED] = _decoded(await _body(request, MANAGEMENT_BODY))
    entries = await index(models, ready=_flag(asked, "ready"))
    return Response(errors.encode(entries), status_code=200, media_type="application/json")


@post("/{rest:path}", status_code=200, request_max_body_size=None)
async def controlled(
    request: Ask, models: NamedDependency[Repository], settings: NamedDependency[Settings]
) -> Reply:
    name, verb = _asked(request.scope["path"].removeprefix(BELOW))
    files = settings.allow_file_override and verb == LOAD
    body = await _body(request, settings.max_body if files else MANAGEMENT_BODY)
    asked = (await asyncio.to_thread(_decoded, body)) if files else _decoded(body)
    parameters = _mapping(asked, "parameters")
    if len(parameters) > MOST_PARAMETERS:
        raise InvalidRequestError(
            f"the request has {len(parameters)} parameters; at most {MOST_PARAMETERS}"
        )
    request.scope["state"][ASKED] = {key: _noted(key, said) for key, said in parameters.items()}
    if verb == UNLOAD:
        await control.unload(models, name, parameters)
    else:
        read = (
            await asyncio.to_thread(_parameters, parameters) if files else _parameters(parameters)
        )
        await control.load(models, name, read, allow_files=settings.allow_file_override)
    return Response(b"", status_code=200, media_type="application/json")


def _asked(rest: str) -> tuple[str, str]:
    """The model's name and the verb. Raises NoSuchPathError, UnsupportedError."""
    here = rest.startswith(MODELS)
    for verb in (LOAD, UNLOAD):
        if rest.endswith(verb) and (here or f"/{MODELS}" in rest):
            if not here:
                raise UnsupportedError(OTHER)
            name = rest[len(MODELS) : -len(verb)]
            if name:
                return name, verb
    if rest.endswith(f"/{INDEX}") and rest.count("/") == 1:
        raise UnsupportedError(OTHER)
    raise NoSuchPathError("Not Found")


async def _body(request: Ask, limit: int) -> bytes:
    """Raises PayloadTooLargeError as soon as it is known that there are more than `limit` bytes."""
    if (request.content_length or 0) > limit:
        raise _too_large(limit)
    parts: list[bytes] = []
    size = 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise _too_large(limit)
            parts.append(part)
    except InternalServerException as error:
        # Litestar's word for a client that left before its body ended.
        raise InvalidRequestError("the body ended too early") from error
    return b"".join(parts)


def _too_large(limit: int) -> PayloadTooLargeError:
    return PayloadTooLargeError(
        f"the body has more than {limit} bytes; a load that brings files may have --max-body bytes, "
        "if --allow-file-override is set"
    )


def _decoded(body: bytes) -> dict[str, Any]:
    asked = decode(body, Any) if body.strip() else {}
    if not isinstance(asked, dict):
        raise InvalidRequestError("the body must be a JSON object")
    return asked


def _mapping(asked: dict[str, Any], key: str) -> dict[str, Any]:
    found = asked.get(key)
    if found is not None and not isinstance(found, dict):
        raise InvalidRequestError(f"Invalid value for '{key}': expected an object")
    return found or {}


def _flag(asked: dict[str, Any], key: str) -> bool:
    found = asked.get(key, False)
    if not isinstance(found, bool):
        raise InvalidRequestError(f"Invalid value for '{key}': expected a boolean")
    return found


def _parameters(said: dict[str, Any]) -> dict[str, control.Value]:
    """Files as bytes. Raises FailedToLoadError for what is no parameter of a load, in Triton's words."""
    read: dict[str, control.Value] = {}
    for key, value in said.items():
        if key == control.CONFIG and isinstance(value, str):
            read[key] = value
        elif key.startswith(control.FILE) and isinstance(value, str):
            read[key] = _bytes(key, value)
        else:
            raise FailedToLoadError("unexpected error on creating Triton parameter")
    return read


def _bytes(key: str, text: str) -> bytes:
    """In pieces, so that other threads have their turns."""
    try:
        pieces = [
            base64.b64decode(text[at : at + CHUNK], validate=True)
            for at in range(0, len(text), CHUNK)
        ]
    except (binascii.Error, ValueError) as error:
        raise LoadRefusedError(f"the content of '{key[:200]}' is not base64") from error
    return b"".join(pieces)


def _noted(key: str, said: Any) -> Any:
    """For the audit log, which does not hold what a file holds, and of what is long the beginning."""
    if not isinstance(said, str):
        return said if isinstance(said, bool | int | float) else f"<{type(said).__name__}>"
    return f"<{len(said)} characters>" if key.startswith(control.FILE) else said[:LONGEST_NOTED]


router = Router(BELOW.rstrip("/"), route_handlers=[listed, controlled])
