"""Requests to a model that takes them as they are: several at once, each with answers of its own.

Who goes when, and with whom: `repository.forming`. Here a group is handed to the host untouched, and
every request in it goes its own way: it is answered, fails, or is left by its client, whatever becomes
of the others. A slot is free again when the model can take the next group; some of this one's requests
may then still be under way, and count as in flight until they end.

Rules: one group in flight per slot. Whoever leaves while it waits is dropped; in flight, the model is
told. Nothing is ever run twice. With preserve_ordering nobody hears anything before all who came
earlier have ended: so many answers are kept until then, and for more of them the model waits, as it does
for any reader who is slow.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

from repository.config import ModelConfig
from repository.errors import InferenceFailedError, InvalidRequestError
from repository.forming import Forming
from repository.forms import Group, form_of
from repository.hosts.base import Host
from repository.messages import InferRequest, InferResponse, Loaded
from repository.pacing import Pace
from repository.prompt import error_of, listen, own
from repository.queueing import Waiting, settle
from repository.responding import Responses

MOST_AHEAD, MOST_AHEAD_BYTES = 1000, 64 << 20  # that count as read before anybody may read them
STOPPED = "the model was stopped before it answered; ask again"


class Place(Waiting):
    """A request's place in the queue. As a future it is the only answer, for who wants no more."""

    __slots__ = ("turn",)

    turn: Turn | None  # until it is over: each would keep the other's tensors

    def set_exception(self, error: type | BaseException) -> None:
        super().set_exception(error)
        if self.turn is not None:
            self.turn.refused(self)

    def cancel(self, msg: Any | None = None) -> bool:
        """Its client has left. Running, the model hears of it."""
        cancelled = super().cancel(msg)
        if cancelled and self.turn is not None:
            self.turn.close()
        return cancelled


class Turn(Responses):
    """One request, from its place in the queue to its last answer.

    gone      a host has it, since `started`, in a group of `rows`
    ended     the host has said its last word of it
    answers   how many the host has told, in `compute_s`
    """

    __slots__ = (
        "_ahead", "_ahead_bytes", "_held", "_last", "_line", "answers", "compute_s", "ended", "gone",
        "place", "rows", "started",
    )  # fmt: skip

    def __init__(self, line: AskLine, place: Place, request: InferRequest) -> None:
        super().__init__(request)
        self.place = place
        self.started = self.compute_s = 0.0
        self.rows = self.answers = 0
        self._ahead = self._ahead_bytes = 0  # answers that count as read, and are held
        self.gone = self.ended = False
        self._line = line
        self._held: list[InferResponse] | None = None  # until all before it have ended
        self._last: BaseException | None = None  # what it ended with, held too

    def tell(self, response: InferResponse) -> None:
        response.queue_s = self.started - self.place.arrived
        response.batch_size = self.rows
        self.answers += 1
        self.compute_s += response.compute_s
        if self._held is None:
            self._say(response)
            return
        self._held.append(response)
        if self.on_read is None or self._ahead != len(self._held) - 1:
            return  # one that is not told of stays the first that is not
        self._ahead_bytes += sum([len(tensor.data) for tensor in response.outputs])
        if self._ahead < MOST_AHEAD and self._ahead_bytes <= MOST_AHEAD_BYTES:
            self._ahead += 1  # the model must not wait at once for those whom this one waits for
            self.on_read(response)

    def end(self, error: BaseException | None = None) -> None:
        """Also of one that nobody wants any more: the model is done with it now."""
        if self.ended:
            return
        self.ended, self._last = True, None if error is None else own(error, STOPPED)
        self._line.ended(self)
        if self._held is None:
            self._finish(self._last)

    def close(self) -> None:
        was_over = self.over
        super().close()
        if self._held:
            self._held = []
        if not was_over:
            self._line.left(self)

    def refused(self, place: Place) -> None:
        """It is not let in. At once, whatever came before it."""
        error = place.exception()  # retrieved: the reader hears of it here
        self._held = None
        self.end(error)

    def hold(self) -> None:
        self._held = []

    def release(self) -> None:
        """All before it have ended."""
        held, self._held = self._held or [], None
        if self.on_read is not None and self._ahead:
            self.on_read = _but(self._ahead, self.on_read)
        for response in held:
            self._say(response)
        if self.ended:
            self._finish(self._last)

    def _say(self, response: InferResponse) -> None:
        super().tell(response)

    def _finish(self, error: BaseException | None) -> None:
        super().end(error)
        self.place.turn = None


class OneTurn(Turn):
    """For who wants exactly one answer: its place is that answer to come."""

    __slots__ = ("_answer",)

    def __init__(self, line: AskLine, place: Place, request: InferRequest) -> None:
        super().__init__(line, place, request)
        self._answer: InferResponse | None = None

    def refused(self, place: Place) -> None:
        if not self.gone:
            self.end(InferenceFailedError("it was not let in"))

    def _say(self, response: InferResponse) -> None:
        if self._answer is None:
            self._answer = response
            return
        self._settle(
            InvalidRequestError(
                "the model gives several answers to a request; ask in a way that takes them one by "
                "one (a stream)"
            )
        )
        self.close()

    def _finish(self, error: BaseException | None) -> None:
        super()._finish(error)
        answer, self._answer = self._answer, None
        if error is not None:
            self._settle(error)
        elif answer is None:
            self._settle(InferenceFailedError("the model ended the request without an answer"))
        else:
            self._settle(answer)

    def _settle(self, outcome: InferResponse | BaseException) -> None:
        settle(self.place, cast("Any", outcome))


class AskLine(Forming):
    """What stands in front of the host of a model that has "ask"."""

    def __init__(
        self,
        host: Host,
        loaded: Loaded,
        config: ModelConfig,
        *,
        max_queue: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(host, loaded, config, max_queue=max_queue, clock=clock)
        self._ragged = _ragged(config)
        self._turns: deque[Turn] | None = deque() if self._order is not None else None
        self._order = None  # it knows one answer for each; see `_turns`
        if self._slots > 1:
            # Nothing is sent ahead: it might stand behind a request that waits for a call of the model
            # by itself, which another instance is to answer. With one there is no such call.
            self._pace = Pace(self._slots, merges=True)
            self._since = None

    def submit(self, request: InferRequest) -> asyncio.Future[InferResponse]:
        """The only answer to come. It fails with what the model says, with RequestTimeoutError, with
        what `close` was given; with InvalidRequestError where there is more than one answer,
        InferenceFailedError where there is none.

        Raises QueueFullError at once; after `close`, the error that it was given.
        """
        place = Place(loop=self._loop)
        place.turn = turn = OneTurn(self, place, request)
        self._enter(place, request)
        self._expect(turn)
        return place

    def open(self, request: InferRequest) -> Responses:
        """The same for any number of answers. Raises as `submit`."""
        place = Place(loop=self._loop)
        place.turn = turn = Turn(self, place, request)
        self._enter(place, request)
        self._expect(turn)
        return turn

    # order ----------------------------------------------------------------------------------------

    def _expect(self, turn: Turn) -> None:
        if self._turns is None or turn.ended:
            return
        if self._turns:
            turn.hold()
        self._turns.append(turn)

    def _pass_on(self) -> None:
        """Those whose turn it is now are heard."""
        turns = self._turns
        while turns and (turns[0].over or turns[0].ended):
            turns.popleft()
            if turns:
                turns[0].release()

    # running --------------------------------------------------------------------------------------

    def _place(self, request: InferRequest) -> tuple[int, Group]:
        """Only shapes must be alike, and not those that the config lets differ (Triton's
        allow_ragged_batch): what else a request says the model reads for each."""
        form = request.form or form_of(request.inputs, request.outputs, request.parameters)
        if form.rows is None or form.group is None:
            return self._most, ()
        if not self._ragged:
            return form.rows, (form.group[0],)
        return form.rows, ([part for part in form.group[0] if part[0] not in self._ragged],)

    def _launch_one(self, waiting: Waiting, now: float) -> None:
        self._launch([waiting], waiting.rows, now)

    def _launch(self, batch: list[Waiting], rows: int, now: float) -> None:
        turns = [cast("Turn", cast("Place", waiting).turn) for waiting in batch]
        for turn in turns:
            turn.gone, turn.started, turn.rows = True, now, rows if self._most else 0
        self._busy += 1
        self._in_flight += len(turns)
        self.executions += 1
        self.samples += rows
        try:
            returned = self._host.ask(turns)
        except Exception as error:  # noqa: BLE001 - whatever broke, nobody may wait for ever
            for turn in turns:
                turn.end(error)
            self._loop.call_soon(self._returned, turns, rows, now, None)
            return
        listen(returned, partial(self._returned, turns, rows, now))

    def _returned(
        self,
        turns: Sequence[Turn],
        rows: int,
        started: float,
        returned: asyncio.Future[None] | None,
    ) -> None:
        """The model can take the next ones."""
        quiet = len(turns) == 1 and not self._queue.length
        self._alone_in_a_row = self._alone_in_a_row + 1 if quiet else 0
        broken = returned is None or error_of(returned) is not None
        if not broken and any(turn.answers or not turn.ended for turn in turns):
            told_s = max([turn.compute_s for turn in turns])
            self._count(rows, told_s or self._clock() - started)
        self._make_room(started, len(turns), left=0)

    def ended(self, turn: Turn) -> None:
        """Told by `turn`, once."""
        if turn.gone:
            self._in_flight -= 1
        if self._turns:
            self._loop.call_soon(self._pass_on)

    def left(self, turn: Turn) -> None:
        """Told by `turn`: its client has gone."""
        if not turn.gone:
            turn.ended = True
            turn.place.turn = None
            if not turn.place.done():
                turn.place.cancel()
        if self._turns:
            self._loop.call_soon(self._pass_on)


def _but(first: int, read: Callable[[InferResponse], None]) -> Callable[[InferResponse], None]:
    """Told of all but the first so many."""
    left = first

    def told(response: InferResponse) -> None:
        nonlocal left
        if left:
            left -= 1
        else:
            read(response)

    return told


def _ragged(config: ModelConfig) -> frozenset[str]:
    inputs = config.triton.get("input", ())
    return frozenset(i["name"] for i in inputs if i.get("allow_ragged_batch"))
