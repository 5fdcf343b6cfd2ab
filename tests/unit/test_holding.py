"""Answers that are held to go out together, and those that wait too long."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Sequence
from queue import Empty, SimpleQueue

import pytest

from repository.backends.abilities import Asked
from repository.hosts.asking import Asking
from repository.hosts.holding import Holding
from repository.hosts.pipe import Pipe
from repository.hosts.worker import Worker
from repository.messages import InferRequest, InferResponse
from repository.tensors import Buffer
from tests.talking import echo, talking, tensor


class Sent:
    """What went out, frame by frame."""

    def __init__(self) -> None:
        self.said: SimpleQueue[list[bytes]] = SimpleQueue()
        self.holding = Holding(self._send)

    def _send(self, parts: list[Buffer]) -> None:
        self.said.put([bytes(part) for part in parts])

    def next(self) -> list[bytes]:
        return self.said.get(timeout=10)


def test_what_is_held_goes_out_before_what_is_sent_and_as_one() -> None:
    sent = Sent()
    sent.holding.hold([b"a"])
    sent.holding.hold([b"b", b"c"])
    assert (sent.holding.count, sent.holding.bytes) == (2, 3)
    sent.holding.send([b"d", b"large"])
    assert sent.next() == [b"abcd", b"large"]
    assert (sent.holding.count, sent.holding.bytes) == (0, 0)
    sent.holding.send()
    sent.holding.send([b"e"])
    assert sent.next() == [b"e"]
    with pytest.raises(Empty):
        sent.said.get_nowait()


def test_what_nobody_sends_goes_out_by_itself_also_after_a_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("repository.hosts.holding.QUIET", 1)
    sent = Sent()
    for said in (b"a", b"b", b"c"):
        sent.holding.hold([said])
        assert sent.next() == [said]
        while sent.holding._awake:  # until it rests
            pass


def test_a_server_that_is_gone_ends_the_looking() -> None:
    def gone(parts: object) -> None:
        raise BrokenPipeError

    holding = Holding(gone)  # type: ignore[arg-type]
    holding.hold([b"a"])
    thread = holding._thread
    assert thread is not None
    thread.join(10)
    assert not thread.is_alive()


class Uneven:
    """Answers 2 only when it may."""

    def __init__(self) -> None:
        self.may = threading.Event()

    def infer(self, request: InferRequest) -> InferResponse:
        if request.inputs[0].array()[0] == 2:
            assert self.may.wait(30)
        return InferResponse(list(request.inputs))


def test_a_quick_answer_does_not_wait_for_a_slow_request_behind_it() -> None:
    ours, theirs = socket.socketpair()
    worker, backend = Worker(Pipe(theirs), None), Uneven()
    worker._backend = backend  # type: ignore[assignment]
    asked = [b"".join(Asking(None).pack(n, tensor(n))[0]) for n in (1, 2)]
    ours.sendall(b"".join(asked))
    ours.settimeout(10)
    thread = threading.Thread(target=worker._run)
    thread.start()
    heard = Pipe(ours)
    try:
        first = heard.receive()
        assert first is not None and first.header[2] == 1
        backend.may.set()
        second = heard.receive()
        assert second is not None and second.header[2] == 2
    finally:
        backend.may.set()
        ours.shutdown(socket.SHUT_RDWR)
        thread.join(10)
        ours.close()
        theirs.close()


async def test_nor_does_one_of_a_model_that_takes_requests_as_they_are() -> None:
    may = threading.Event()

    def act(asked: Sequence[Asked]) -> None:
        if asked[0].request.inputs[0].array()[0] == 2:
            assert may.wait(30)
        echo(asked)

    async with talking(act) as ends:
        (quick,), _ = ends.ask(tensor(1))
        (slow,), _ = ends.ask(tensor(2))
        try:
            async with asyncio.timeout(10):
                await anext(quick)
            assert not slow.waiting
        finally:
            may.set()
        await anext(slow)
