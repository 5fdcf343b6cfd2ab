"""The front's end of requests that a model takes as they are: handed over in groups, answered singly.

What lies in the arena for a request stays there until its worker says that nobody sees it any more,
which may be long after the request has ended: a model may keep what it was given.

A worker that answers faster than anybody reads is told how far its readers are, and waits for them
(see `conversing`); nothing here bounds it otherwise. It trusts nothing that a worker says.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import msgspec

from repository.errors import (
    InferenceFailedError,
    InvalidRequestError,
    RepositoryError,
    WorkerDiedError,
)
from repository.hosts import failures, frames
from repository.hosts.asking import Asking, Question
from repository.hosts.frames import (
    ANSWER,
    ASK,
    CANCEL,
    END,
    ERROR,
    FREED,
    READ,
    REPLY,
    RETURNED,
    BrokenFrameError,
    Header,
    Lot,
)
from repository.messages import InferRequest, InferResponse
from repository.prompt import Prompt
from repository.responding import Responses
from repository.tensors import Buffer

READ_ANSWERS, READ_BYTES = 16, 1 << 20  # taken since a worker was told of it last
JOIN_BELOW = 64 * 1024
_read_failure = msgspec.msgpack.Decoder(failures.Failure).decode
Write = Callable[[Sequence[Buffer]], None]


class _Open:
    """A request that its worker has not said the last word of. `read` and what follows: answers that
    were taken, and since when its worker does not know."""

    __slots__ = ("new", "new_bytes", "question", "read", "responses")

    def __init__(self, responses: Responses, question: Question) -> None:
        self.responses = responses
        self.question = question
        self.read = self.new = self.new_bytes = 0


class Groups:
    """One for each channel. `number` gives ids, `write` sends a frame's parts."""

    def __init__(self, asking: Asking, number: Callable[[], int], write: Write) -> None:
        self._asking = asking
        self._number = number
        self._write = write
        self._loop = asyncio.get_running_loop()
        self._open: dict[int, _Open] = {}
        self.under_way: dict[int, Prompt[None]] = {}  # groups that the worker has, or has before it
        self._kept: dict[Lot, object] = {}
        self._failure = ""

    def ask(self, requests: Sequence[Responses]) -> asyncio.Future[None]:
        """As `Host.ask`."""
        returned: Prompt[None] = Prompt(loop=self._loop)
        returned.listener = None
        number = self._number()
        named: list[tuple[int, str]] = []
        parts: list[Buffer] = [b""]
        for responses in requests:
            frame = self._begin(responses)
            if frame is not None:
                named.append((frame[0], responses.request.id))
                parts += frame[1]
        if not named:
            returned.set_result(None)
            return returned
        parts[0] = frames.pack(ASK, number, frames.encode(named))[0]
        self.under_way[number] = returned
        self._write(_joined(parts))
        return returned

    def _begin(self, responses: Responses) -> tuple[int, list[Buffer]] | None:
        """Its id and its frame; None: it has ended already."""
        if self._failure or responses.over:
            responses.end(WorkerDiedError(self._failure) if self._failure else None)
            return None
        number = self._number()
        try:
            parts, question = self._asking.pack(number, responses.request)
        except RepositoryError as error:
            responses.end(error)
            return None
        except (TypeError, ValueError, OverflowError) as error:
            responses.end(InvalidRequestError(f"the request cannot travel: {error}"))
            return None
        self._open[number] = _Open(responses, question)
        if question.kept is not None:
            self.keep((number, 0), question.kept)
        responses.on_close = partial(self._leave, number)
        responses.on_read = partial(self._was_read, number)
        return number, parts

    def keep(self, lot: Lot, what: object) -> None:
        """Until the worker says that it is used no more."""
        self._kept[lot] = what

    def _leave(self, number: int, responses: Responses) -> None:
        if number in self._open:
            self._write(frames.pack(CANCEL, number, b""))

    def _was_read(self, number: int, response: InferResponse) -> None:
        asked = self._open.get(number)
        if asked is None:
            return
        asked.read += 1
        asked.new += 1
        asked.new_bytes += sum([len(tensor.data) for tensor in response.outputs])
        if asked.new >= READ_ANSWERS or asked.new_bytes >= READ_BYTES:
            asked.new = asked.new_bytes = 0
            self._write(frames.pack(READ, number, frames.encode(asked.read)))

    # hearing --------------------------------------------------------------------------------------

    def hear(self, header: Header, payload: memoryview) -> bool:
        """False: it is about nothing here. Raises BrokenFrameError, msgspec.MsgspecError."""
        _, meta, number, kind, *_ = header
        if kind == RETURNED:
            returned = self.under_way.pop(number, None)
            if returned is None:
                raise BrokenFrameError(f"the return of number {number}, which is no group")
            if not returned.done():
                returned.set_result(None)
        elif kind == FREED:
            for lot in frames.read_freed(payload[:meta]):
                self._kept.pop(lot, None)
        elif number in self._open:
            self._answer(self._open[number], header, payload)
        else:
            return False
        return True

    def _answer(self, asked: _Open, header: Header, payload: memoryview) -> None:
        _, meta, number, kind, *_ = header
        error: RepositoryError | None = None
        if kind in (ANSWER, REPLY):
            response = self._asking.open(asked.question, header, payload)
            if kind == REPLY:  # before it is told: who hears it may ask again at once
                del self._open[number]
            asked.responses.tell(response)
        elif kind == ERROR:
            error = failures.from_wire(_read_failure(payload[:meta]))
        elif kind != END:
            raise BrokenFrameError(f"an answer of kind {kind}")
        if kind != ANSWER:
            self._open.pop(number, None)
            asked.responses.end(error)

    # ending ---------------------------------------------------------------------------------------

    def fail(self, why: str) -> None:
        """Ends all that is open, and whatever is asked from now on, with WorkerDiedError."""
        self._failure = why
        left, self._open = self._open, {}
        groups = list(self.under_way.values())
        self.under_way.clear()
        self._kept.clear()
        for asked in left.values():
            asked.responses.end(WorkerDiedError(why))
        for returned in groups:
            if not returned.done():
                returned.set_result(None)


class Asker(Protocol):
    def converse(self, requests: Sequence[Responses]) -> asyncio.Future[None]: ...


class _Only(Responses):
    """One request that is to have one answer: `answer`."""

    __slots__ = ("_found", "answer")

    def __init__(self, request: InferRequest) -> None:
        super().__init__(request)
        self.answer: Prompt[InferResponse] = Prompt(loop=asyncio.get_running_loop())
        self.answer.listener = None
        self._found: InferResponse | None = None

    def tell(self, response: InferResponse) -> None:
        if self._found is None:
            self._found = response
        else:
            self._fail(InvalidRequestError("the model gives several answers to a request"))
            self.close()

    def end(self, error: BaseException | None = None) -> None:
        super().end(error)
        if error is not None:
            self._fail(error)
        elif self._found is None:
            self._fail(InferenceFailedError("the model ended the request without an answer"))
        elif not self.answer.done():
            self.answer.set_result(self._found)

    def _fail(self, error: BaseException) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


def only_answer(asker: Asker, request: InferRequest) -> asyncio.Future[InferResponse]:
    """A group of one, as one inference. Fails with InvalidRequestError where there are more answers."""
    only = _Only(request)
    asker.converse([only])
    return only.answer


def _joined(parts: list[Buffer]) -> list[Buffer]:
    """One piece where that is cheaper to send."""
    if sum(map(len, parts)) <= JOIN_BELOW:
        return [b"".join(parts)]
    return parts
