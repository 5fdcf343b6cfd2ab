"""POST /v2/models/NAME[/versions/N]/infer: the hot path (KServe V2 with binary tensors).

    key → body, within its limits → plan → lease → request → answer → send → lease ends

Raw ASGI: it asks for the key, counts, and shows errors itself, with the functions that the other
faces use. Rules: nothing escapes but cancellation; a lease ends after the last byte was handed
over, or as soon as the client is gone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from litestar.types import Receive, Scope, Send

from repository.errors import (
    CapacityError,
    DrainingError,
    FailedError,
    InferenceFailedError,
    QueueFullError,
    UnavailableError,
)
from repository.lifecycle.generation import Generation
from repository.messages import InferRequest, InferResponse
from repository.repository import Repository
from repository.tensors import Buffer
from server import errors
from server.codecs import v2_binary
from server.codecs.v2_paths import route_of
from server.codecs.v2_plan import RAW_PLAN, Plan, plan_of
from server.intake import MAX_BODY, MAX_CHUNKS, ClientGoneError, read_body, read_headers
from server.metrics.meter import UNKNOWN_MODEL, InferMeter, Outcome
from server.patience import answer_of

__all__ = ["InferMeter", "infer", "route_of"]

log = logging.getLogger("modeldepot.v2")

CODE_HEADER = b"x-modeldepot-code"
JSON = (b"content-type", b"application/json")
BINARY = (b"content-type", b"application/octet-stream")
CLOSE = (b"connection", b"close")
SHED: dict[type[Exception], str] = {
    QueueFullError: "queue_full",
    DrainingError: "draining",
    errors.DeadlineError: "deadline",
    errors.PayloadTooLargeError: "body_size",
}


class _Call:
    """One request, for whoever counts it and for the error path."""

    __slots__ = (
        "answering", "batch_size", "compute_s", "model", "queue_s", "read", "samples", "version"
    )  # fmt: skip

    def __init__(self) -> None:
        self.model = UNKNOWN_MODEL
        self.version = 0
        self.queue_s = self.compute_s = 0.0
        self.samples = self.batch_size = 0
        self.read = False  # the whole body is here: the connection can be used again
        self.answering = False  # the status line is out


async def infer(
    scope: Scope,
    receive: Receive,
    send: Send,
    *,
    models: Repository,
    authorize: Callable[[Any], object],
    meter: InferMeter,
    max_body: int = MAX_BODY,
    max_chunks: int = MAX_CHUNKS,
    shed: Callable[[str], None] = lambda reason: None,
) -> None:
    """`authorize(scope)` raises what is to be answered to a request without a right to be here;
    `shed(reason)` is told of one that was turned away for want of room or time."""
    began = time.perf_counter()
    call = _Call()
    outcome: Outcome | None = "canceled"
    try:
        authorize(scope)
        await _serve(call, scope, receive, send, models, meter, max_body, max_chunks)
        outcome = "success"
    except ClientGoneError:
        pass
    except Exception as error:  # noqa: BLE001 - the edge: whatever it is, the client gets an answer
        outcome = outcome_of(error)
        if (reason := SHED.get(type(error))) is not None:
            shed(reason)
        await _refuse(call, scope, send, error)
    finally:
        if outcome is not None:
            meter.done(
                call.model,
                call.version,
                outcome,
                duration_s=time.perf_counter() - began,
                queue_s=call.queue_s,
                compute_s=call.compute_s,
                samples=call.samples,
                batch_size=call.batch_size,
            )


async def _serve(
    call: _Call,
    scope: Any,
    receive: Receive,
    send: Send,
    models: Repository,
    meter: InferMeter,
    max_body: int,
    max_chunks: int,
) -> None:
    route = route_of(scope["path"])
    if route is None:
        raise errors.NoSuchPathError("Not Found")
    if scope["method"] != "POST":
        raise errors.WrongVerbError("POST")
    announced = read_headers(scope["headers"], max_body)
    body = await read_body(receive, announced.length, max_body=max_body, max_chunks=max_chunks)
    call.read = True
    header, blobs = v2_binary.split(body, announced.json_length)
    raw = announced.json_length is not None and not header
    plan = RAW_PLAN if raw else known_plan_of(header) if announced.json_length else plan_of(header)
    lease, used = models.lease(*route), False
    lease.begin()
    try:
        gen = lease.generation
        call.model, call.version = gen.spec.model, gen.spec.version
        meter.begin(call.model, call.version)
        request = _raw(gen, blobs) if raw else v2_binary.assemble(plan, blobs, call.model)
        limit_us = request.parameters.get("timeout", 0)
        future = models.infer(gen, request)
        used = True
        response = await answer_of(future, receive, limit_s=limit_us / 1e6)
        _count(call, gen, request, response)
        await _send_answer(call, send, plan, response)
    finally:
        lease.end(used=used)


# the request --------------------------------------------------------------------------------------


def _raw(gen: Generation, body: memoryview) -> InferRequest:
    loaded = gen.loaded
    if loaded is None:
        raise InferenceFailedError(f"model '{gen.spec.model}' serves without having said how")
    batched = loaded.max_batch_size > 0
    return v2_binary.raw_request(loaded.inputs, body, gen.spec.model, batched=batched)


# the answer ---------------------------------------------------------------------------------------


def _count(call: _Call, gen: Generation, request: InferRequest, response: InferResponse) -> None:
    call.queue_s, call.compute_s = response.queue_s, response.compute_s
    call.batch_size = response.batch_size
    shape = request.inputs[0].shape if request.inputs else ()
    batched = gen.loaded is not None and gen.loaded.max_batch_size > 0
    call.samples = shape[0] if batched and shape else 1


async def _send_answer(call: _Call, send: Send, plan: Plan, response: InferResponse) -> None:
    header_length, buffers, total = v2_binary.encode(plan, response, call.model, call.version)
    headers = [BINARY if header_length else JSON, (b"content-length", b"%d" % total)]
    if header_length:
        headers.append((b"inference-header-content-length", b"%d" % header_length))
    call.answering = True
    await _send(send, 200, headers, buffers)


async def _send(
    send: Any, status: int, headers: list[tuple[bytes, bytes]], buffers: Sequence[Buffer]
) -> None:
    last = len(buffers) - 1
    try:
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for i, body in enumerate(buffers):
            await send({"type": "http.response.body", "body": body, "more_body": i < last})
    except OSError:
        raise ClientGoneError from None


# errors -------------------------------------------------------------------------------------------


def outcome_of(error: Exception) -> Outcome | None:
    """How a request that ended so is counted; None: it was none, for want of a key."""
    if isinstance(error, (errors.UnauthorizedError, errors.ForbiddenError)):
        return None
    if isinstance(error, errors.DeadlineError):
        return "timeout"
    if isinstance(error, (UnavailableError, CapacityError)):
        return "rejected"
    if isinstance(error, FailedError) or errors.is_foreign(error):
        return "backend_error"
    return "bad_request"


async def _refuse(call: _Call, scope: Any, send: Send, error: Exception) -> None:
    """Never raises but for cancellation."""
    errors.note(error, f"POST {scope['path']!r}")
    if call.answering:
        return  # half an answer is out; the server closes the connection
    body = errors.body_v2(errors.text_of(error))
    headers = [JSON, (b"content-length", b"%d" % len(body))]
    headers.append((CODE_HEADER, errors.code_of(error).encode()))
    headers += [(k.lower().encode(), v.encode()) for k, v in errors.headers_of(error).items()]
    if not call.read:
        headers.append(CLOSE)  # what is left of the body would be taken for the next request
    call.answering = True
    try:
        await _send(send, errors.status_v2(error), headers, [body])
    except ClientGoneError:
        return
    except Exception:
        log.exception("an error could not be answered")
