"""Where sequences come in: whose turn it is, who waits for a place, and who has been silent too long.

    START ── a place is free ──▶ turns, one at a time, in order ── END, or silent for idle_us ──▶ over
        └── none is: waits, first come first served

A START of an id that is open begins anew in its turn; behind an END it waits for a place like any
other. A turn whose client has left, or whose time was over, before it ran is left out; if it was the
START, what came behind it is refused, and if it was the END, the sequence has ended all the same. A
request that fails changes no state, and its sequence goes on; when its worker dies, it is over.

Rules: a sequence never ends for its silence while a request of it runs or waits. An open sequence keeps
the model (it has a lease), so one that is to leave waits for those that have begun. How long a request
may wait, and how many may, is the business of `repository.queueing`, as without sequences. All calls
come from the event loop's thread; moments are `clock`'s, in seconds.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from itertools import count

from repository.config import Batching, ModelConfig, Sequences
from repository.errors import (
    InferenceFailedError,
    InvalidRequestError,
    ModelNotReadyError,
    QueueFullError,
    RequestTimeoutError,
    WorkerDiedError,
)
from repository.forming import EARLY_S, STOPPED
from repository.hosts.base import Host
from repository.lifecycle.generation import Lease
from repository.messages import InferRequest, InferResponse, Loaded
from repository.prompt import error_of, listen, own
from repository.queueing import Alarm, Queue, settle
from repository.responding import Responses
from repository.sequences.asked import Asked, SequenceId, named, sequence_of
from repository.sequences.book import OpenSequence, Outcome, Strategy, Turn
from repository.sequences.wiring import States, Wiring, rows_of

RETRY_S = 1.0  # when there may be room again; nobody knows how long sequences are
NOTHING = InferRequest([])
FIRST_OF_OUR_OWN = 1 << 30  # ids of requests that are a sequence by themselves
TOO_LONG = (
    "Request timeout expired: it waited for its turn in its sequence as long as it may; ask again "
    "later, or allow more time (the parameter timeout, or batching.timeout_us)"
)


class SequenceLine:
    """`initial`: the states of a new sequence. `hold` makes the lease of one. `strategy` is made for the
    line; see `repository.sequences.direct`, `oldest`.

    open_sequences   by id: those that may go on without a START
    """

    def __init__(
        self,
        host: Host,
        model: str,
        config: ModelConfig,
        loaded: Loaded,
        strategy: Callable[[SequenceLine], Strategy],
        *,
        max_queue: int,
        initial: States | None = None,
        hold: Callable[[], Lease] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        rules = config.sequences or Sequences()
        batching = config.batching or Batching()
        self.open_sequences: dict[SequenceId, OpenSequence] = {}
        self.closed: BaseException | None = None
        self._host = host
        self._model = model
        self._rules = rules
        self._most = loaded.max_batch_size
        self._loop = asyncio.get_running_loop()
        self._clock = clock
        self._hold = hold
        asks = "ask" in loaded.abilities
        self.wiring = Wiring(model, rules, loaded, initial or {}, whole=asks)
        self._limit = batching.max_queue or max_queue
        self._queue = Queue(batching, max_queue)
        self._backlog: OrderedDict[OpenSequence, None] = OrderedDict()
        self._silent: OrderedDict[OpenSequence, float] = OrderedDict()  # since when; in that order
        self._idle_s = rules.idle_us / 1e6
        self._silence = Alarm(self._loop, clock, self._on_silence)
        self._time_over = Alarm(self._loop, clock, self._on_timeout)
        self._letting_go = False
        self._own_ids = count(FIRST_OF_OUR_OWN)
        self._strategy = strategy(self)

    @property
    def queue_length(self) -> int:
        return self._queue.length + self._strategy.waiting

    @property
    def in_flight(self) -> int:
        return self._strategy.in_flight

    @property
    def executions(self) -> int:
        return self._strategy.executions

    @property
    def samples(self) -> int:
        return self._strategy.samples

    @property
    def batches(self) -> dict[int, list[float]]:
        return self._strategy.batches

    def room(self, size: int) -> memoryview | None:
        return self._host.room(size)

    # coming in ------------------------------------------------------------------------------------

    def submit(self, request: InferRequest) -> asyncio.Future[InferResponse]:
        """As `Batcher.submit`. Raises InvalidRequestError for what is wrong with its sequence."""
        return self._take(request, None)

    def open(self, request: InferRequest) -> Responses:
        """As `submit`, for any number of answers."""
        answers = Responses(request)
        turn = self._take(request, answers)
        answers.on_close = partial(_leave, turn)
        listen(turn, partial(_end, answers))
        return answers

    def _take(self, request: InferRequest, answers: Responses | None) -> Turn:
        if self.closed is not None:
            raise own(self.closed, STOPPED)
        asked = self._asked(request)
        sequence = self.open_sequences.get(asked.id)
        if not asked.start and (sequence is None or sequence.ending):
            raise self._not_begun(asked.id)
        turn = Turn(loop=self._loop)
        turn.request, turn.asked, turn.answers = request, asked, answers
        turn.arrived = self._clock()
        turn.queue = turn.listener = turn.heard = None
        turn.rows = 1
        self._enqueue(turn)
        if sequence is None:
            try:
                sequence = self._begin(asked.id)
            except ModelNotReadyError:
                self._queue.remove(turn)
                raise
        turn.sequence = sequence
        sequence.turns.append(turn)
        self._silent.pop(sequence, None)
        turn.add_done_callback(self._on_done)
        self._go_on(sequence)
        return turn

    def _asked(self, request: InferRequest) -> Asked:
        if self._rules.iterative and not request.parameters.get("sequence_id"):
            own_id = next(i for i in self._own_ids if i not in self.open_sequences)
            asked = Asked(own_id, start=True, end=True)
        else:
            asked = sequence_of(request.parameters, self._model)
        self.wiring.check(asked.id)
        if self._most and rows_of(request) != 1:
            raise InvalidRequestError(
                f"inference request to model '{self._model}' must specify batch-size 1 due to "
                f"requirements of sequence batcher; it has {rows_of(request)} rows"
            )
        return asked

    def _not_begun(self, sequence: SequenceId) -> InvalidRequestError:
        return InvalidRequestError(
            f"inference request for sequence {named(sequence)} to model '{self._model}' must specify "
            f"the START flag on the first request of the sequence: none of that id is open (it has "
            f"ended, was silent for more than {self._idle_s:g} s, or the model that had begun it is "
            f"gone)"
        )

    def _enqueue(self, turn: Turn) -> None:
        begun = self._strategy.waiting
        if self._limit and begun and begun + self._queue.length >= self._limit:
            raise QueueFullError(
                f"Exceeds maximum queue size: {begun + self._queue.length} requests wait already; "
                f"ask again later, or raise batching.max_queue",
                retry_after_s=RETRY_S,
            )
        try:
            self._queue.add(turn)
        except QueueFullError as error:
            error.retry_after_s = RETRY_S
            raise
        if turn.deadline is not None:
            self._time_over.set(self._queue.earliest)

    def _begin(self, sequence: SequenceId) -> OpenSequence:
        made = OpenSequence(sequence)
        if self._hold is not None:
            made.lease = self._hold()
            made.lease.begin()
        self.open_sequences[sequence] = made
        return made

    # going on -------------------------------------------------------------------------------------

    def _go_on(self, sequence: OpenSequence) -> None:
        """Whatever has changed of it: it runs, waits, is silent, or is over."""
        if sequence.running is not None or self.open_sequences.get(sequence.id) is not sequence:
            return
        if self.head(sequence) is None:
            if sequence.begun and self.closed is None and not self._letting_go:
                self._be_silent(sequence)
            else:
                self._over(sequence)
        elif sequence.place is None:
            self._backlog.setdefault(sequence)
        elif not sequence.begun:  # its END lies behind it, and another START before it
            self._strategy.leave(sequence)
            self._backlog[sequence] = None
        else:
            self._strategy.look(sequence)
        self._seat()

    def _seat(self) -> None:
        while self._backlog:
            sequence = next(iter(self._backlog))
            if self.head(sequence) is None:
                self._over(sequence)
            elif self._strategy.seat(sequence):
                del self._backlog[sequence]
                sequence.begun = True
                self._strategy.look(sequence)
            else:
                return

    def _be_silent(self, sequence: OpenSequence) -> None:
        if sequence not in self._silent:
            self._silent[sequence] = self._clock()
            self._silence.set(self._silent[next(iter(self._silent))] + self._idle_s)

    def _on_silence(self) -> None:
        now = self._clock() + EARLY_S
        while self._silent:
            sequence, since = next(iter(self._silent.items()))
            if since + self._idle_s > now:
                self._silence.set(since + self._idle_s)
                break
            self._over(sequence)
        self._seat()

    def _over(self, sequence: OpenSequence) -> None:
        self.open_sequences.pop(sequence.id, None)
        self._backlog.pop(sequence, None)
        self._silent.pop(sequence, None)
        sequence.begun = False
        sequence.states = {}
        if sequence.place is not None:
            self._strategy.leave(sequence)
        lease, sequence.lease = sequence.lease, None
        if lease is not None:
            lease.end(used=False)

    def _on_done(self, turn: asyncio.Future[InferResponse]) -> None:
        """Answered, refused, or its client has left: perhaps before it ran."""
        assert isinstance(turn, Turn)
        sequence, asked = turn.sequence, turn.asked
        if turn in sequence.turns:
            turn.request = NOTHING  # others before it may run for long
            if not (asked.start or asked.end):
                sequence.turns.remove(turn)
        self._go_on(sequence)

    def _on_timeout(self) -> None:
        for turn in self._queue.expire(self._clock() + EARLY_S):
            settle(turn, RequestTimeoutError(TOO_LONG, retry_after_s=RETRY_S))
        self._time_over.set(self._queue.earliest)

    def let_go(self) -> None:
        """Nobody can go on with a sequence any more: it is over once nothing of it runs or waits."""
        self._letting_go = True
        for sequence in list(self._silent):
            self._over(sequence)
        self._seat()

    def close(self, cause: BaseException) -> None:
        """Fails what still waits and whatever comes later; what the host has is still answered."""
        self.closed = cause
        self._silence.stop()
        self._time_over.stop()
        waiting = self._queue.clear()
        self._strategy.close(cause)
        for turn in waiting:
            settle(turn, own(cause, STOPPED))
        for sequence in list(self.open_sequences.values()):
            sequence.turns.clear()
            self._over(sequence)

    # the book of the strategies -------------------------------------------------------------------

    def head(self, sequence: OpenSequence) -> Turn | None:
        turns = sequence.turns
        while turns:
            turn = turns[0]
            if turn.done():
                turns.popleft()
                if turn.asked.start or turn.asked.end:
                    sequence.begun = False
            elif not sequence.begun and not turn.asked.start:
                turns.popleft()
                self._queue.remove(turn)
                settle(turn, self._not_begun(sequence.id))
            else:
                return turn
        return None

    def dress(self, turn: Turn, *, timed: bool = False) -> InferRequest:
        states = self.wiring.initial if turn.asked.start else turn.sequence.states
        left_us: int | None = None
        if timed and turn.deadline is not None and not turn.policy.delays:
            left_us = max(1, int((turn.deadline[0] - self._clock()) * 1e6))
        return self.wiring.dress(turn.request, turn.asked, states, left_us)

    def begin(self, turn: Turn) -> None:
        sequence = turn.sequence
        sequence.turns.popleft()
        self._queue.remove(turn)
        sequence.running = turn
        if turn.asked.start:
            sequence.states = self.wiring.initial

    def told(self, turn: Turn, response: InferResponse) -> None:
        sequence = turn.sequence
        response, sequence.states = self.wiring.keep(response, sequence.states)
        if turn.answers is not None:
            turn.answers.tell(response)
        elif turn.heard is None:
            turn.heard = response

    def ran(self, turn: Turn, outcome: Outcome) -> None:
        sequence = turn.sequence
        sequence.running = None
        if isinstance(outcome, InferResponse):
            try:
                self.told(turn, outcome)
                outcome = None
            except InferenceFailedError as error:
                outcome = error
        lost = isinstance(outcome, RequestTimeoutError) and turn.asked.start
        if turn.asked.end or lost or isinstance(outcome, WorkerDiedError):
            sequence.begun = False
        self._go_on(sequence)
        self._give(turn, outcome)

    def _give(self, turn: Turn, error: BaseException | None) -> None:
        if error is not None:
            settle(turn, own(error, STOPPED))
        elif turn.answers is not None:
            settle(turn, InferResponse([]))
        elif turn.heard is not None:
            settle(turn, turn.heard)
        else:
            settle(turn, InferenceFailedError(f"model '{self._model}' ended without an answer"))


def _leave(turn: Turn, answers: Responses) -> None:
    turn.cancel()


def _end(answers: Responses, turn: asyncio.Future[InferResponse]) -> None:
    answers.end(error_of(turn))
