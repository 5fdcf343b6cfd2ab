"""How a worker runs whose backend generates: one round after the other, and frames in between.

    while anything is unfinished: take the frames that are here, step, tell what it wrote
    else: wait for a frame

What a step wrote of all its sequences is one frame; the ends follow it, in the same write. A request
for tensors, for adapters or for memory is answered between two steps, never during one; one to sleep
when everything has ended (who was cancelled a moment ago ends at the next step).

A step that raises has failed every sequence that it ran: nobody knows which it was. All are taken
out of the backend before anything else joins; a backend that cannot even do that has lost its mind,
and the worker ends. MOST frames are taken before a step, for about HEARING_S, or who asks a lot (or
for long prompts, which must be cut into tokens) would stop all texts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from repository.backends.abilities import Generates, Told
from repository.errors import RepositoryError
from repository.generate import Ended, Piece
from repository.hosts import failures, frames
from repository.hosts.frames import CANCEL, ERROR, GENERATE, PIECES, REPLY, SLEEP, STOP
from repository.hosts.pipe import Frame, Pipe
from repository.tensors import Buffer

MOST = 64
HEARING_S = 0.02


class Stepping:
    """`answer` does what any worker does with a frame; `fault` makes an error of ours of whatever a
    model raised, and logs it."""

    def __init__(
        self,
        pipe: Pipe,
        backend: Generates,
        answer: Callable[[Frame], list[Buffer]],
        fault: Callable[[BaseException], RepositoryError],
    ) -> None:
        self._pipe = pipe
        self._backend = backend
        self._answer = answer
        self._fault = fault
        self._running: set[int] = set()
        self._stopping = False
        self._tired: Frame | None = None  # it is to sleep

    def run(self) -> None:
        """Until the stream ends; or until told to stop and everything has ended."""
        while self._hear():
            if self._backend.unfinished:
                self._step()

    def _hear(self) -> bool:
        until = math.inf
        for _ in range(MOST):
            idle = not self._backend.unfinished
            if idle and self._tired is not None:
                tired, self._tired = self._tired, None
                self._pipe.send(self._answer(tired))
            if self._stopping and idle:
                return False
            if not idle and (time.monotonic() > until or not self._pipe.stirs):
                return True
            frame = self._pipe.receive()
            if frame is None:
                return False
            until = min(until, time.monotonic() + HEARING_S)
            self._take(frame)
        return True

    def _take(self, frame: Frame) -> None:
        _, _, number, kind, *_ = frame.header
        if kind == GENERATE:
            self._begin(frame)
        elif kind == CANCEL:
            if number in self._running:
                self._backend.cancel(number)
        elif kind == STOP:
            self._stopping = True
        elif kind == SLEEP:
            # Its payload, which the pipe will write over, is empty.
            self._tired = Frame(frame.header, frame.payload[:0])
        else:
            self._pipe.send(self._answer(frame))

    def _begin(self, frame: Frame) -> None:
        _, meta, number, *_ = frame.header
        request = frames.read_generate(frame.payload[:meta])
        try:
            self._backend.begin(number, request)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the model's edge
            self._pipe.send(_failed(number, self._fault(error)))
        else:
            self._running.add(number)

    def _step(self) -> None:
        try:
            told = self._backend.step()
            parts = self._say(told)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the model's edge
            parts = self._fail_all(self._fault(error))
        if parts:
            self._pipe.send([b"".join(parts)])

    def _say(self, told: Sequence[Told]) -> list[Buffer]:
        pieces: list[tuple[int, Piece]] = []
        ends: list[Buffer] = []
        over = []
        for number, what in told:
            if number not in self._running:  # it was failed before it could end
                continue
            if isinstance(what, Piece):
                pieces.append((number, what))
                continue
            over.append(number)
            if isinstance(what, Ended):
                ends += frames.pack(REPLY, number, frames.encode(what))
            else:
                ends += _failed(number, self._fault(what))
        said = frames.pack(PIECES, 0, frames.encode(pieces)) if pieces else []
        self._running.difference_update(over)
        return [*said, *ends]

    def _fail_all(self, error: RepositoryError) -> list[Buffer]:
        failed, self._running = self._running, set()
        for number in failed:
            self._backend.cancel(number)
        if self._backend.unfinished:
            self._backend.step()
        if self._backend.unfinished:
            raise RuntimeError("sequences stay in the model though they were cancelled")
        return [part for number in failed for part in _failed(number, error)]


def _failed(number: int, error: RepositoryError) -> list[Buffer]:
    return frames.pack(ERROR, number, frames.encode(failures.to_wire(error)))
