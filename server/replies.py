"""Answers past Litestar's own: with a request id, and noted where somebody will look."""

from __future__ import annotations

import logging
import secrets
from typing import Any

from litestar import Response
from litestar.types import Message, Scope, Send

from repository.errors import RepositoryError
from server import errors
from server.auth import Headers, Key
from server.limits import ASKED
from server.shapes import shape

REQUEST_ID = b"x-request-id"
REQUEST_ID_LONGEST = 128
ASKED_LONGEST = 200  # characters of a request that the audit log keeps
audit = logging.getLogger("modeldepot.audit")


class Answer:
    """`send` that puts the request id on the answer and remembers its status."""

    def __init__(self, send: Send, request_id: str) -> None:
        self.status = 0
        self.request_id = request_id
        self._send = send

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", ()), (REQUEST_ID, self.request_id.encode())]
            message = {**message, "headers": headers}
        await self._send(message)


def told(body: Any, status: int = 200) -> Response[bytes]:
    """Compact JSON."""
    return Response(errors.encode(body), status_code=status, media_type="application/json")


def request_id_of(headers: Headers) -> str:
    """The client's own, if it is printable and short enough; else a new one. Names in lower case."""
    for name, value in headers:
        if name == REQUEST_ID and 0 < len(value) <= REQUEST_ID_LONGEST:
            text = value.decode("latin-1")
            if text.isascii() and text.isprintable():
                return text
    return secrets.token_hex(16)


def note(scope: Scope, who: Key | None, answer: Answer, took_s: float) -> None:
    """Who asked for what, and how it ended. `repr` keeps a client from writing lines of its own."""
    asked = repr(scope.get("state", {}).get(ASKED, ""))[:ASKED_LONGEST]
    audit.info(
        "key=%s client=%s %s %r asked=%s status=%d took=%.3fs request=%s",
        repr(who.name) if who else "-",
        (scope.get("client") or ("-",))[0],
        scope["method"],  # type: ignore[typeddict-item]
        scope["path"][:ASKED_LONGEST],
        asked,
        answer.status,
        took_s,
        answer.request_id,
    )


async def refuse(
    send: Send | Answer, path: str, error: errors.ServerError | RepositoryError
) -> None:
    status, body = shape(path, error)
    headers = {**errors.headers_of(error), "content-type": "application/json"}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    raw.append((b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body, "more_body": False})
