"""A request's way back, from `execute` or from any thread of the model's, by the rules that Triton has.

One Way belongs to each request. It hears what the model sends, and makes sure that the request ends:
by the model's last word, by an error, or, where the model has dropped both the request and its sender
without a last word, by the Mourner. A destructor may run in the middle of anything, so it only leaves
a note; the Mourner's thread reads it.

    way       answers so far   model sends           the request
    open      any              answer                gets it (not decoupled: one at most)
    open      any              FINAL                 ends
    open      any              an error              ends with it; the way is failed
    failed    -                anything              hears nothing of it; FINAL closes the way
    closed    -                anything              the model is told: TritonModelException
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable

from repository.backends.abilities import Reply
from repository.backends.triton.answer import InferenceResponse
from repository.backends.triton.errors import TritonModelException, ours
from repository.errors import InferenceFailedError, RepositoryError
from repository.messages import InferResponse

FINAL = 1  # TRITONSERVER_RESPONSE_COMPLETE_FINAL
FORGOTTEN = (
    "the model dropped the request without its last response: send flags="
    "TRITONSERVER_RESPONSE_COMPLETE_FINAL with the last one, or alone"
)
ENDED = (
    "the request has ended: nothing can be sent after TRITONSERVER_RESPONSE_COMPLETE_FINAL, after "
    "execute() has failed, or after the model's end"
)

Ending = tuple[Reply, RepositoryError | None]


class Mourner:
    """Ends what models forgot, on a thread of its own, which begins when it is needed."""

    def __init__(self) -> None:
        self._notes: queue.SimpleQueue[Ending | None] = (
            queue.SimpleQueue()
        )  # its put may interrupt itself
        self._thread: threading.Thread | None = None

    def watch(self) -> None:
        """From now on there is something to wait for."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="triton mourner", daemon=True)
            self._thread.start()

    def note(self, reply: Reply, error: RepositoryError | None) -> None:
        self._notes.put((reply, error))

    def stop(self) -> None:
        """After what was noted."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._notes.put(None)
            thread.join()

    def _run(self) -> None:
        while (note := self._notes.get()) is not None:
            reply, error = note
            with contextlib.suppress(OSError):  # nobody is there any more
                reply.end(error)
            del note, reply, error


class Way:
    """`outgoing` makes of a model's response what is sent; raises TritonModelException."""

    __slots__ = (
        "__weakref__", "_closed", "_decoupled", "_failed", "_lock", "_mourner", "_outgoing",
        "_reply", "_sent", "taken",
    )  # fmt: skip

    def __init__(
        self,
        reply: Reply,
        outgoing: Callable[[InferenceResponse], InferResponse],
        mourner: Mourner,
        *,
        decoupled: bool,
    ) -> None:
        self._reply = reply
        self._outgoing = outgoing
        self._mourner = mourner
        self._decoupled = decoupled
        self._lock = threading.Lock()
        self._sent = 0
        self._closed = False
        self._failed = False
        self.taken = False  # the model has a sender

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def cancelled(self) -> bool:
        return self._reply.cancelled

    def take(self) -> None:
        """A sender leaves for the model's hands."""
        self.taken = True
        self._mourner.watch()

    def send(self, response: InferenceResponse | None, *, final: bool) -> None:
        """Raises TritonModelException for what cannot be sent."""
        with self._lock:
            if self._closed:
                raise TritonModelException(ENDED)
            if response is not None and not self._failed:
                self._answer(response, self._reply.send)
            if final:
                self._closed = True
                if not self._failed:
                    self._reply.end(self._unanswered())

    def last(self, response: InferenceResponse) -> None:
        """The only answer, given as `execute` returns. Raises as `send`."""
        with self._lock:
            if self._closed:
                raise TritonModelException(ENDED)
            if not self._failed:
                self._answer(response, self._reply.last)
            self._closed = True

    def end(self, error: RepositoryError) -> None:
        """With an error that is not the model's to tell. Ended before: nothing."""
        with self._lock:
            closed, self._closed = self._closed, True
            if not closed and not self._failed:
                self._reply.end(error)

    def abandon(self) -> None:
        """Somebody else ends the request."""
        with self._lock:
            self._closed = True

    def _answer(self, response: InferenceResponse, way: Callable[[InferResponse], None]) -> None:
        error = response.error()
        if error is not None:
            self._failed = True
            self._reply.end(ours(error))
            return
        if self._sent and not self._decoupled:
            raise TritonModelException(
                "a model that is not decoupled sends one response for each request; set "
                "model_transaction_policy { decoupled: true } to send more"
            )
        try:
            way(self._outgoing(response))
        except RepositoryError as broken:
            raise TritonModelException(str(broken)) from broken
        self._sent += 1

    def _unanswered(self) -> RepositoryError | None:
        if self._decoupled or self._sent:
            return None
        return InferenceFailedError("the model sent no response, and is not decoupled")

    def __del__(self) -> None:
        if not getattr(self, "_closed", True) and not self._failed:
            forgiven = self._sent and not self._decoupled
            self._mourner.note(self._reply, None if forgiven else InferenceFailedError(FORGOTTEN))


class InferenceResponseSender:
    """`pb_utils.InferenceResponseSender`; from `InferenceRequest.get_response_sender()`."""

    __slots__ = ("_way",)

    def __init__(self, way: Way) -> None:
        way.take()
        self._way = way

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        """From any thread. Raises TritonModelException."""
        if flags not in (0, FINAL):
            raise TritonModelException(
                f"flags is {flags}; there are 0 and TRITONSERVER_RESPONSE_COMPLETE_FINAL ({FINAL})"
            )
        if response is None and not flags:
            raise TritonModelException(
                "send() needs a response, or flags=TRITONSERVER_RESPONSE_COMPLETE_FINAL, or both"
            )
        if response is not None and not isinstance(response, InferenceResponse):
            raise TritonModelException(
                f"send() takes an InferenceResponse, not {type(response).__name__}"
            )
        self._way.send(response, final=bool(flags))

    def is_cancelled(self) -> bool:
        return self._way.cancelled
