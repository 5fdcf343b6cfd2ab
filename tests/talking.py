"""Both ends of the socket of a model that takes requests as they are: the worker's loop on a thread, the
front's channel here, and a backend that is one function."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np

from repository.backends.abilities import Asked
from repository.hosts import failures, frames
from repository.hosts.arena import Arena, Window
from repository.hosts.asking import Asking
from repository.hosts.channel import Channel
from repository.hosts.conversing import Conversing
from repository.hosts.frames import BrokenFrameError, Kind
from repository.hosts.pipe import Frame, Pipe
from repository.messages import InferRequest, InferResponse
from repository.responding import Responses
from repository.tensors import Tensor
from tests.fakes.calling import OtherModels


class Backend:
    """`act` is what it does with a group."""

    def __init__(self, act: Callable[[Sequence[Asked]], None]) -> None:
        self.ask = act


class Ends:
    """`channel` here, `talk` there. `lost`: why the channel was lost."""

    def __init__(self) -> None:
        self.caller = OtherModels()
        self.host: Any = SimpleNamespace(slots=1, blocked={})
        self.lost: list[str] = []
        self.channel: Any = None
        self.talk: Any = None
        self.arena = Arena(64 << 20)

    def ask(self, *requests: InferRequest) -> tuple[list[Responses], asyncio.Future[None]]:
        asked = [Responses(request) for request in requests]
        return asked, self.channel.converse(asked)

    async def one(self, request: InferRequest) -> InferResponse:
        (asked,), _ = self.ask(request)
        return await anext(asked)

    @property
    def kept(self) -> int:
        return len(self.channel._groups._kept)

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not true():  # noqa: ASYNC110 - of another thread
                await asyncio.sleep(0.005)


@asynccontextmanager
async def talking(
    act: Callable[[Sequence[Asked]], None], *, decoupled: bool = False, fatal: bool = False
) -> AsyncIterator[Ends]:
    """Until both have ended."""
    ends = Ends()
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    window = Window(os.dup(ends.arena.fd))
    ready = threading.Event()

    def fault(error: BaseException) -> Any:
        return failures.of_infer(error)

    def answer(frame: Frame) -> list[Any]:
        return frames.pack(Kind.REPLY, frame.header[2], frames.encode(None))

    def work() -> None:
        talk = ends.talk = Conversing(Pipe(theirs), window, fault)
        talk.decoupled = decoupled
        talk.start()
        ready.set()
        try:
            talk.run(lambda: Backend(act), answer)  # type: ignore[arg-type, return-value]
        except (BrokenFrameError, OSError):
            assert fatal
        finally:
            theirs.shutdown(socket.SHUT_RDWR)

    thread = threading.Thread(target=work)
    thread.start()
    ready.wait()
    ends.channel = await Channel.open(
        ours, ends.lost.append, Asking(ends.arena), ends.caller, ends.host
    )
    try:
        yield ends
    finally:
        ends.channel.stop()
        await asyncio.to_thread(thread.join, 10)
        await ends.until(lambda: bool(ends.lost))
        ends.channel.fail("over")
        await ends.channel.over()
        theirs.close()
        ends.arena.close()
    assert not thread.is_alive()


def tensor(value: float, size: int = 1) -> InferRequest:
    return InferRequest([Tensor.of("x", np.full(size, value, "f4"))])


def echo(asked: Sequence[Asked]) -> None:
    for request, reply in asked:
        reply.last(InferResponse(list(request.inputs), {"id": request.id, **request.parameters}))


async def every(responses: Responses) -> list[float]:
    return [float(r.outputs[0].array()[0]) async for r in responses]
