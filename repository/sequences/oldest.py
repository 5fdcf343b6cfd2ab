"""Sequences stay on one instance; in front of each stands the line that the model would have without
them, and it gets at most one request of each sequence at a time, in the order in which they came."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import cast

from repository.hosts.base import Host
from repository.lines import Line
from repository.messages import InferRequest, InferResponse
from repository.prompt import error_of, listen
from repository.responding import Responses
from repository.sequences.book import Book, OpenSequence, Place, Turn
from repository.sequences.following import Following


class OneOf:
    """One instance of a host, as a host of one."""

    slots = 1

    def __init__(self, host: Host, number: int) -> None:
        self.died = host.died
        self._host, self._number = host, number

    def infer(self, request: InferRequest, at: int | None = None) -> asyncio.Future[InferResponse]:
        return self._host.infer(request, at=self._number)

    def ask(self, requests: Sequence[Responses], at: int | None = None) -> asyncio.Future[None]:
        return self._host.ask(requests, at=self._number)

    def room(self, size: int) -> memoryview | None:
        return self._host.room(size)


def instances_of(host: Host) -> list[Host]:
    """Each by itself. They can only be asked, not loaded or stopped."""
    return [cast("Host", OneOf(host, number)) for number in range(host.slots)]


class Oldest:
    """`lines`: of each instance; `candidates`: sequences that one may have. `asks`: its answers are to
    be read one by one."""

    def __init__(
        self,
        lines: Iterable[Line],
        candidates: int,
        book: Book,
        clock: Callable[[], float],
        *,
        asks: bool,
    ) -> None:
        self._lines = list(lines)
        self._candidates = candidates
        self._seated = [0] * len(self._lines)
        self._book = book
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._following = Following(book) if asks else None

    @property
    def waiting(self) -> int:
        return sum(line.queue_length for line in self._lines)

    @property
    def in_flight(self) -> int:
        return sum(line.in_flight for line in self._lines)

    @property
    def executions(self) -> int:
        return sum(line.executions for line in self._lines)

    @property
    def samples(self) -> int:
        return sum(line.samples for line in self._lines)

    @property
    def batches(self) -> dict[int, list[float]]:
        total: dict[int, list[float]] = {}
        for line in self._lines:
            for rows, (count, seconds) in line.batches.items():
                found = total.setdefault(rows, [0, 0.0])
                found[0] += count
                found[1] += seconds
        return total

    def seat(self, sequence: OpenSequence) -> bool:
        number = min(range(len(self._lines)), key=self._seated.__getitem__)
        if self._seated[number] >= self._candidates:
            return False
        self._seated[number] += 1
        sequence.place = Place(number, 0)
        return True

    def leave(self, sequence: OpenSequence) -> None:
        assert sequence.place is not None
        self._seated[sequence.place.instance] -= 1
        sequence.place = None

    def close(self, error: BaseException) -> None:
        for line in self._lines:
            line.close(error)

    def look(self, sequence: OpenSequence) -> None:
        if sequence.running is not None or self._book.closed is not None:
            return
        turn = self._book.head(sequence)
        if turn is None:
            return
        assert sequence.place is not None
        line = self._lines[sequence.place.instance]
        request = self._book.dress(turn, timed=True)
        self._book.begin(turn)
        try:
            if self._following is not None:
                self._following.follow(turn, line.open(request))
            else:
                listen(line.submit(request), partial(self._answered, turn, self._clock()))
        except Exception as error:  # noqa: BLE001 - whatever broke, nobody may wait for ever
            self._loop.call_soon(self._book.ran, turn, error)

    def _answered(self, turn: Turn, began: float, answer: asyncio.Future[InferResponse]) -> None:
        error = error_of(answer)
        if error is not None:
            self._book.ran(turn, error)
            return
        response = answer.result()
        response.queue_s += began - turn.arrived
        self._book.ran(turn, response)
