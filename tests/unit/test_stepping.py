"""The loop of a worker that generates: what it takes between two steps."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence

from repository.backends.abilities import Told
from repository.errors import RepositoryError
from repository.generate import GenerateRequest, Piece
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
