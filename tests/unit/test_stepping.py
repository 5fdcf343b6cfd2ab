"""The loop of a worker that generates: what it takes between two steps."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence

from repository.backends.abilities import Told
from repository.errors import RepositoryError
from repository.generate import Ended, GenerateRequest, Piece
from repository.hosts import failures, frames
from repository.hosts.frames import GENERATE
from repository.hosts.pipe import Frame, Pipe
from repository.hosts.stepping import HEARING_S, Stepping
from repository.messages import InferRequest, InferResponse, Loaded
from repository.tensors import Buffer


class Slow:
    """Takes long to begin: a long prompt is cut into tokens."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self._all: list[int] = []

    @property
    def unfinished(self) -> int:
        return len(self._all)

    def begin(self, number: int, request: GenerateRequest) -> None:
        time.sleep(HEARING_S)
        self.calls.append("begin")
        self._all.append(number)

    def step(self) -> Sequence[Told]:
        self.calls.append("step")
        return [Told(number, Piece("x", [1])) for number in self._all]

    def cancel(self, number: int) -> None:
        raise AssertionError

    def load(self, order: object) -> Loaded:
        raise AssertionError

    def infer(self, request: InferRequest) -> InferResponse:
        raise AssertionError

    def unload(self) -> None:
        raise AssertionError


def test_prompts_that_take_long_to_read_do_not_stop_those_who_write() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for number in range(1, 9):
            request = frames.encode(GenerateRequest(text="a"))
            ours.sendall(b"".join(frames.pack(GENERATE, number, request)))
        ours.shutdown(socket.SHUT_WR)
        slow = Slow()
        Stepping(Pipe(theirs), slow, _no_answer, _fault).run()
    assert slow.calls.count("begin") == 8
    assert "begin begin begin" not in " ".join(slow.calls)


def _no_answer(frame: Frame) -> list[Buffer]:
    raise AssertionError(frame)


def _fault(error: BaseException) -> RepositoryError:
    return failures.of_infer(error)


class Writing(Slow):
    """Ends what it writes at the third step; what is given up at the next."""

    def __init__(self) -> None:
        super().__init__()
        self._steps = 0

    def begin(self, number: int, request: GenerateRequest) -> None:
        self.calls.append("begin")
        self._all.append(number)

    def step(self) -> Sequence[Told]:
        self.calls.append("step")
        self._steps += 1
        if self._steps < 3:
            return [Told(number, Piece("x", [1])) for number in self._all]
        ended, self._all = self._all, []
        return [Told(number, Ended("length", 1, 2)) for number in ended]


def test_a_worker_falls_asleep_when_what_was_begun_before_has_ended() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        request = frames.encode(GenerateRequest(text="a"))
        ours.sendall(b"".join(frames.pack(GENERATE, 1, request)))
        ours.sendall(b"".join(frames.pack(frames.SLEEP, 2, frames.encode(None))))
        ours.sendall(b"".join(frames.pack(frames.Kind.MEMORY, 3, frames.encode(None))))
        ours.sendall(b"".join(frames.pack(frames.STOP, 0, b"")))
        backend = Writing()

        def answer(frame: Frame) -> list[Buffer]:
            kind = frames.Kind(frame.header[3])
            backend.calls.append(kind.name)
            return frames.pack(frames.REPLY, frame.header[2], frames.encode(None))

        Stepping(Pipe(theirs), backend, answer, _fault).run()
    assert backend.calls == ["begin", "MEMORY", "step", "step", "step", "SLEEP"]
