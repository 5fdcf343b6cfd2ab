"""One inference request over gRPC, from its message to its answer: what `server.call` is to HTTP.

    take → ask → a future, or answers one by one → hear → pieces
             └─ no model ─→ wait, and ask again
    and, whatever happened, end

Rules: `end` is called once a request is over, however it ended; its lease ends and it is counted then,
exactly once. Nothing here knows how a message comes or an answer goes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from time import perf_counter

from repository.errors import RepositoryError
from repository.lifecycle.generation import Generation, Lease
from repository.messages import InferRequest, InferResponse
from repository.responding import Responses
from repository.tensors import Buffer, Tensor
from server import errors, extras
from server.call import SHED, Door, outcome_of
from server.codecs.v2_paths import Route
from server.codecs.v2_plan import Plan
from server.metrics.meter import UNKNOWN_MODEL, Outcome
from server.metrics.traces import Trace
from server.rpc.answers import encode
from server.rpc.requests import RAW_CONTENTS, Asked, asked_of, request_of
from server.rpc.wire import cut

PROTOCOL = "grpc"
NOTHING = Asked(Route("", None), Plan(()))
LARGE = 256 * 1024  # bytes of a message beside its raw contents that are read in a thread


class Call:
    """`where`: for the log. `asked` is NOTHING until `take` has returned."""

    __slots__ = (
        "_began",
        "_blobs",
        "_ended",
        "_given",
        "_heard",
        "_lease",
        "_outcome",
        "_ran_at",
        "_request",
        "_response",
        "_rows",
        "_size",
        "_trace",
        "_used",
        "asked",
        "door",
        "model",
        "version",
        "where",
    )  # fmt: skip

    def __init__(self, door: Door, where: str, trace: Trace | None = None) -> None:
        self.door = door
        self.where = where
        self.asked = NOTHING
        self.model, self.version = UNKNOWN_MODEL, 0
        self._began = self._heard = perf_counter()
        self._ran_at = 0.0  # when its model was asked, or would have been had it been loaded
        self._trace = trace
        self._lease: Lease | None = None
        self._request: InferRequest | None = None
        self._response: InferResponse | None = None
        self._outcome: Outcome | None = "canceled"
        self._blobs: Sequence[Buffer] = ()
        self._given: extras.Given = {}
        self._used = self._ended = False
        self._rows = self._size = 0

    # the request ----------------------------------------------------------------------------------

    async def take(self, message: bytes, adapter: str | None = None) -> None:
        """The message is here. Raises what it is to be refused with."""
        head, self._blobs = cut(message, RAW_CONTENTS)
        self._size = len(message)
        if len(head) < LARGE:
            self.asked = asked_of(head, self._blobs, adapter)
        else:
            self.asked = await self.door.aside.do(False, asked_of, head, self._blobs, adapter)
        wanted = self.asked.plan.extras
        if wanted is not None and wanted.taken:
            door = self.door
            plan = await extras.fetch(door.aside, door.regions, self.asked.plan, door.max_body)
            self.asked = self.asked._replace(plan=plan)

    @property
    def decoupled(self) -> bool:
        """Whether its model may answer any number of times. After `hold`."""
        assert self._lease is not None
        return self._lease.generation.decoupled

    async def hold(self) -> None:
        """Takes a lease; where the model may be loaded for a request, waits for that. Raises what the
        request is to be refused with."""
        try:
            lease = self.door.models.lease(*self.asked.route, self.asked.plan.parameters)
        except RepositoryError as error:
            waiter = self._wait(error)
            if waiter is None:
                raise
        else:
            lease.begin()
            self._begin(lease)
            return
        await waiter

    def _wait(self, error: RepositoryError) -> asyncio.Future[None] | None:
        self._ran_at = perf_counter()
        models, route = self.door.models, self.asked.route
        return self.door.waiting.enter(models, error, *route, size=self._size, take=self._begin)

    def _begin(self, lease: Lease) -> None:
        self._lease = lease
        spec = lease.generation.spec
        self.model, self.version = spec.model, spec.version
        self.door.meter.begin(spec.model, spec.version)

    def ask(self) -> asyncio.Future[InferResponse]:
        """Asks the model for its one answer. Raises what the request is to be refused with."""
        gen, request = self._ready()
        future = self.door.models.infer(gen, request)
        self._asked_for(gen, request)
        return future

    def open(self) -> Responses:
        """The same of a model with any number of answers."""
        gen, request = self._ready()
        responses = self.door.models.stream(gen, request)
        self._asked_for(gen, request)
        return responses

    def _ready(self) -> tuple[Generation, InferRequest]:
        assert self._lease is not None
        gen, plan = self._lease.generation, self.asked.plan
        if plan.extras is not None:
            self._given = extras.check(self.door.regions, plan.extras, gen)
        return gen, request_of(plan, self._blobs)

    def _asked_for(self, gen: Generation, request: InferRequest) -> None:
        self._used = True
        self._ran_at = self._ran_at or perf_counter()
        shape = request.inputs[0].shape if request.inputs else ()
        batched = gen.loaded is not None and gen.loaded.max_batch_size > 0
        self._rows = shape[0] if batched and shape else 1
        self._request, self._blobs = request, ()

    # the answer -----------------------------------------------------------------------------------

    async def hear(self, response: InferResponse) -> list[Buffer]:
        """What the model answered, as a ModelInferResponse in pieces. Raises what the request is to be
        refused with after all."""
        self._heard = perf_counter()
        before, self._response = self._response, response
        if before is not None:  # one of several: it waited once, and ran for all of them
            response.queue_s = before.queue_s
            response.compute_s += before.compute_s
        wanted = self.asked.plan.extras
        if wanted is not None and (wanted.given or wanted.classes):
            assert self._lease is not None
            gen = self._lease.generation
            response = await extras.finish(self.door.aside, wanted, self._given, response, gen)
        return encode(self.asked.plan, response, self.model, self.version)

    def fail(self, error: Exception) -> None:
        """It is refused. Ends the lease; never raises."""
        self._release()
        if (reason := SHED.get(type(error))) is not None:
            self.door.shed(reason)
        errors.note(error, self.where)
        self._outcome = outcome_of(error)

    # the end --------------------------------------------------------------------------------------

    def end(self, *, answered: bool = False) -> None:
        """It is over. `answered`: all of it was handed over; else it was refused, or else its client
        has left. Again: nothing."""
        if self._ended:
            return
        self._ended = True
        self._blobs = ()
        self._release()
        outcome = "success" if answered else self._outcome
        if outcome is None:
            return
        now, told = perf_counter(), self._response
        self.door.meter.done(
            self.model,
            self.version,
            outcome,
            duration_s=now - self._began,
            queue_s=told.queue_s if told else 0.0,
            input_s=self._ran_at - self._began if self._ran_at else 0.0,
            compute_s=told.compute_s if told else 0.0,
            output_s=now - self._heard,
            samples=self._rows if told else 0,
            batch_size=told.batch_size if told else 0,
            protocol=PROTOCOL,
            trace=self._trace if answered else None,
            of=self,
        )
        self._request = self._response = None

    # for whoever traces it ------------------------------------------------------------------------

    @property
    def request_id(self) -> str:
        return self.asked.plan.id

    @property
    def inputs(self) -> Iterable[Tensor]:
        return self._request.inputs if self._request is not None else ()

    @property
    def outputs(self) -> Iterable[Tensor]:
        return self._response.outputs if self._response is not None else ()

    def _release(self) -> None:
        lease = self._lease
        if lease is not None:
            self._lease = None
            lease.end(used=self._used)
