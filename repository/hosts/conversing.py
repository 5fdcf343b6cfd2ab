"""How a worker runs whose backend takes requests as they are, and may ask other models itself.

One thread reads the socket, as soon as there is a backend: it hands groups of requests to the model's
thread, and answers of calls to whoever waits for them. The model's thread takes one group after the
other, and between two of them whatever else is asked of the worker. Any thread may answer: a request
may go on long after its group has returned.

A model that answers faster than its answers are read waits, after MOST_UNREAD of them (or so many
bytes); where nobody reads any for STALLED_S the request is given up, so that one client who does not
read cannot hold the model, nor the server's memory.

Told to stop, it lets run what is under way and wanted, with all the calls that this needs; told to
sleep, it waits for everything.

Rule: the thread that reads never sends, and never waits for the model.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Literal, TypeAlias, cast

from repository.backends.abilities import Asked, Asks
from repository.backends.base import Backend
from repository.errors import (
    InferenceFailedError,
    RepositoryError,
    RequestCancelledError,
    RequestTimeoutError,
)
from repository.hosts import failures, frames
from repository.hosts.answering import Offer
from repository.hosts.arena import Window
from repository.hosts.frames import (
    ANSWER,
    ASK,
    CALL_END,
    CALL_ERROR,
    CALLED,
    CANCEL,
    END,
    ERROR,
    INFER,
    READ,
    REPLY,
    RETURNED,
    SLEEP,
    STOP,
    BrokenFrameError,
)
from repository.hosts.holding import Holding
from repository.hosts.lasting import Lasting
from repository.hosts.others import BEHIND, Others
from repository.hosts.pipe import Frame, Pipe
from repository.messages import InferResponse
from repository.tensors import Buffer

MOST_UNREAD, MOST_UNREAD_BYTES, STALLED_S = 1000, 64 << 20, 30.0
# What takes no time is not sent while there is more to do here (see `holding`).
QUICK_S, MOST_PARTS, MOST_HELD = 200e-6, 16, 64 * 1024
CANCELLED = "the request was cancelled before its turn"
# True: a destructor has left something to be said.
_Thing: TypeAlias = "Group | Frame | BaseException | Literal[True] | None"


class Group:
    """What one call of `ask` is to be given. `left`: requests that are still to come, by their ids."""

    __slots__ = ("asked", "left", "number")

    def __init__(self, number: int, named: Sequence[tuple[int, str]]) -> None:
        self.number = number
        self.left = deque(named)
        self.asked: list[Asked] = []


class Conversing:
    """`fault` makes an error of ours of whatever a model raised, and logs it. The thread that makes this
    is the model's."""

    decoupled = False  # a request may have any number of answers

    def __init__(
        self, pipe: Pipe, window: Window | None, fault: Callable[[BaseException], RepositoryError]
    ) -> None:
        self._pipe = pipe
        self._fault = fault
        self._lasting = Lasting(window)
        self._things: SimpleQueue[_Thing] = SimpleQueue()  # its put may interrupt itself
        wake = partial(self._things.put, True)
        self.others = Others(self._send, self._lasting.read_answer, wake)
        self._coming: Group | None = None
        self._open: dict[int, WireReply] = {}
        self.moved = threading.Condition()  # somebody has read, left or ended
        self.gone = False
        self._thread = threading.get_ident()
        self._inside = False
        self._held = Holding(pipe.send)

    def start(self) -> None:
        threading.Thread(target=self._read, name="reads the socket", daemon=True).start()

    # the model's thread ---------------------------------------------------------------------------

    def take(self) -> Frame | None:
        """What comes before there are groups. None: the server is gone. Raises BrokenFrameError."""
        while (thing := self._things.get()) is True:
            self._send([])
        if isinstance(thing, BaseException):
            raise thing
        if isinstance(thing, Group):
            raise BrokenFrameError("requests for a model that is not there")
        return thing

    def run(
        self, backend: Callable[[], Backend | None], answer: Callable[[Frame], list[Buffer]]
    ) -> None:
        """Until the stream ends, or until told to stop and nothing that is wanted is under way.
        `backend`: the one that is loaded and awake; `answer` does what any worker does with a frame."""
        while True:
            thing = self._things.get()
            if isinstance(thing, Group):
                self._ask(thing, backend())
                del thing  # before the next one comes: the model's tensors go with it
                continue
            if isinstance(thing, BaseException):
                raise thing
            if thing is None:
                return
            if thing is True:
                self._send([])
                continue
            kind = thing.header[3]
            if self._held.count:
                self._send([])
            if kind == STOP:
                self._until_ended(wanted=True)
                return
            if kind == SLEEP:
                self._until_ended(wanted=False)
            self._send(answer(thing))

    def _ask(self, group: Group, backend: Backend | None) -> None:
        asked = [each for each in group.asked if not cast("WireReply", each.reply).drop()]
        group.asked.clear()
        began = time.perf_counter()
        try:
            if backend is None:
                raise InferenceFailedError("the model sleeps")
            if asked:
                self._inside = True
                behind = BEHIND.set(tuple([cast("WireReply", each.reply) for each in asked]))
                try:
                    cast("Asks", backend).ask(asked)
                finally:
                    BEHIND.reset(behind)
        except (Exception, SystemExit, asyncio.CancelledError) as error:  # noqa: BLE001 - the model's edge
            failure = self._fault(error)
            while asked:
                asked.pop(0).reply.end(failure)
        finally:
            self._inside = False
        asked.clear()
        self._held.hold(frames.pack(RETURNED, group.number, b""))
        quick = time.perf_counter() - began < QUICK_S and self._held.bytes < MOST_HELD
        if not quick or self._held.count > MOST_PARTS or self._things.empty():
            self._send([])

    def _until_ended(self, *, wanted: bool) -> None:
        """Until all requests have; `wanted`: without those that nobody wants any more."""
        with self.moved:
            self.moved.wait_for(
                lambda: (
                    self.gone
                    or not any(not (wanted and reply.cancelled) for reply in self._open.values())
                )
            )

    # any thread -----------------------------------------------------------------------------------

    def _send(self, parts: Sequence[Buffer]) -> None:
        """With what destructors have left to be said, behind what has been held back."""
        if self._lasting.freed or self.others.dropped:
            parts = [*self._lasting.unsent(), *self.others.unsent(), *parts]
        if len(parts) > 1 and sum(map(len, parts)) <= MOST_HELD:
            parts = [b"".join(parts)]
        self._held.send(parts)

    def say(self, reply: WireReply, response: InferResponse, kind: int) -> None:
        """Raises what cannot be said of it."""
        now = time.perf_counter()
        offer = reply.offer if kind == REPLY else None
        took_s, reply.since = now - reply.since, now
        self._send(self._lasting.write(reply.number, response, offer, took_s, kind))

    def hold(self, reply: WireReply, response: InferResponse) -> bool:
        """As `say`, of a last answer that may wait for the group's other ones. False: it may not."""
        if not self._inside or self.decoupled or threading.get_ident() != self._thread:
            return False
        took_s = time.perf_counter() - reply.since
        parts = self._lasting.write(reply.number, response, reply.offer, took_s)
        self._held.hold(parts)
        if self._held.bytes > MOST_HELD:
            self._send([])
        return True

    def word(self, kind: int, number: int, error: RepositoryError | None = None) -> None:
        meta = b"" if error is None else frames.encode(failures.to_wire(self._fault(error)))
        self._send(frames.pack(kind, number, meta))

    def forget(self, reply: WireReply) -> None:
        with self.moved:
            self._open.pop(reply.number, None)
            self.moved.notify_all()

    # the thread that reads ------------------------------------------------------------------------

    def _read(self) -> None:
        end: BaseException | None = None
        try:
            while (frame := self._pipe.take()) is not None:
                self._sort(frame)
        except BaseException as error:  # noqa: BLE001 - the model's thread ends with it
            end = error
        self.gone = True
        self.others.close()
        with self.moved:
            for reply in self._open.values():
                reply.cancelled = True
            self.moved.notify_all()
        self._things.put(end)

    def _sort(self, frame: Frame) -> None:
        (_, meta, number, kind, *_), payload = frame
        if kind == INFER:
            self._join(frame)
        elif kind == ASK:
            self._coming = Group(number, frames.read_group(payload[:meta]))
        elif kind in (CALLED, CALL_END, CALL_ERROR):
            self.others.hear(frame.header, payload)
        elif kind in (CANCEL, READ):
            read = frames.read_count(payload[:meta]) if kind == READ else None
            with self.moved:
                if (reply := self._open.get(number)) is not None:
                    reply.hear(read)
                    self.moved.notify_all()
            if reply is not None and read is None:
                self.others.not_wanted(reply)
        else:
            self._things.put(frame)

    def _join(self, frame: Frame) -> None:
        group = self._coming
        if group is None or not group.left or group.left[0][0] != frame.header[2]:
            raise BrokenFrameError("a request that belongs to no group")
        number, request_id = group.left.popleft()
        request, offer = self._lasting.read(frame.header, frame.payload)
        request.id = request_id
        reply = self._open[number] = WireReply(self, number, offer)
        group.asked.append(Asked(request, reply))
        if not group.left:
            self._coming = None
            self._things.put(group)


class WireReply:
    """`abilities.Reply`. Where the model is not decoupled an answer waits for the end: one frame.

    since   when the model got the request, or gave its last answer
    """

    __slots__ = ("_lock", "_over", "_read", "_talk", "_unread", "_waits", "cancelled", "number", "offer",
                 "since")  # fmt: skip

    def __init__(self, talk: Conversing, number: int, offer: Offer | None) -> None:
        self.number = number
        self.offer = offer
        self.since = 0.0
        self.cancelled = False
        self._talk = talk
        self._lock = threading.RLock()  # nothing may be said after the end
        self._over = False
        self._waits: InferResponse | None = None
        self._read = 0  # answers
        self._unread: deque[int] = deque()  # bytes of each that was sent

    def send(self, response: InferResponse) -> None:
        """One answer. Raises InferenceFailedError after the end, or for one that cannot travel."""
        with self._lock:
            if self._over:
                raise InferenceFailedError("the request has ended; nothing can be sent any more")
            if self.cancelled:
                return
            if not self._talk.decoupled:
                first, self._waits = self._waits, response
                if first is None:
                    return
                response = first
            elif not self._may_send(response):
                return
            self._say(response, ANSWER)

    def last(self, response: InferResponse) -> None:
        """An answer and the end. Raises as `send`."""
        with self._lock:
            if self._over or self.cancelled or self._waits is not None:
                self.send(response)
                self.end()
                return
            if not self._talk.hold(self, response):
                self._say(response, REPLY)
            self._over = True
        self._talk.forget(self)

    def end(self, error: RepositoryError | None = None) -> None:
        with self._lock:
            if self._over:
                return
            self._over = True
            try:
                self._end(error)
            finally:
                self._talk.forget(self)

    def _end(self, error: RepositoryError | None) -> None:
        waits, self._waits = self._waits, None
        if waits is not None and error is None and not self.cancelled:
            try:
                self._say(waits, REPLY)
                return
            except RepositoryError as broken:
                error = broken
        self._talk.word(END if error is None else ERROR, self.number, error)

    def _say(self, response: InferResponse, kind: int) -> None:
        try:
            self._talk.say(self, response, kind)
        except (TypeError, ValueError, OverflowError) as error:
            raise InferenceFailedError(f"the answer cannot travel: {error}") from error

    def _may_send(self, response: InferResponse) -> bool:
        """As soon as enough of the answers before have been read. False: nobody wants it."""
        moved = self._talk.moved
        with moved:
            while self._is_full() and not self.cancelled:
                if not moved.wait_for(partial(self._moved_since, self._read), STALLED_S):
                    break
            stalled = self._is_full() and not self.cancelled
            if not stalled:
                self._unread.append(sum([len(tensor.data) for tensor in response.outputs]))
        if stalled:
            self.cancelled = True
            self.end(
                RequestTimeoutError(
                    f"whoever asked has read none of {len(self._unread)} answers for {STALLED_S:g} s; "
                    "the rest is given up"
                )
            )
        return not self.cancelled

    def _is_full(self) -> bool:
        unread = self._unread
        return len(unread) >= MOST_UNREAD or (len(unread) > 1 and sum(unread) >= MOST_UNREAD_BYTES)

    def _moved_since(self, read: int) -> bool:
        """Not only of another request."""
        return self.cancelled or self._read != read

    @property
    def wanted(self) -> bool:
        return not (self._over or self.cancelled)

    # the talk's -----------------------------------------------------------------------------------

    def drop(self) -> bool:
        """It is its turn. True: nobody wants it any more."""
        self.since = time.perf_counter()
        if self.cancelled:
            self.end(RequestCancelledError(CANCELLED))
        return self.cancelled

    def hear(self, read: int | None) -> None:
        """So many answers have been read, or (None) nobody wants the rest."""
        if read is None:
            self.cancelled = True
            return
        for _ in range(min(read - self._read, len(self._unread))):
            self._unread.popleft()
        self._read = max(self._read, read)
