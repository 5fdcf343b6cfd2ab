"""One inference request, from its head to its answer, without a socket.

    admit → (the body comes) → take → ask → a future → hear → answer
                                  │    └─ no model ─→ wait, and ask again
                                  └────── any error ────────→ refuse
    and, whatever happened, end

Both routes go through these stages, the ASGI one (`faces.v2_infer`) as a coroutine, the protocol's
(`fast`) in callbacks; so what is decoded, allowed, counted and said of an error is the same on both.

Rules: `end` is called once a request is over, however it ended; its lease ends and it is counted
then, exactly once. No stage waits for anything but those that say so. Nothing here knows how bytes
come or go.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from time import perf_counter
from typing import NamedTuple

from repository.errors import (
    CapacityError,
    DrainingError,
    FailedError,
    InferenceFailedError,
    QueueFullError,
    RequestTimeoutError,
    StillLoadingError,
    UnavailableError,
)
from repository.lifecycle.generation import Generation, Lease
from repository.messages import InferRequest, InferResponse
from repository.repository import Repository
from repository.tensors import Buffer
from server import errors
from server.codecs import v2_binary
from server.codecs.v2_binary import Encoded
from server.codecs.v2_paths import Route, route_of
from server.codecs.v2_plan import RAW_PLAN, Plan, known_plan_of, naming, plan_of
from server.intake import MAX_BODY, MAX_CHUNKS, adapter_of, read_headers
from server.metrics.meter import UNKNOWN_MODEL, InferMeter, Outcome
from server.metrics.traces import Trace, trace_of
from server.scribes.scribes import LARGE_JSON, Scribes, writes_large
from server.waiting import WaitingRoom

Header = tuple[bytes, bytes]  # names in lower case

CODE_HEADER = b"x-modeldepot-code"
JSON = (b"content-type", b"application/json")
BINARY = (b"content-type", b"application/octet-stream")
CLOSE = (b"connection", b"close")
SHED: dict[type[Exception], str] = {
    QueueFullError: "queue_full",
    DrainingError: "draining",
    RequestTimeoutError: "deadline",
    StillLoadingError: "deadline",
    errors.PayloadTooLargeError: "body_size",
}


class Head(NamedTuple):
    """What the head of an admitted request says. `length`: bytes of the body, -1 where it is not
    said; `json_length`: Inference-Header-Content-Length as it came; `adapter`: the one that it names
    for all rows; `trace`: the one that it is part of, for whoever measures."""

    route: Route
    length: int
    json_length: bytes | None
    adapter: str | None = None
    trace: Trace | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """What all inference requests of a server pass through.

    authorize   raises what is to be answered to a request without a right to be here
    epoch       as long as it is the same, so is what `authorize` says of the same headers
    shed        is told why one was turned away for want of room or time
    scribes     for large JSON; without them it is read and written on the loop
    waiting     where requests are whose model loads
    """

    models: Repository
    meter: InferMeter
    authorize: Callable[[Iterable[Header]], object] = lambda headers: None
    epoch: Callable[[], int] = lambda: 0
    shed: Callable[[str], None] = lambda reason: None
    max_body: int = MAX_BODY
    max_chunks: int = MAX_CHUNKS
    scribes: Scribes | None = None
    waiting: WaitingRoom = field(default_factory=WaitingRoom)

    def admit(self, method: str, path: str, headers: Iterable[Header], query: bytes) -> Head:
        """Raises what the request is to be refused with before its body is read."""
        self.authorize(headers)
        route = route_of(path)
        if route is None:
            raise errors.NoSuchPathError("Not Found")
        if method != "POST":
            raise errors.WrongVerbError("POST")
        announced = read_headers(headers, self.max_body)
        adapter = adapter_of(query, headers)
        return Head(route, announced.length, announced.json_length, adapter, trace_of(headers))

    def note(self, error: Exception, path: str) -> Outcome | None:
        """Tells whoever has to know that a request was refused. Returns how it is counted."""
        if (reason := SHED.get(type(error))) is not None:
            self.shed(reason)
        errors.note(error, f"POST {path!r}")
        return outcome_of(error)


class Refusal(NamedTuple):
    status: int
    headers: list[Header]
    body: bytes


class Call:
    """One request. The stages in the order above; `path` is for the log."""

    __slots__ = (
        "_asked", "_began", "_blobs", "_ended", "_heard", "_lease", "_outcome", "_plan", "_raw",
        "_read", "_response", "_rows", "_text", "_used", "batch_size", "compute_s", "door", "head",
        "model", "path", "queue_s", "samples", "version",
    )  # fmt: skip

    def __init__(self, door: Door, path: str) -> None:
        self.door = door
        self.path = path
        self._began = self._heard = perf_counter()
        self._asked = 0.0  # when its model was asked, or would have been had it been loaded
        self._lease: Lease | None = None
        self._outcome: Outcome | None = "canceled"
        self._plan: Plan | None = None
        self._read = self._used = self._ended = False
        self.model = UNKNOWN_MODEL
        self.version = 0
        self.queue_s = self.compute_s = 0.0
        self.samples = self.batch_size = 0

    # the request ----------------------------------------------------------------------------------

    def take(self, head: Head, body: Buffer) -> None:
        """The whole body is here. Raises InvalidRequestError."""
        self._read = True  # the connection can be used again
        self.head = head
        self._text: Buffer
        if head.json_length is None and len(body) >= LARGE_JSON and self.door.scribes is not None:
            # All of it is JSON, and a copy of it would hold up the loop as long as a hundred requests.
            self._text, self._blobs, self._raw = body, memoryview(b""), False
            return
        self._text, self._blobs = v2_binary.split(body, head.json_length)
        self._raw = head.json_length is not None and not self._text

    @property
    def is_long(self) -> bool:
        """`read` must come before `ask`."""
        return len(self._text) >= LARGE_JSON and self.door.scribes is not None

    async def read(self) -> None:
        """Reads a long request without holding up the loop. Raises as `ask` does."""
        assert self.door.scribes is not None
        self._plan = naming(await self.door.scribes.plan_of(self._text), self.head.adapter)
        self._text = b""  # a large body need not be kept until the answer

    def ask(self) -> asyncio.Future[InferResponse]:
        """Asks the model. Raises what the request is to be refused with."""
        plan = self._plan
        if plan is None:
            plan = self._plan = self._planned()
        door = self.door
        lease = self._lease
        if lease is None:
            lease = door.models.lease(*self.head.route)
            lease.begin()
            self._lease = lease
        gen = lease.generation
        spec = gen.spec
        self.model, self.version = spec.model, spec.version
        door.meter.begin(spec.model, spec.version)
        if self._raw:
            request = _raw(gen, self._blobs)
            request.parameters = plan.parameters
        else:
            request = v2_binary.assemble(plan, self._blobs, spec.model)
        future = door.models.infer(gen, request)
        self._used = True
        self._asked = self._asked or perf_counter()
        self._rows = _rows(gen, request)
        return future

    def wait(self, error: Exception) -> asyncio.Future[None] | None:
        """After `ask` has raised: waits for the model, where it may be loaded for a request; then
        `ask` again. None: the request is to be refused with `error`; raises what else it is."""
        if self._lease is not None:
            return None
        self._asked = perf_counter()
        return self.door.waiting.enter(
            self.door.models,
            error,
            *self.head.route,
            size=max(self.head.length, len(self._text) + len(self._blobs)),
            take=self._hold,
        )

    def _hold(self, lease: Lease) -> None:
        self._lease = lease

    def _planned(self) -> Plan:
        adapter = self.head.adapter
        if self._raw:
            return naming(RAW_PLAN, adapter)
        # Where the data is in the JSON itself, the same will hardly come again.
        text = bytes(self._text)  # it is: only of a long one there may be a view
        if self.head.json_length is None:
            return naming(plan_of(text), adapter)
        return known_plan_of(text, adapter)

    # the answer -----------------------------------------------------------------------------------

    def hear(self, response: InferResponse) -> None:
        """What the model answered."""
        self._response = response
        self._heard = perf_counter()
        self.queue_s, self.compute_s = response.queue_s, response.compute_s
        self.batch_size = response.batch_size
        self.samples = self._rows

    @property
    def answers_long(self) -> bool:
        """`write` must be used in place of `answer`."""
        plan = self._plan
        assert plan is not None
        if (plan.rest_binary and not plan.outputs) or self.door.scribes is None:
            return False
        return writes_large(plan, self._response)

    async def write(self) -> Encoded:
        """Writes a long answer without holding up the loop. Raises as `answer` does."""
        scribes = self.door.scribes
        assert scribes is not None and self._plan is not None
        return await scribes.encode(self._plan, self._response, self.model, self.version)

    def answer(self) -> Encoded:
        """Raises what the request is to be refused with after all."""
        assert self._plan is not None
        return v2_binary.encode(self._plan, self._response, self.model, self.version)

    def refuse(self, error: Exception) -> Refusal:
        """What to say instead. Ends the lease; never raises."""
        self._release()
        self._outcome = self.door.note(error, self.path)
        body = errors.body_v2(errors.text_of(error))
        headers = refusal_headers(error, len(body), read=self._read)
        return Refusal(errors.status_v2(error), headers, body)

    # the end --------------------------------------------------------------------------------------

    def end(self, *, answered: bool = False) -> None:
        """It is over. `answered`: the answer was handed over; else it was refused, or else its
        client has left. Again: nothing."""
        if self._ended:
            return
        self._ended = True
        self._release()
        outcome = "success" if answered else self._outcome
        if outcome is None:
            return
        now = perf_counter()
        self.door.meter.done(
            self.model,
            self.version,
            outcome,
            duration_s=now - self._began,
            queue_s=self.queue_s,
            input_s=self._asked - self._began,
            compute_s=self.compute_s,
            output_s=now - self._heard,
            samples=self.samples,
            batch_size=self.batch_size,
            trace=self.head.trace if answered else None,
        )

    def _release(self) -> None:
        lease = self._lease
        if lease is not None:
            self._lease = None
            lease.end(used=self._used)


def answer_headers(header_length: int | None, total: int) -> list[Header]:
    """Of a good answer."""
    headers = [BINARY if header_length else JSON, (b"content-length", b"%d" % total)]
    if header_length:
        headers.append((b"inference-header-content-length", b"%d" % header_length))
    return headers


def refusal_headers(error: Exception, length: int, *, read: bool) -> list[Header]:
    """Of an error's body of `length` bytes. `read`: the request's body has been."""
    headers = [JSON, (b"content-length", b"%d" % length)]
    headers.append((CODE_HEADER, errors.code_of(error).encode()))
    headers += [(k.lower().encode(), v.encode()) for k, v in errors.headers_of(error).items()]
    if not read:
        headers.append(CLOSE)  # what is left of the body would be taken for the next request
    return headers


def outcome_of(error: Exception) -> Outcome | None:
    """How a request that ended so is counted; None: it was none, for want of a key."""
    if isinstance(error, (errors.UnauthorizedError, errors.ForbiddenError)):
        return None
    if isinstance(error, RequestTimeoutError):
        return "timeout"
    if isinstance(error, (UnavailableError, CapacityError)):
        return "rejected"
    if isinstance(error, FailedError) or errors.is_foreign(error):
        return "backend_error"
    return "bad_request"


def _raw(gen: Generation, body: memoryview) -> InferRequest:
    loaded = gen.loaded
    if loaded is None:
        raise InferenceFailedError(f"model '{gen.spec.model}' serves without having said how")
    batched = loaded.max_batch_size > 0
    return v2_binary.raw_request(loaded.inputs, body, gen.spec.model, batched=batched)


def _rows(gen: Generation, request: InferRequest) -> int:
    """Of the batch axis; 1 where the model does not batch."""
    shape = request.inputs[0].shape if request.inputs else ()
    batched = gen.loaded is not None and gen.loaded.max_batch_size > 0
    return shape[0] if batched and shape else 1
