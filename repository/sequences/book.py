"""A sequence, its turns, and what the two strategies may do with them.

Rule: a turn runs when it is the first of its sequence and nothing of that sequence runs. All calls come
from the event loop's thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeAlias

from repository.lifecycle.generation import Lease
from repository.lines import Counting
from repository.messages import InferRequest, InferResponse
from repository.queueing import Waiting
from repository.responding import Responses
from repository.sequences.asked import Asked, SequenceId
from repository.tensors import Tensor

# An answer; what went wrong; None: all answers have been told before.
Outcome: TypeAlias = InferResponse | BaseException | None


class Place(NamedTuple):
    instance: int
    slot: int  # the row of its batch; oldest: nothing


class Turn(Waiting):
    """One request of a sequence.

    answers   where they go one by one, if somebody reads them so
    heard     else the first of them
    """

    __slots__ = ("answers", "asked", "heard", "sequence")

    answers: Responses | None
    asked: Asked
    heard: InferResponse | None
    sequence: OpenSequence


@dataclass(slots=True, eq=False)
class OpenSequence:
    """From its START until it has ended, or was silent for too long.

    turns     that have not begun, in order; some may be over (their clients have left)
    running   the one that the model has
    begun     it was given a place for its START, and no END has come since
    states    what the model said last to itself
    lease     keeps the model while it is open
    """

    id: SequenceId
    turns: deque[Turn] = field(default_factory=deque)
    running: Turn | None = None
    place: Place | None = None
    begun: bool = False
    states: Mapping[str, Tensor] = field(default_factory=dict)
    lease: Lease | None = None

    @property
    def ending(self) -> bool:
        """Its END is here: nothing but a START may come after it."""
        last = self.turns[-1] if self.turns else self.running
        return last.asked.end if last is not None else not self.begun


class Book(Protocol):
    """What a strategy sees of the line."""

    @property
    def closed(self) -> BaseException | None: ...

    def head(self, sequence: OpenSequence) -> Turn | None:
        """Its next turn, of one of which nothing runs."""
        ...

    def dress(self, turn: Turn, *, timed: bool = False) -> InferRequest:
        """What the model is to get, as things are now. `timed`: with the time that it may still wait,
        where there is a limit."""
        ...

    def begin(self, turn: Turn) -> None:
        """It is on its way to the model. Then `ran` is called, once."""
        ...

    def told(self, turn: Turn, response: InferResponse) -> None:
        """One of any number of answers."""
        ...

    def ran(self, turn: Turn, outcome: Outcome) -> None: ...


class Strategy(Counting, Protocol):
    """Who has a place, and when what runs.

    waiting   turns that have begun and wait for their batch
    """

    @property
    def waiting(self) -> int: ...

    def seat(self, sequence: OpenSequence) -> bool:
        """Gives it a place; false: none is free."""
        ...

    def leave(self, sequence: OpenSequence) -> None:
        """Takes its place back."""
        ...

    def look(self, sequence: OpenSequence) -> None:
        """It has a place, and perhaps a turn that can run."""
        ...

    def close(self, error: BaseException) -> None: ...
