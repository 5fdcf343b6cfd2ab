"""What a request with a JSON body may look like, and what its sender is told when it does not.

A body is refused before it is understood: too long (413, by Litestar, at MANAGEMENT_BODY), of
another media type (415), not JSON or nested too deeply (400), of the wrong shape (400, naming the
field and, for an unknown one, the nearest that exists). The inference route has its own limits.
"""

from __future__ import annotations

import difflib
import re
from typing import Any, get_args

import msgspec
from litestar import Request
from litestar.exceptions import InternalServerException
from litestar.exceptions.http_exceptions import RequestEntityTooLarge

from repository.errors import InvalidRequestError
from server.errors import PayloadTooLargeError, UnsupportedMediaError

MANAGEMENT_BODY = 1024**2  # bytes; no management call needs more
ASKED = "asked"  # where in the scope's state the audit log finds what was asked for
_UNKNOWN = re.compile(r"Object contains unknown field `(.*?)`")


class StrictRequest(Request[Any, Any, Any]):
    """Decodes a JSON body straight into the type that the handler's `data` has."""

    async def body(self) -> bytes:
        try:
            raw = await super().body()
        except RequestEntityTooLarge as error:
            raise PayloadTooLargeError(
                f"the body has more than {MANAGEMENT_BODY} bytes; no management call needs as many"
            ) from error
        except InternalServerException as error:
            # Litestar's word for a client that left before its body ended: no fault of ours.
            raise InvalidRequestError("the body ended too early") from error
        field = self.route_handler.parsed_data_field
        if not raw and field is not None and not field.is_optional:
            raise InvalidRequestError("the body is empty; send a JSON object")
        return raw

    async def json(self) -> Any:
        kind, _ = self.content_type
        if kind not in ("", "application/json") and not kind.endswith("+json"):
            raise UnsupportedMediaError(
                f"send JSON (content-type: application/json), not '{kind[:60]}'"
            )
        field = self.route_handler.parsed_data_field
        found = decode(await self.body(), Any if field is None else field.annotation)
        self.scope["state"][ASKED] = found
        return found


def decode(raw: bytes, kind: Any) -> Any:
    """Raises InvalidRequestError. Strict: nothing is coerced."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(_explained(str(error), kind)) from error
    except msgspec.DecodeError as error:
        raise InvalidRequestError(f"the body is not JSON: {error}") from error
    except UnicodeDecodeError as error:
        raise InvalidRequestError("the body is not JSON: it is not UTF-8") from error
    except RecursionError as error:
        raise InvalidRequestError("the body is nested too deeply") from error


async def said_in(request: StrictRequest) -> dict[str, Any]:
    """A JSON object, {} for an empty body. The content type is not looked at, as Triton does not."""
    said: dict[str, Any] = decode(await request.body() or b"{}", dict[str, Any])
    request.scope["state"][ASKED] = said
    return said


def _explained(message: str, kind: Any) -> str:
    found = _UNKNOWN.search(message)
    kind = next(iter(get_args(kind)), kind)  # of a body that may be left out: X | None
    if found is None or not hasattr(kind, "__struct_fields__"):
        return message
    fields = msgspec.structs.fields(kind)
    near = difflib.get_close_matches(found[1], [f.encode_name for f in fields], 1, 0.5)
    name = found[1] if len(found[1]) <= 60 else found[1][:57] + "..."
    known = ", ".join(f.encode_name for f in fields)
    return f"unknown field '{name}'; " + (
        f"did you mean '{near[0]}'?" if near else f"known are {known}"
    )
