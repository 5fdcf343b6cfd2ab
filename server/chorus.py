"""Several sequences of one request heard as one, for as long as the client is there.

What they say is kept until it is taken, all of it at once: a client that reads slowly costs the memory
of its own pieces and holds up nobody. Rules: nobody waits for one sequence while another has something
to say; leaving closes all streams at once; after an error, or once the client has left, nothing more is
told.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple, TypeAlias

from litestar.types import Receive

from repository.errors import RepositoryError, WorkerDiedError
from repository.generate import Ended, Piece
from repository.streaming import TokenStream
from server.intake import ClientGoneError

log = logging.getLogger("modeldepot.openai")

What: TypeAlias = Piece | Ended


class Said(NamedTuple):
    """`number`: whose. Ended is the last of it."""

    number: int
    what: What


class Chorus:
    """`async with`; then `take` until `singing` is 0. `patience_s`: how long `take` waits in silence.
    `names`: what an error says in front of its text, for each stream.

    The body of the request must have been read: what `receive` tells next is that the client left.
    """

    def __init__(
        self,
        streams: Sequence[TokenStream],
        receive: Receive,
        *,
        patience_s: float,
        names: Sequence[str] = (),
    ) -> None:
        self.singing = len(streams)
        self._streams = streams
        self._names = names
        self._receive = receive
        self._patience_s = patience_s
        self._said: list[Said] = []
        self._error: Exception | None = None
        self._gone = False
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._waits_since = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Chorus:
        new = self._loop.create_task
        self._tasks = [new(self._hear(i, stream)) for i, stream in enumerate(self._streams)]
        self._tasks.append(new(self._watch()))
        self._timer = self._loop.call_later(self._patience_s, self._look)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for stream in self._streams:
            stream.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def take(self) -> list[Said]:
        """What was said since; nothing, if that took too long. Raises the first error of a sequence
        once all that came before it has been taken; ClientGoneError."""
        if not self._said and self._error is None and not self._gone:
            self._waits_since = self._loop.time()
            self._waiter = self._loop.create_future()
            await self._waiter
        if self._gone:
            raise ClientGoneError
        if self._error is not None and not self._said:
            raise self._error
        said, self._said = self._said, []
        self.singing -= sum(isinstance(one.what, Ended) for one in said)
        return said

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _look(self) -> None:
        """One timer for all waits: a timer for each would cost more than the piece it waits for."""
        rest_s = self._patience_s
        if self._waiter is not None and not self._waiter.done():
            rest_s -= self._loop.time() - self._waits_since
            if rest_s <= 0:
                rest_s = self._patience_s
                self._wake()
        self._timer = self._loop.call_later(rest_s, self._look)

    @property
    def error(self) -> Exception | None:
        """What has gone wrong, whether all before it was taken or not."""
        return self._error

    async def _hear(self, index: int, stream: TokenStream) -> None:
        try:
            async for piece in stream:
                self._tell(index, piece)
            ended = stream.ended
            if ended is None or ended.finish == "cancelled":
                raise WorkerDiedError("the text was broken off before its end; ask again")
            self._tell(index, ended)
        except Exception as error:  # noqa: BLE001 - it is raised where it is heard
            if self._names and isinstance(error, RepositoryError):
                error.args = (f"{self._names[index]}: {error}",)  # its own: a copy, or made here
            self._error = self._error or error
            self._wake()

    def _tell(self, index: int, what: What) -> None:
        if self._error is None:
            self._said.append(Said(index, what))
            self._wake()

    async def _watch(self) -> None:
        try:
            while (await self._receive())["type"] == "http.request":
                pass
        except Exception:  # a connection that breaks is a client that is gone
            log.debug("the connection broke while its request ran", exc_info=True)
        self._gone = True
        self._wake()
