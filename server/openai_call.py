"""One OpenAI request over ASGI, from its head to its end: what the text and the embeddings faces share.

    admit → body → hold (a lease; the model may have to load) → the face's own part → answered
      └─────── any error ─────────→ refused, in OpenAI's words

Rules: a lease ends after the last byte was handed over, or as soon as the client is gone; every
request is counted exactly once (but for those without a key). Nothing escapes but cancellation.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from litestar.types import Receive, Scope, Send

from repository.errors import (
    AdapterNotFoundError,
    InvalidNameError,
    InvalidRequestError,
    ModelNotFoundError,
    RepositoryError,
)
from repository.lifecycle.generation import Generation, Lease
from repository.lifecycle.states import State
from repository.repository import Repository
from repository.tensors import Buffer
from server import errors
from server.call import JSON, Door, Header, refusal_headers
from server.intake import ClientGoneError, adapter_of, read_body, read_headers
from server.metrics.meter import UNKNOWN_MODEL, Outcome
from server.metrics.traces import trace_of
from server.patience import answer_of

log = logging.getLogger("modeldepot.openai")

MOST_BODY = 8 * 1024**2  # bytes; it is read on the loop, and everybody waits meanwhile
PROTOCOL = "openai"


class OpenAICall:
    """One request. The stages in the order above, then `end`."""

    def __init__(self, door: Door, scope: Scope, send: Send) -> None:
        self.door = door
        self.path: str = scope["path"]
        self.adapter = ""  # that the model's name brought
        self.begun = False  # the status line is out
        self.samples = 0
        self.queue_s = self.compute_s = 0.0
        self.batch_size = 0
        self.began = time.perf_counter()
        self._asked = self.began  # when the model was asked
        self._loading_s = 0.0  # how long the model was waited for
        self._scope: Any = scope
        self._send: Any = send
        self._lease: Lease | None = None
        self._outcome: Outcome | None = "canceled"
        self._read = self._ended = False
        self._size = 0  # bytes of its body
        self._model, self._version = UNKNOWN_MODEL, 0

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
        _check_media(headers)
        try:
            found: Buffer = await read_body(receive, length, max_body=limit)
        except errors.PayloadTooLargeError:
            raise _too_large(limit) from None
        self._read = True
        self._size = len(found)
        return bytes(found)

    async def hold(self, name: str, ability: str, receive: Receive) -> Generation:
        """The generation that serves the model of that name, leased until `end`. `adapter` is set
        where the name names one. Waits for nothing but a model that loads on demand. Raises
        InvalidRequestError for a model without the ability, ClientGoneError."""
        if not name:
            raise InvalidRequestError("'model' is empty; GET /v1/models lists the models")
        models = self.door.models
        model, self.adapter = _resolved(models, name)
        try:
            self._lease = lease = models.lease(model)
            lease.begin()
        except RepositoryError as error:
            self._lease = None
            room = self.door.waiting
            waiter = room.enter(models, error, model, None, size=self._size, take=self._take)
            if waiter is None:
                raise
            waits = time.perf_counter()
            await answer_of(waiter, receive)
            self._loading_s = time.perf_counter() - waits
            lease = self._leased()
        gen = lease.generation
        self._model, self._version = gen.spec.model, gen.spec.version
        self.door.meter.begin(self._model, self._version)
        check_ability(models, gen, ability)
        return gen

    def _leased(self) -> Lease:
        assert self._lease is not None
        return self._lease

    def _take(self, lease: Lease) -> None:
        self._lease = lease

    def adapters(self, said: tuple[str, ...] | None, rows: int) -> tuple[str, ...]:
        """Of each row ("": none): the later wins of the model's name, the body, `?adapter=`, and the
        header that SageMaker's clients send."""
        named = adapter_of(self._scope.get("query_string", b""), self._scope["headers"])
        found = said if named is None else (named,) * rows
        if found is None:
            return (self.adapter,) * rows
        self.adapter = ""  # if one is not found now, the model's name is not to blame
        return found

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
        """How it ended; in OpenAI's words."""
        return errors.encode(errors.body_openai(self._noted(error)))

    def _noted(self, error: Exception) -> Exception:
        if isinstance(error, AdapterNotFoundError) and self.adapter:
            error = ModelNotFoundError(str(error))  # it was part of the model's name
        self._outcome = self.door.note(error, self.path)
        return error

    async def refuse(self, error: Exception) -> None:
        """Never raises but for cancellation."""
        error = self._noted(error)
        self._release()
        if self.begun:
            return  # half an answer is out; the server closes the connection
        body = errors.encode(errors.body_openai(error))
        headers = refusal_headers(error, len(body), read=self._read)
        try:
            await self.start(errors.status_of(error), headers)
            await self.send(body, more=False)
        except ClientGoneError:
            return
        except Exception:
            log.exception("an error could not be answered")

    # the end --------------------------------------------------------------------------------------

    def wrote(self, prompt_tokens: int, completion_tokens: int, first_s: float | None) -> None:
        """Tokens read and written; when the first of an answer was there."""
        self.door.meter.wrote(
            self._model,
            self._version,
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
                self._model,
                self._version,
                outcome,
                duration_s=time.perf_counter() - self.began,
                queue_s=self.queue_s,
                input_s=self._asked - self.began,
                compute_s=self.compute_s,
                samples=self.samples,
                batch_size=self.batch_size,
                protocol=PROTOCOL,
                trace=trace_of(self._scope["headers"]) if answered else None,
            )

    def _release(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.end(used=self.samples > 0)


async def answered(
    door: Door,
    scope: Scope,
    receive: Receive,
    send: Send,
    work: Callable[[OpenAICall, Receive], Awaitable[bool]],
) -> None:
    """One request, with all that can go wrong. `work` says whether it ended well."""
    call = OpenAICall(door, scope, send)
    try:
        try:
            well = await work(call, receive)
        except ClientGoneError:
            return
        except Exception as error:  # noqa: BLE001 - the edge: whatever it is, the client gets an answer
            await call.refuse(error)
        else:
            call.end(answered=well)
    finally:
        call.end()


def _resolved(models: Repository, name: str) -> tuple[str, str]:
    """A model and an adapter of it. What cannot be a name is the name of nothing."""
    try:
        return models.resolve(name)
    except InvalidNameError as error:
        raise ModelNotFoundError(f"{error}; GET /v1/models lists the models") from error


def check_ability(models: Repository, gen: Generation, ability: str) -> None:
    """Raises InvalidRequestError, naming the models that would do."""
    loaded = gen.loaded
    if loaded is not None and ability in loaded.abilities:
        return
    name = gen.spec.model
    if ability == "chat" and loaded is not None and "generate" in loaded.abilities:
        raise InvalidRequestError(
            f"model '{name}' has no chat template; use /v1/completions, or put a chat_template "
            "into its tokenizer_config.json"
        )
    able = [
        status.name
        for status in models.statuses()
        for other in status.generations
        if other.state is State.READY and other.loaded and ability in other.loaded.abilities
    ]
    does = {"embed": "embed texts", "generate": "generate text"}.get(ability, "chat")
    others = ", ".join(dict.fromkeys(able[:10])) or "none"
    raise InvalidRequestError(f"model '{name}' does not {does}; models that do: {others}")


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
