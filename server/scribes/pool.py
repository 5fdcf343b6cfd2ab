"""Who takes which job: a few scribes, started when they are needed, and a bounded row before them.

Scribes end when nothing was to do for a while. What waits is bounded in bytes, a job in time; answers
go before requests, since what they hold is free then. Whoever leaves while its job waits takes it away;
a job that has begun is finished, and its answer dropped.
Nothing here knows what the bytes mean.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Sequence

from repository.errors import InferenceFailedError, QueueFullError, WorkerDiedError
from repository.tensors import Buffer
from server.scribes import sheets
from server.scribes.process import Answer, Scribe

MOST_WAITING = 256 * 1024**2  # bytes of requests, and as many of answers; what is beyond is refused
COPIED_AT_ONCE = 512 * 1024  # bytes up to which a copy takes less than handing it to a thread
RETRY_S = 1.0
IDLE_S = 60.0  # after which a scribe without work ends
LEAST_LIMIT_S = 10.0  # for any job
SLOWEST = 2 * 1024**2  # bytes a second, expected of the slowest machine and JSON


class _Row:
    """Those who wait, in the order in which they came."""

    def __init__(self) -> None:
        self.turns: deque[asyncio.Future[Scribe]] = deque()
        self.size = 0  # bytes

    def next(self) -> asyncio.Future[Scribe] | None:
        while self.turns:
            turn = self.turns.popleft()
            if not turn.done():
                return turn
        return None


class Pool:
    """`most` processes at a time; None: half as many as there are cores."""

    def __init__(
        self,
        most: int | None = None,
        *,
        most_waiting: int = MOST_WAITING,
        idle_s: float = IDLE_S,
        least_limit_s: float = LEAST_LIMIT_S,
    ) -> None:
        self._most = most or max(1, len(os.sched_getaffinity(0)) // 2)
        self._most_waiting = most_waiting
        self._idle_s = idle_s
        self.least_limit_s = least_limit_s
        self._all: set[Scribe] = set()
        self._free: dict[Scribe, asyncio.TimerHandle] = {}
        self._rows = {sheets.WRITE: _Row(), sheets.READ: _Row()}
        self._tasks: set[asyncio.Task[None] | asyncio.Task[Answer]] = set()
        self._closed = False

    @property
    def pids(self) -> list[int]:
        return [scribe.pid for scribe in self._all]

    # one job ------------------------------------------------------------------------------------

    async def ask(self, kind: str, told: bytes, parts: Sequence[Buffer | int], size: int) -> Answer:
        """What a scribe answers to `told` and `parts`; `size` is what counts as waiting. Raises
        QueueFullError, and WorkerDiedError where the scribe died or took too long."""
        scribe = await self._take(self._rows[kind], size)
        # From here on the job is its own: whoever waits may leave, the scribe is given back.
        task = asyncio.create_task(self._work(scribe, kind, told, parts, size))
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return await asyncio.shield(task)

    def _done(self, task: asyncio.Task[None] | asyncio.Task[Answer]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # retrieved: whoever waited may be gone

    async def _work(
        self, scribe: Scribe, kind: str, told: bytes, parts: Sequence[Buffer | int], size: int
    ) -> Answer:
        try:
            if size <= COPIED_AT_ONCE:
                sheet = sheets.write(told, parts)
            else:
                sheet = await asyncio.to_thread(sheets.write, told, parts)
        except BaseException:
            self._give(scribe)
            raise
        del parts  # whoever asked may be gone, and a large body is not to wait for its answer
        job = scribe.work(kind, len(told), sheet, self.least_limit_s + size / SLOWEST)
        os.close(sheet)  # the scribe has it; so the memory is not freed by this thread
        return await job

    async def close(self) -> None:
        """Ends every scribe. What waits or is worked on fails with WorkerDiedError."""
        self._closed = True
        while (turn := self._next()) is not None:
            turn.set_exception(_closing())
        await asyncio.gather(*[scribe.close() for scribe in list(self._all)])
        if self._tasks:
            await asyncio.wait(self._tasks)

    # whose turn it is ---------------------------------------------------------------------------

    async def _take(self, row: _Row, size: int) -> Scribe:
        """A scribe without a job, in the order of asking."""
        if self._closed:
            raise _closing()
        if self._free:
            scribe, timer = self._free.popitem()  # the last one that was busy: the others may end
            timer.cancel()
            return scribe
        if len(self._all) < self._most:
            return self._start()
        if row.turns and row.size + size > self._most_waiting:
            raise QueueFullError(
                f"{row.size} bytes of JSON are waiting to be read or written; ask again "
                f"later, or send and ask for large tensors in binary form",
                retry_after_s=RETRY_S,
            )
        turn: asyncio.Future[Scribe] = asyncio.get_running_loop().create_future()
        row.turns.append(turn)
        row.size += size
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._give(turn.result())
            raise
        finally:
            row.size -= size
            if turn in row.turns:
                row.turns.remove(turn)

    def _start(self) -> Scribe:
        try:
            scribe = Scribe(self._give, self._on_end)
        except OSError as error:
            raise InferenceFailedError(
                f"no process could be started for the request's JSON: {error.strerror}"
            ) from error
        self._all.add(scribe)
        return scribe

    def _give(self, scribe: Scribe) -> None:
        """It has no job any more."""
        if scribe.dead:
            return
        turn = self._next()
        if turn is not None:
            turn.set_result(scribe)
            return
        loop = asyncio.get_running_loop()
        self._free[scribe] = loop.call_later(self._idle_s, self._end, scribe)

    def _next(self) -> asyncio.Future[Scribe] | None:
        return next((turn for row in self._rows.values() if (turn := row.next())), None)

    def _end(self, scribe: Scribe) -> None:
        self._free.pop(scribe, None)  # before it has ended, somebody may ask
        self._tasks.add(task := asyncio.create_task(scribe.close()))
        task.add_done_callback(self._done)

    def _on_end(self, scribe: Scribe) -> None:
        self._all.discard(scribe)
        timer = self._free.pop(scribe, None)
        if timer is not None:
            timer.cancel()
        # Where none can be started, those who wait are left to the others, if there are any.
        while not self._closed and (turn := self._next()) is not None:
            try:
                turn.set_result(self._start())
            except InferenceFailedError as error:
                turn.set_exception(error)
                if not self._all:
                    continue
            return


def _closing() -> WorkerDiedError:
    return WorkerDiedError("the server is shutting down")
