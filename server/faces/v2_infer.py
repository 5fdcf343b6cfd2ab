"""POST /v2/models/NAME[/versions/N]/infer over ASGI (KServe V2 with binary tensors).

    key → body, within its limits → plan → lease → request → answer → send → lease ends

Raw ASGI, one coroutine over the stages of `server.call`, which are also those of the protocol path.
Rules: nothing escapes but cancellation; a lease ends after the last byte was handed over, or as soon
as the client is gone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from litestar.types import Receive, Scope, Send

from repository.errors import RepositoryError
from repository.tensors import Buffer
from server import errors
from server.call import Call, Door
from server.codecs.v2_binary import Encoded
from server.heads import Header, answer_headers
from server.intake import ClientGoneError, read_body
from server.patience import answer_of

log = logging.getLogger("modeldepot.v2")


async def infer(scope: Scope, receive: Receive, send: Send, *, door: Door) -> None:
    call = Call(door, scope["path"])
    line = _Line(send)
    try:
        try:
            encoded = await _answer(call, scope, receive, door)
            header_length, buffers, total, coding = encoded
            await line.send(200, answer_headers(header_length, total, coding), buffers)
        except ClientGoneError:
            return
        except asyncio.CancelledError:
            if line.begun or not door.models.draining:
                raise
            await _refuse(call, line, errors.cut_off())
        except Exception as error:  # noqa: BLE001 - the edge: whatever it is, the client gets an answer
            await _refuse(call, line, error)
        else:
            call.end(answered=True)
    finally:
        call.end()


async def _answer(call: Call, scope: Any, receive: Receive, door: Door) -> Encoded:
    query = scope.get("query_string", b"")
    head = door.admit(scope["method"], scope["path"], scope["headers"], query)
    body = await read_body(receive, head.length, max_body=door.max_body, max_chunks=door.max_chunks)
    call.take(head, body)
    if call.is_long:
        await answer_of(asyncio.ensure_future(call.read()), receive)
    try:
        asked = call.ask()
    except RepositoryError as error:
        waiter = call.wait(error)
        if waiter is None:
            raise
        await answer_of(waiter, receive)
        asked = call.ask()
    call.hear(await answer_of(asked, receive))
    return await call.write() if call.answers_long else call.answer()


async def _refuse(call: Call, line: _Line, error: Exception) -> None:
    """Never raises but for cancellation."""
    refusal = call.refuse(error)
    if line.begun:
        return  # half an answer is out; the server closes the connection
    try:
        await line.send(refusal.status, refusal.headers, [refusal.body])
    except ClientGoneError:
        return
    except Exception:
        log.exception("an error could not be answered")


class _Line:
    """The way to the client. `begun`: the status line is out."""

    __slots__ = ("_send", "begun")

    def __init__(self, send: Any) -> None:
        self._send = send
        self.begun = False

    async def send(self, status: int, headers: list[Header], buffers: Sequence[Buffer]) -> None:
        send, last = self._send, len(buffers) - 1
        self.begun = True
        try:
            await send({"type": "http.response.start", "status": status, "headers": headers})
            for i, body in enumerate(buffers):
                await send({"type": "http.response.body", "body": body, "more_body": i < last})
        except OSError:
            raise ClientGoneError from None
