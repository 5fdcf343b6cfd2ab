"""The front's view of one worker: its process, the channel to it, and how it ended."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from functools import partial

from repository.calling import Caller
from repository.hosts.asking import Asking
from repository.hosts.calls import Waits
from repository.hosts.channel import Channel
from repository.hosts.zygotes import Child

EOF_S = 2.0  # how long a worker may live on after it closed its socket


class Worker:
    """One child and the channel to it.

    `ended` resolves with how its process ended, in words, and not before every answer that it had
    still sent has been read: the report of its end may well overtake them.
    """

    def __init__(self, child: Child) -> None:
        self.child = child
        self.channel: Channel | None = None
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._how = ""
        self._lost = True  # until there is a channel
        self._timer: asyncio.TimerHandle | None = None
        child.exited.add_done_callback(self._on_exit)

    async def connect(self, asking: Asking, caller: Caller | None, host: Waits) -> None:
        """`caller`: whom its model asks for other models; `host`: whose worker it is."""
        self._lost = False
        sock, lost = self.child.sock, self._on_lost
        self.channel = await Channel.open(sock, lost, asking, caller, host)

    @property
    def busy(self) -> int:
        return self.channel.pending if self.channel is not None else 0

    def _on_lost(self, why: str) -> None:
        """The socket closed; the report of how the process ended follows, or it is made to."""
        self._lost = True
        self._how = why
        if self.child.exited.done():
            self._how = why or self.child.exited.result()
            self._end()
        else:
            self._later(0.0 if why else EOF_S, partial(self.child.signal, signal.SIGKILL))

    def _on_exit(self, exited: asyncio.Future[str]) -> None:
        self._how = self._how or exited.result()
        if self._lost:
            self._end()
        else:
            # Something that the model forked may hold the socket open a little longer.
            self._later(EOF_S, self._end)

    def _later(self, delay_s: float, what: Callable[[], None]) -> None:
        self._timer = asyncio.get_running_loop().call_later(delay_s, what)

    def _end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if not self.ended.done():
            self.ended.set_result(self._how)

    async def close(self) -> None:
        """Returns when nothing is left of it here."""
        if self.channel is not None:
            self.channel.close()
            await self.channel.over()
        else:
            self.child.sock.close()
