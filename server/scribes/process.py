"""The server's end of one scribe: a child process with one job at a time.

All calls come from the event loop's thread, which must be the main thread: the kernel ends a scribe
when the thread that started it ends. A job always ends: answered, or with WorkerDiedError when the
process ends or its time is up, for which it is killed. Whether somebody still waits for the answer
makes no difference to the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import subprocess
from collections.abc import Callable
from typing import TypeAlias

import msgspec

from repository import children
from repository.errors import WorkerDiedError
from server.scribes import sheets
from server.scribes.sheets import Sheet

log = logging.getLogger(__name__)

CLOSE_S = 1.0  # between the end of the stream and SIGKILL
Answer: TypeAlias = tuple[str, Sheet]


class Scribe:
    """`on_idle` is called after every job but the last; `on_end` once, when it can do no more."""

    def __init__(self, on_idle: Callable[[Scribe], None], on_end: Callable[[Scribe], None]) -> None:
        self.dead = False
        self._on_idle = on_idle
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._job: asyncio.Future[Answer] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._late = False
        self._ended: asyncio.Future[None] | None = None
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setblocking(False)
        try:
            with theirs:
                self._process = children.start("server.scribes.child", theirs.fileno())
        except OSError:
            self._control.close()
            raise
        self.pid = self._process.pid
        self._loop.add_reader(self._control.fileno(), self._hear)

    def work(self, kind: str, told: int, sheet: int, limit_s: float) -> asyncio.Future[Answer]:
        """The answer to come. `sheet` is the caller's to close, at once. Only one job at a time."""
        assert self._job is None, "a scribe has one job at a time"
        job: asyncio.Future[Answer] = self._loop.create_future()
        if not self.dead:
            # A child that has not come up yet finds the message in its socket.
            with contextlib.suppress(OSError):  # it has just died: the end of the stream is near
                sheets.send(self._control, kind, told, sheet)
            self._job = job
            self._timer = self._loop.call_later(limit_s, self._give_up)
        else:
            job.set_exception(self._reason())
        return job

    def _hear(self) -> None:
        try:
            answer = sheets.receive(self._control)
        except (BlockingIOError, InterruptedError):
            return
        except (OSError, msgspec.MsgspecError, IndexError):
            answer = None
        if answer is None:
            self._die()
            return
        job = self._rest()
        if job is not None and not job.done():
            job.set_result(answer)
        self._on_idle(self)

    def _rest(self) -> asyncio.Future[Answer] | None:
        job, self._job = self._job, None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        return job

    # ending -------------------------------------------------------------------------------------

    def _give_up(self) -> None:
        self._late = True
        self._die()

    def _die(self) -> None:
        """It is killed, if it is not dead yet, and its job fails."""
        if self.dead:
            return
        self.dead = True
        self._loop.remove_reader(self._control.fileno())
        self._control.close()
        self._process.kill()
        self._ended = self._loop.run_in_executor(None, self._bury)
        job = self._rest()
        if job is not None and not job.done():
            job.set_exception(self._reason())
        self._on_end(self)

    def _reason(self) -> WorkerDiedError:
        if self._late:
            return WorkerDiedError(
                "the request's JSON, or its answer's, took too long; ask again, or send and ask for "
                "large tensors in binary form"
            )
        return WorkerDiedError("the process that was at the request's JSON died; ask again")

    def _bury(self) -> None:
        code = self._process.wait()
        if code != 0:
            log.warning("scribe pid=%d ended: %s", self.pid, "too slow" if self._late else code)

    async def close(self) -> None:
        """Ends it: at once if it has a job, else by the end of the stream."""
        if not self.dead and self._job is None:
            self.dead = True
            self._loop.remove_reader(self._control.fileno())
            self._control.close()
            self._ended = self._loop.run_in_executor(None, self._see_off)
            self._on_end(self)
        self._die()
        assert self._ended is not None
        await asyncio.shield(self._ended)

    def _see_off(self) -> None:
        try:
            self._process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
