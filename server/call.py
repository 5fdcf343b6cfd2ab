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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import NamedTuple

from repository.errors import (
    CapacityError,
    DrainingError,
    FailedError,
    InvalidTensorError,
    QueueFullError,
    RequestTimeoutError,
    StillLoadingError,
    UnavailableError,
)
from repository.lifecycle.generation import Generation, Lease
from repository.messages import InferRequest, InferResponse
from repository.repository import Repository
from repository.tensors import Buffer, Tensor
from server import errors, extras
from server.codecs import squeeze, v2_binary
from server.codecs.squeeze import Wish
from server.codecs.v2_binary import Encoded
from server.codecs.v2_paths import Route, route_of
from server.codecs.v2_plan import RAW_PLAN, Plan, known_plan_of, naming, plan_of
from server.heads import Header, refusal_headers
from server.intake import MAX_BODY, MAX_CHUNKS, adapter_of, read_headers
from server.metrics.meter import UNKNOWN_MODEL, InferMeter, Outcome
from server.metrics.traces import Trace, trace_of
from server.scribes.scribes import LARGE_JSON, Scribes, writes_large
from server.triton.shm import Regions
from server.waiting import WaitingRoom

NOTHING = memoryview(b"")
DECOUPLED = "HTTP end point doesn't support models with decoupled transaction policy"
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
    for all rows; `trace`: the one that it is part of, for whoever measures; `packing`: what the body
    is compressed with; `wish`: what the answer may be."""

    route: Route
    length: int
    json_length: bytes | None
    adapter: str | None = None
    trace: Trace | None = None
    packing: str | None = None
    wish: Wish | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """What all inference requests of a server pass through.

    authorize   raises what is to be answered to a request without a right to be here
    epoch       as long as it is the same, so is what `authorize` says of the same headers
    shed        is told why one was turned away for want of room or time
    scribes     for large JSON; without them it is read and written on the loop
    waiting     where requests are whose model loads
    regions     clients' shared memory
    aside       threads for what would hold up the loop
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
    regions: Regions = field(default_factory=Regions)
    aside: extras.Aside = field(default_factory=extras.Aside)

    def admit(self, method: str, path: str, headers: Iterable[Header], query: bytes) -> Head:
        """Raises what the request is to be refused with before its body is read."""
        self.authorize(headers)
        route = route_of(path)
        if route is None:
            raise errors.NoSuchPathError("Not Found")
        if method != "POST":
            raise errors.WrongVerbError("POST")
        length, json_length, packing, accepts = read_headers(headers, self.max_body, packed=True)
        return Head(
            route,
            length,
            json_length,
            adapter_of(query, headers),
            trace_of(headers),
            None if packing is None else squeeze.packing_of(packing),
            None if accepts is None else squeeze.wish_of(accepts),
        )

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
        "_asked", "_began", "_blobs", "_ended", "_given", "_heard", "_lease", "_outcome", "_plan",
        "_raw", "_read", "_response", "_rows", "_text", "_used", "batch_size", "compute_s", "door",
        "head", "model", "path", "queue_s", "samples", "version",
    )  # fmt: skip
    _given: extras.Given  # where the plan has extras

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
        """The whole body is here. Raises what the request is to be refused with."""
        self._read = True  # the connection can be used again
        self.head = head
        self._text: Buffer
        json_length = head.json_length
        if head.packing is not None or (
            json_length is None and len(body) >= LARGE_JSON and self.door.scribes is not None
        ):
            # All of it is JSON, and a copy of it would hold up the loop as long as a hundred requests.
            self._text, self._blobs, self._raw = body, NOTHING, False
            return
        self._text, self._blobs = v2_binary.split(body, json_length)
        self._raw = json_length is not None and not self._text
        if len(self._text) < LARGE_JSON or self.door.scribes is None:
            self._plan = self._planned()

    @property
    def is_long(self) -> bool:
        """`read` must come before `ask`."""
        plan = self._plan
        return plan is None or (plan.extras is not None and bool(plan.extras.taken))

    async def read(self) -> None:
        """Reads a request that is long, compressed or in shared memory, without holding up the loop.
        Raises as `ask` does."""
        door = self.door
        if self.head.packing is not None:
            body = await extras.inflate(door.aside, self._text, door.max_body)
            self.take(self.head._replace(packing=None), body)
        plan = self._plan
        if plan is None:
            assert door.scribes is not None
            plan = naming(await door.scribes.plan_of(self._text), self.head.adapter)
            self._text = b""  # a large one need not be kept until the answer
        if plan.extras is not None and plan.extras.taken:
            plan = await extras.fetch(door.aside, door.regions, plan, door.max_body)
        self._plan = plan

    def ask(self) -> asyncio.Future[InferResponse]:
        """Asks the model. Raises what the request is to be refused with."""
        plan = self._plan
        assert plan is not None, "it is long, and has not been read"
        door = self.door
        lease = self._lease
        if lease is None:
            lease = door.models.lease(*self.head.route, plan.parameters)
            lease.begin()
            self._lease = lease
        gen = lease.generation
        spec = gen.spec
        self.model, self.version = spec.model, spec.version
        door.meter.begin(spec.model, spec.version)
        if gen.decoupled:
            raise errors.UnsupportedError(DECOUPLED)
        try:
            if self._raw:
                request = extras.raw_request(gen, self._blobs)
                request.parameters = plan.parameters
            else:
                request = v2_binary.assemble(plan, self._blobs, spec.model)
            if plan.extras is not None:
                self._given = extras.check(door.regions, plan.extras, gen)
            future = door.models.infer(gen, request)
        except InvalidTensorError as error:
            raise errors.said_of(error, plan.id, spec.model) from None
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
        plan, wish = self._plan, self.head.wish
        assert plan is not None
        if plan.extras is not None:
            return True
        if wish is not None and extras.pays(wish, plan, self._response):
            return True
        if (plan.rest_binary and not plan.outputs) or self.door.scribes is None:
            return False
        return writes_large(plan, self._response)

    async def write(self) -> Encoded:
        """Writes a long answer without holding up the loop, or one with something to it. Raises as
        `answer` does."""
        plan, wish, aside = self._plan, self.head.wish, self.door.aside
        assert plan is not None and self._lease is not None
        if plan.extras is not None:
            gen = self._lease.generation
            self._response = await extras.finish(
                aside, plan.extras, self._given, self._response, gen
            )
        encoded = await self._written(plan)
        if wish is not None and extras.pays(wish, plan, self._response):
            encoded = await extras.squeezed(aside, encoded, wish)
        return encoded

    async def _written(self, plan: Plan) -> Encoded:
        scribes, response = self.door.scribes, self._response
        if scribes is None or not writes_large(plan, response):
            return self.answer()
        if plan.extras is not None and plan.extras.given:  # which scribes do not know
            return await self.door.aside.do(False, self.answer)
        return await scribes.encode(plan, response, self.model, self.version)

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
            of=self,
        )

    # for whoever traces it ------------------------------------------------------------------------

    @property
    def request_id(self) -> str:
        return self._plan.id if self._plan is not None else ""

    @property
    def inputs(self) -> Sequence[Tensor]:
        """Put together again: what the model was asked is not kept. Of a raw body: none."""
        plan = self._plan
        if plan is None or not self._used or self._raw:
            return ()
        return v2_binary.assemble(plan, self._blobs, self.model).inputs

    @property
    def outputs(self) -> Sequence[Tensor]:
        return self._response.outputs if self.samples else ()

    def _release(self) -> None:
        lease = self._lease
        if lease is not None:
            self._lease = None
            lease.end(used=self._used)


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


def _rows(gen: Generation, request: InferRequest) -> int:
    """Of the batch axis; 1 where the model does not batch."""
    shape = request.inputs[0].shape if request.inputs else ()
    batched = gen.loaded is not None and gen.loaded.max_batch_size > 0
    return shape[0] if batched and shape else 1
