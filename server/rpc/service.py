"""Every RPC's way in: its key, its place in the table, its error, its line in the audit log.

A key is looked at before anything of a message is read: who has none is refused by a handler that
reads nothing, so that nobody without a right makes the server hold two gigabytes. What is open to
everybody is answered likewise to who shows no key: how the whole server is, whatever service of it was
named. Messages come as bytes and are read here, because what cannot be read is the client's fault, and
no exception for a log.

Rules: nothing escapes but cancellation; an RPC that the table does not have does not exist.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from grpc import aio

from repository.messages import InferResponse
from server import errors
from server.auth import Headers, Key
from server.intake import adapter_of
from server.metrics.traces import trace_of
from server.patience import error_of
from server.replies import request_id_of
from server.rpc import management
from server.rpc.call import Call
from server.rpc.depot import Depot
from server.rpc.health import Health
from server.rpc.statuses import REQUEST_ID_KEY, code_of, headers_of, text_of, trailing_of
from server.rpc.stream import Stream
from server.rpc.table import BY_PATH, ROWS, Rpc

audit = logging.getLogger("modeldepot.audit")

BROKEN = (aio.AbortError, aio.BaseError, aio.InternalError, aio.UsageError)
DECOUPLED = "ModelInfer RPC doesn't support models with decoupled transaction policy"
Handler = Any


class Service(grpc.GenericRpcHandler):  # type: ignore[misc]
    """What a server of gRPC asks for a handler."""

    def __init__(self, depot: Depot) -> None:
        self._depot = depot
        self._health = Health(depot)
        self._handlers: dict[str, Handler] = {row.path: self._handler(row) for row in ROWS}
        self._unread = {row.path: self._blind(row) for row in ROWS if row.scope is None}

    def service(self, details: Any) -> Handler | None:
        row = BY_PATH.get(details.method)
        if row is None:
            return None
        try:
            headers = headers_of(details.invocation_metadata)
            self._let_in(row, headers)
        except Exception as error:  # noqa: BLE001 - the edge: whatever it is, the client is told
            return _refusing(error)
        if row.scope is None and not self._depot.gate.knows(headers):
            return self._unread[row.path]
        return self._handlers[row.path]

    def _let_in(self, row: Rpc, headers: Headers) -> Key | None:
        who = self._depot.gate.check(headers, row.scope)
        self._depot.restricted.check(row.group, headers)
        return who

    def _handler(self, row: Rpc) -> Handler:
        if row.name == "ModelStreamInfer":
            return grpc.stream_stream_rpc_method_handler(self._stream)
        if row.name == "ModelInfer":
            return grpc.unary_unary_rpc_method_handler(self._infer)
        if row.name == "Watch":
            return grpc.unary_stream_rpc_method_handler(self._watch)
        if row.name == "Check":
            return grpc.unary_unary_rpc_method_handler(self._check)
        return grpc.unary_unary_rpc_method_handler(_coroutine(self._manage, row))

    def _blind(self, row: Rpc) -> Handler:
        """The same answer to an empty message, whatever was sent."""

        async def answer(_: Any, context: Any) -> None:
            if row.name == "Watch":
                await self._watch(b"", context)
            elif row.name == "Check":
                await context.write(await self._check(b"", context))
            else:
                await context.write(await self._manage(row, b"", context))

        return grpc.stream_stream_rpc_method_handler(answer)

    # inference ------------------------------------------------------------------------------------

    async def _infer(self, message: bytes, context: Any) -> bytes:
        headers = headers_of(context.invocation_metadata())
        call = Call(self._depot.door, "ModelInfer", trace_of(headers))
        try:
            await call.take(message, adapter_of(b"", headers))
            del message
            await call.hold()
            if call.decoupled:
                raise errors.UnsupportedError(DECOUPLED)
            said = b"".join(await call.hear(await _answer_of(call.ask())))
        except Exception as error:
            call.fail(error)
            await _abort(context, error)
            raise  # not reached
        else:
            call.end(answered=True)
            return said
        finally:
            call.end()

    async def _stream(self, _: Any, context: Any) -> None:
        headers = headers_of(context.invocation_metadata())
        try:
            await Stream(self._depot, headers, context).run()
        except BROKEN:
            raise
        except Exception as error:  # noqa: BLE001 - as above
            errors.note(error, "ModelStreamInfer")
            await _abort(context, error)

    # health ---------------------------------------------------------------------------------------

    async def _check(self, message: bytes, context: Any) -> bytes:
        try:
            return self._health.check(message)
        except Exception as error:
            errors.note(error, "Check")
            await _abort(context, error)
            raise

    async def _watch(self, message: bytes, context: Any) -> None:
        try:
            await self._health.watch(message, context)
        except BROKEN:
            raise
        except Exception as error:  # noqa: BLE001 - as above
            errors.note(error, "Watch")
            await _abort(context, error)

    # everything else ------------------------------------------------------------------------------

    async def _manage(self, row: Rpc, message: bytes, context: Any) -> bytes:
        headers, depot = headers_of(context.invocation_metadata()), self._depot
        began, status, asked_for = time.perf_counter(), "CANCELLED", ""
        client, who, request_id = host_of(context.peer()), None, request_id_of(headers)
        inside, changes = "", row.changes  # `inside`: who is counted at the turnstile, once let in
        try:
            who = self._let_in(row, headers)
            files = depot.settings.allow_file_override
            asked = management.request_of(row.name, message, files=files)
            asked_for = management.shown(asked)
            changes = changes and not management.only_reads(asked)
            if changes:
                inside = self._enter(who, client)
            answer = await management.RPCS[row.name](depot, asked)
            said = management.reply_of(row.name, answer)
            status = "OK"
            context.set_trailing_metadata(((REQUEST_ID_KEY, request_id),))
            return said
        except Exception as error:
            status = code_of(error).name
            errors.note(error, row.path)
            await _abort(context, error, request_id)
            raise
        finally:
            if inside:
                depot.turnstile.leave(inside)
            if changes:
                _note(who, client, row, asked_for, status, time.perf_counter() - began, request_id)

    def _enter(self, who: Key | None, client: str) -> str:
        """Raises TooManyRequestsError."""
        name = f"key {who.name}" if who else client
        try:
            self._depot.turnstile.enter(name)
        except errors.TooManyRequestsError:
            self._depot.door.shed("rate_limit")
            raise
        return name


def _coroutine(
    manage: Callable[[Rpc, bytes, Any], Awaitable[bytes]], row: Rpc
) -> Callable[[bytes, Any], Awaitable[bytes]]:
    """gRPC asks of a function whether it is a coroutine's, and does not ask a partial one."""

    async def call(message: bytes, context: Any) -> bytes:
        return await manage(row, message, context)

    return call


def _refusing(error: Exception) -> Handler:
    async def refuse(_: Any, context: Any) -> None:
        errors.note(error, "a refusal")
        await _abort(context, error)

    return grpc.stream_stream_rpc_method_handler(refuse)


async def _abort(context: Any, error: Exception, request_id: str = "") -> None:
    """Always raises; gRPC knows of it."""
    await context.abort(code_of(error), text_of(error), trailing_of(error, request_id))


async def _answer_of(asked: asyncio.Future[InferResponse]) -> InferResponse:
    try:
        return await asked
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise  # the client has left, or its time is over
        raise error_of(asked) from None  # type: ignore[misc]  # the model was stopped


def host_of(peer: str) -> str:
    """ "ipv4:10.0.0.1:40000" and "ipv6:%5B::1%5D:40000" without kind and port."""
    kind, _, rest = peer.partition(":")
    if kind not in ("ipv4", "ipv6"):
        return peer
    return rest.rpartition(":")[0].replace("%5B", "").replace("%5D", "").strip("[]")


def _note(
    who: Key | None, client: str, row: Rpc, asked: str, status: str, took_s: float, request_id: str
) -> None:
    audit.info(
        "key=%s client=%s GRPC %r asked=%s status=%s took=%.3fs request=%s",
        repr(who.name) if who else "-",
        client,
        row.path,
        asked,
        status,
        took_s,
        request_id,
    )
