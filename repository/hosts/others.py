"""The worker's way to the other models of the server: `abilities.Others`.

A call goes out as one frame; its answers are put into its queue by the thread that reads the socket,
and taken from there by whoever called, on any thread. The server sends a few ahead and then waits until
they are taken, so a call that nobody reads holds little.

A call that is made while the model answers requests belongs to them: when the last of them that is open
has been cancelled, so is the call, and whoever reads it hears of that. One that begins afterwards runs:
a model may have to tidy up.

Rule: a destructor sends nothing (it may run in the middle of a send): it leaves a note, which goes out
with the next frame, and wakes the model's thread in case there is none.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from itertools import count
from queue import SimpleQueue
from typing import Any, Protocol, TypeAlias

import msgspec

from repository.errors import (
    InvalidRequestError,
    RepositoryError,
    RequestCancelledError,
    WorkerDiedError,
)
from repository.figures import Figures, encode
from repository.forms import form_of
from repository.hosts import failures, frames
from repository.hosts.frames import (
    CALL,
    CALL_END,
    CALLED,
    FIGURES,
    FIRST_CALL,
    LEAVE,
    MANAGE,
    READ,
    CallOrder,
    Header,
    Lot,
    ManageOrder,
)
from repository.messages import InferRequest, InferResponse
from repository.tensors import Buffer

READ_ANSWERS, READ_BYTES = 16, 1 << 20  # taken since the server was told of it last
GONE = "the server is gone"
NOT_WANTED = "the request that this call was made for was cancelled"
_read_failure = msgspec.msgpack.Decoder(failures.Failure).decode
Heard: TypeAlias = InferResponse | RepositoryError | bool  # an answer, or the last word
Send = Callable[[Sequence[Buffer]], None]


class Wanted(Protocol):
    """A request that the model answers."""

    @property
    def wanted(self) -> bool:
        """It has not ended, and somebody waits for it."""
        ...


# Whom the model answers now: the requests of its `ask`, on its thread and in coroutines that began
# there.
BEHIND: ContextVar[tuple[Wanted, ...]] = ContextVar("behind", default=())


class Answers(Iterator[InferResponse]):
    """What a call came to, for one reader. Dropped or closed before its end, the rest is left."""

    def __init__(self, others: Others, number: int, heard: SimpleQueue[Heard]) -> None:
        self._others = others
        self._number = number
        self._heard = heard
        self._over = False
        self._read = self._new = self._new_bytes = 0

    def __next__(self) -> InferResponse:
        if self._over:
            raise StopIteration
        heard = self._heard.get()
        if isinstance(heard, InferResponse):
            self._took(heard)
            return heard
        self._over = True
        if isinstance(heard, RepositoryError):
            self._others.flush()
            raise heard
        raise StopIteration

    def close(self) -> None:
        if not self._over:
            self._over = True
            self._others.leave(self._number)

    def _took(self, response: InferResponse) -> None:
        self._read += 1
        self._new += 1
        self._new_bytes += sum([len(tensor.data) for tensor in response.outputs])
        if self._new >= READ_ANSWERS or self._new_bytes >= READ_BYTES:
            self._new = self._new_bytes = 0
            self._others.tell_read(self._number, self._read)

    def __del__(self) -> None:
        if not self._over:
            self._others.drop(self._number)


class Others:
    """`send` sends a frame from any thread; `read` makes a response of a CALLED frame, whose lot it is
    told; `wake` makes the model's thread send what is still to be said, once it is free, and may be
    called in the middle of anything. The thread that makes this is the model's own.

    dropped   calls that nobody reads any more, and the server does not know it
    """

    def __init__(
        self,
        send: Send,
        read: Callable[[Header, memoryview, Lot], InferResponse],
        wake: Callable[[], None],
    ) -> None:
        self.dropped: deque[int] = deque()
        self._send = send
        self._read = read
        self._wake = wake
        self._model_thread = threading.get_ident()
        self._numbers = count(FIRST_CALL)
        self._open: dict[int, SimpleQueue[Heard]] = {}
        self._behind: dict[int, tuple[Wanted, ...]] = {}  # whom each call is made for
        self._told: dict[int, int] = {}  # answers of each call that have come, up to its last word
        self._gone = False

    # called by the model --------------------------------------------------------------------------

    def call(
        self, model: str, version: int | None, request: InferRequest
    ) -> Iterator[InferResponse]:
        """As `abilities.Others.call`."""
        number, heard = self._begin()
        if behind := BEHIND.get():
            self._behind[number] = behind
        form = form_of(request.inputs, request.outputs, request.parameters)
        order = CallOrder(
            model,
            version,
            threading.get_ident() == self._model_thread,
            request.id,
            list(form.blanks),
            form.outputs,
            form.parameters,
        )
        blobs = [tensor.data for tensor in request.inputs]
        self._ask(CALL, number, order, blobs)
        return Answers(self, number, heard)

    def load(
        self, model: str, config: str | None = None, files: Mapping[str, bytes] | None = None
    ) -> None:
        self._manage(ManageOrder("load", model, config=config, files=dict(files or {})))

    def unload(self, model: str, dependents: bool = False) -> None:
        self._manage(ManageOrder("unload", model, dependents=dependents))

    def is_ready(self, model: str, version: int | None = None) -> bool:
        return self._manage(ManageOrder("is_ready", model, version))

    def show(self, figures: Sequence[Figures]) -> None:
        self._send(frames.pack(FIGURES, 0, encode(figures)))

    def leave(self, number: int) -> None:
        """The rest of the call is not wanted."""
        if self._forget(number) is not None:
            self._send(frames.pack(LEAVE, number, b""))

    def drop(self, number: int) -> None:
        """The same, from a destructor."""
        self.dropped.append(number)
        self._wake()

    def tell_read(self, number: int, read: int) -> None:
        if number in self._open:
            self._send(frames.pack(READ, number, frames.encode(read)))

    def flush(self) -> None:
        """What destructors, and those who left, have left to be said."""
        if self.dropped:
            with contextlib.suppress(OSError):  # nobody is there any more
                self._send([])

    def _manage(self, order: ManageOrder) -> bool:
        number, heard = self._begin()
        self._ask(MANAGE, number, order, ())
        said = heard.get()
        if isinstance(said, RepositoryError):
            raise said
        return bool(said)

    def _begin(self) -> tuple[int, SimpleQueue[Heard]]:
        number, heard = next(self._numbers), SimpleQueue[Heard]()
        self._open[number] = heard
        if self._gone:
            heard.put(WorkerDiedError(GONE))
        return number, heard

    def _ask(self, kind: int, number: int, order: Any, blobs: Sequence[Buffer]) -> None:
        try:
            self._send(frames.pack(kind, number, frames.encode(order), blobs))
        except BaseException as error:
            self._forget(number)
            if isinstance(error, TypeError | ValueError | OverflowError):
                raise InvalidRequestError(f"the call cannot travel: {error}") from error
            if isinstance(error, ConnectionError):
                raise WorkerDiedError(GONE) from error
            raise

    def _forget(self, number: int) -> SimpleQueue[Heard] | None:
        self._behind.pop(number, None)
        return self._open.pop(number, None)

    # told by the thread that reads ----------------------------------------------------------------

    def hear(self, header: Header, payload: memoryview) -> None:
        """CALLED, CALL_END or CALL_ERROR. Raises BrokenFrameError, msgspec.MsgspecError."""
        _, meta, number, kind, *_ = header
        if kind == CALLED:
            told = self._told[number] = self._told.get(number, 0) + 1
            # Read in any case: what it has in the arena is given back.
            response = self._read(header, payload, (-number, told))
            if (heard := self._open.get(number)) is not None:
                heard.put(response)
            return
        self._told.pop(number, None)
        heard = self._forget(number)
        if heard is None:  # left meanwhile
            return
        if kind == CALL_END:
            heard.put(frames.read_verdict(payload[:meta]))
        else:
            heard.put(failures.from_wire(_read_failure(payload[:meta])))

    def not_wanted(self, request: Wanted) -> None:
        """Nobody wants what it is answered: nor what was asked for it, unless others want that too."""
        for number, behind in list(self._behind.items()):
            if request not in behind or any(each.wanted for each in behind):
                continue
            if (heard := self._open.get(number)) is not None:
                self._behind.pop(number, None)
                heard.put(RequestCancelledError(NOT_WANTED))
                self.drop(number)

    def close(self) -> None:
        """No answer will come any more."""
        self._gone = True
        for heard in list(self._open.values()):
            heard.put(WorkerDiedError(GONE))

    def unsent(self) -> list[Buffer]:
        """Frames that are still to be sent for those that were dropped."""
        parts: list[Buffer] = []
        while self.dropped:
            try:
                number = self.dropped.popleft()
            except IndexError:  # another thread was quicker
                break
            if self._forget(number) is not None:
                parts += frames.pack(LEAVE, number, b"")
        return parts
