"""One request over ASGI whose answer may come in pieces: what all such faces share.

    body → hold (a lease; the model may have to load) → the face's own part → answered
      └─────── any error ─────────→ refused, in the face's own words

Rules: a lease ends after the last byte was handed over, or as soon as the client is gone; every
request is counted exactly once (but for those without a key). Nothing escapes but cancellation.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from litestar.types import Receive, Scope, Send

from repository.errors import RepositoryError
from repository.lifecycle.generation import Generation, Lease
from repository.tensors import Buffer, Tensor
from server import errors
from server.call import Door
from server.heads import JSON, Header, refusal_headers
from server.intake import ClientGoneError, read_body, read_headers
from server.metrics.meter import UNKNOWN_MODEL, Outcome
from server.metrics.traces import trace_of
from server.patience import answer_of

log = logging.getLogger("modeldepot.v2")

MOST_BODY = 8 * 1024**2  # bytes; it is read on the loop, and everybody waits meanwhile


class StreamedCall(ABC):
    """One request. The stages in the order above, then `end`."""

    protocol: ClassVar[str] = "http"  # as it is counted
    json_only: ClassVar[bool] = True  # what says that it is something else is refused
    request_id = ""  # for whoever traces it; its tensors are gone by then
    inputs: Sequence[Tensor] = ()
    outputs: Sequence[Tensor] = ()

    def __init__(self, door: Door, scope: Scope, send: Send) -> None:
        self.door = door
        self.path: str = scope["path"]
        self.begun = False  # the status line is out
        self.samples = 0
        self.queue_s = self.compute_s = 0.0
        self.batch_size = 0
        self.began = time.perf_counter()
        self.model, self.version = UNKNOWN_MODEL, 0
        self._asked = self.began  # when the model was asked
        self._loading_s = 0.0  # how long the model was waited for
        self._scope: Any = scope
        self._send: Any = send
        self._lease: Lease | None = None
        self._outcome: Outcome | None = "canceled"
        self._read = self._ended = False
        self._size = 0  # bytes of its body

    @abstractmethod
    def shown(self, error: Exception) -> tuple[int, bytes]:
        """Its status, and the body that says so in the face's words."""

    @property
    def headers(self) -> list[Header]:
        """Names in lower case."""
        found: list[Header] = self._scope["headers"]
        return found

    # the request ----------------------------------------------------------------------------------

    async def body(self, receive: Receive) -> bytes:
        """All of it. Raises what the request is to be refused with, ClientGoneError."""
        headers, door = self._scope["headers"], self.door
        door.authorize(headers)
        if self._scope["method"] != "POST":
            raise errors.WrongVerbError("POST")
        limit = min(door.max_body, MOST_BODY)
        length = read_headers(headers, door.max_body).length
        if length > limit:
            raise _too_large(limit)
        if self.json_only:
            _check_media(headers)
        try:
            found: Buffer = await read_body(receive, length, max_body=limit)
        except errors.PayloadTooLargeError:
            raise _too_large(limit) from None
        self._read = True
        self._size = len(found)
        return bytes(found)

    async def lease(
        self,
        model: str,
        version: int | None,
        receive: Receive,
        parameters: Mapping[str, Any] | None = None,
    ) -> Generation:
        """The generation that serves it, leased until `end`. Waits for nothing but a model that loads on
        demand. Raises what `Repository.lease` raises, ClientGoneError."""
        try:
            lease = self.door.models.lease(model, version, parameters)
            lease.begin()
            self._lease = lease
        except RepositoryError as error:
            waiter = self.door.waiting.enter(
                self.door.models, error, model, version, size=self._size, take=self._take
            )
            if waiter is None:
                raise
            waits = time.perf_counter()
            await answer_of(waiter, receive)
            self._loading_s = time.perf_counter() - waits
        assert self._lease is not None
        gen = self._lease.generation
        self.model, self.version = gen.spec.key
        self.door.meter.begin(self.model, self.version)
        return gen

    def _take(self, lease: Lease) -> None:
        self._lease = lease

    def used(self, samples: int) -> None:
        """The model was asked for so many."""
        if not self.samples:
            self._asked = time.perf_counter() - self._loading_s
        self.samples = samples

    # the answer -----------------------------------------------------------------------------------

    async def start(self, status: int, headers: list[Header]) -> None:
        """Raises ClientGoneError, as `send` does."""
        self.begun = True
        await self._put({"type": "http.response.start", "status": status, "headers": headers})

    async def send(self, body: bytes, *, more: bool) -> None:
        await self._put({"type": "http.response.body", "body": body, "more_body": more})

    async def reply(self, body: bytes) -> None:
        """A good answer, all of it."""
        await self.start(200, [JSON, (b"content-length", b"%d" % len(body))])
        await self.send(body, more=False)

    async def _put(self, message: dict[str, Any]) -> None:
        try:
            await self._send(message)
        except OSError:
            raise ClientGoneError from None

    def failed(self, error: Exception) -> bytes:
        """How it ended, though the answer had begun."""
        self._outcome = self.door.note(error, self.path)
        return self.shown(error)[1]

    async def refuse(self, error: Exception) -> None:
        """Never raises but for cancellation."""
        self._outcome = self.door.note(error, self.path)
        self._release()
        if self.begun:
            return  # half an answer is out; the server closes the connection
        status, body = self.shown(error)
        headers = refusal_headers(error, len(body), read=self._read)
        try:
            await self.start(status, headers)
            await self.send(body, more=False)
        except ClientGoneError:
            return
        except Exception:
            log.exception("an error could not be answered")

    # the end --------------------------------------------------------------------------------------

    def wrote(self, prompt_tokens: int, completion_tokens: int, first_s: float | None) -> None:
        """Tokens read and written; when the first of an answer was there."""
        self.door.meter.wrote(
            self.model,
            self.version,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            first_s=first_s,
        )

    def end(self, *, answered: bool = False) -> None:
        """Again: nothing."""
        if self._ended:
            return
        self._ended = True
        self._release()
        outcome = "success" if answered else self._outcome
        if outcome is not None:
            self.door.meter.done(
                self.model,
                self.version,
                outcome,
                duration_s=time.perf_counter() - self.began,
                queue_s=self.queue_s,
                input_s=self._asked - self.began,
                compute_s=self.compute_s,
                samples=self.samples,
                batch_size=self.batch_size,
                protocol=self.protocol,
                trace=trace_of(self._scope["headers"]) if answered else None,
                of=self,
            )

    def _release(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.end(used=self.samples > 0)


C = TypeVar("C", bound=StreamedCall)


async def answered(
    call: C, receive: Receive, work: Callable[[C, Receive], Awaitable[bool]]
) -> None:
    """One request, with all that can go wrong. `work` says whether it ended well."""
    try:
        try:
            well = await work(call, receive)
        except ClientGoneError:
            return
        except asyncio.CancelledError:
            if call.begun or not call.door.models.draining:
                raise
            await call.refuse(errors.cut_off())
        except Exception as error:  # noqa: BLE001 - the edge: whatever it is, the client gets an answer
            await call.refuse(error)
        else:
            call.end(answered=well)
    finally:
        call.end()


def _check_media(headers: list[Header]) -> None:
    """JSON, or not said."""
    for name, value in headers:
        if name == b"content-type":
            kind = value.split(b";")[0].strip().lower().decode("latin-1")
            if kind not in ("", "application/json") and not kind.endswith("+json"):
                raise errors.UnsupportedMediaError(
                    f"send JSON (content-type: application/json), not {kind[:60]!a}"
                )


def _too_large(limit: int) -> errors.PayloadTooLargeError:
    return errors.PayloadTooLargeError(
        f"the body has more than {limit} bytes, or comes in too many tiny pieces; send a shorter "
        "one, or several"
    )
