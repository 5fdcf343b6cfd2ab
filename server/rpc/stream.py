"""ModelStreamInfer: requests come one behind the other, and their answers as the models give them.

Requests are given to the models in the order in which they came, without waiting for the answers of
those before; so sequences stay in order. Models with one answer to a request answer in that order too; a
decoupled one answers when it has something to say. An error is an answer like any other, and the
stream goes on, unless its client wants a status (metadata `triton_grpc_error: true`).

Rules: at most MOST_AT_ONCE requests of a stream are under way; no answer is taken from a model before
the one ahead of it was handed to the connection. So who does not read is not written to, and what waits
for him is bounded. When the stream ends, by whomever, all that it asked for is left with it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

from grpc import aio

from repository.errors import DrainingError
from server.auth import Headers, Scope
from server.intake import adapter_of
from server.metrics.traces import trace_of
from server.patience import error_of
from server.rpc.answers import streamed, streamed_end, streamed_error
from server.rpc.call import Call
from server.rpc.depot import Depot
from server.rpc.statuses import text_of

log = logging.getLogger("modeldepot.grpc")

MOST_AT_ONCE = 64  # requests of one stream that are under way
WANTS_STATUS = (b"triton_grpc_error", b"true")
BROKEN = (aio.AbortError, aio.BaseError, aio.InternalError, aio.UsageError)  # nobody is there
WHERE = "ModelStreamInfer"


class _EndedError(Exception):
    """The whole stream ends with `error`."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class Stream:
    """One. `context`: gRPC's own."""

    def __init__(self, depot: Depot, headers: Headers, context: Any) -> None:
        self._depot = depot
        self._headers = headers
        self._context = context
        self._epoch = depot.door.epoch()
        self._strict = WANTS_STATUS in headers
        self._adapter = adapter_of(b"", headers)
        self._room = asyncio.Semaphore(MOST_AT_ONCE)
        self._one_writes = asyncio.Lock()
        self._last: asyncio.Future[None] | None = None  # the newest request with one answer

    async def run(self) -> None:
        """Until its client has no more to ask and all is answered. Raises what the stream is to end with
        instead of OK."""
        try:
            async with asyncio.TaskGroup() as tasks:
                reader = tasks.create_task(self._read(tasks))
                going = tasks.create_task(self._depot.closing.wait())
                await asyncio.wait((reader, going), return_when=asyncio.FIRST_COMPLETED)
                draining = not reader.done()
                reader.cancel()
                going.cancel()
        except* _EndedError as group:
            raise _first(group).error from None
        except* BROKEN as group:
            log.debug("a stream broke", exc_info=group)
            draining = False
        if draining:
            raise DrainingError("the server is shutting down, and reads no more of this stream")

    async def _read(self, tasks: asyncio.TaskGroup) -> None:
        while (message := await self._context.read()) is not aio.EOF:
            await self._room.acquire()
            self._check_key()
            call = Call(self._depot.door, WHERE, trace_of(self._headers))
            started = False
            try:
                await call.take(message, self._adapter)
                await call.hold()
                self._start(call, tasks)
                started = True
            except Exception as error:  # noqa: BLE001 - the edge: whatever it is, the client is told
                turn = self._turn()
                task = tasks.create_task(self._refuse(call, error, turn))
                task.add_done_callback(partial(self._over, call, turn))
                started = True
            finally:
                if not started:
                    call.end()

    def _check_key(self) -> None:
        """A key that was taken back ends its streams too."""
        epoch = self._depot.door.epoch()
        if epoch != self._epoch:
            try:
                self._depot.gate.check(self._headers, Scope.INFERENCE)
            except Exception as error:
                raise _EndedError(error) from error
            self._epoch = epoch

    def _start(self, call: Call, tasks: asyncio.TaskGroup) -> None:
        """Gives it to its model. Raises what it is to be refused with."""
        turn: _Turn | None = None
        leave: Callable[[], object]
        if call.decoupled:
            answers = call.open()
            leave, answering = answers.close, self._answer_all(call, answers)
        else:
            asked = call.ask()
            turn = self._turn()
            leave, answering = asked.cancel, self._answer(call, asked, turn)
        task = tasks.create_task(answering)
        task.add_done_callback(partial(self._over, call, turn, leave=leave))

    def _turn(self) -> _Turn:
        mine = asyncio.get_running_loop().create_future()
        turn = _Turn(self._last, mine)
        self._last = mine
        return turn

    # answers --------------------------------------------------------------------------------------

    async def _answer(self, call: Call, asked: asyncio.Future[Any], turn: _Turn) -> None:
        try:
            await asyncio.wait((asked,))
            error = error_of(asked)
            if error is not None:
                raise error
            said, well = streamed(await call.hear(asked.result()), final=True), True
        except Exception as error:  # noqa: BLE001 - as above
            said, well = self._said(call, error), False
        await turn.come()
        await self._write(said)
        call.end(answered=well)

    async def _refuse(self, call: Call, error: Exception, turn: _Turn) -> None:
        said = self._said(call, error)
        await turn.come()
        await self._write(said)

    async def _answer_all(self, call: Call, answers: Any) -> None:
        meter, before, index = self._depot.door.meter, perf_counter(), 0
        try:
            async for response in answers:
                now = perf_counter()
                took_s, before = now - before, now
                empty = not response.outputs
                meter.answered(
                    call.model, call.version, index, good=True, empty=empty, took_s=took_s
                )
                index += 1
                await self._write(streamed(await call.hear(response), final=False))
            if call.asked.final:
                await self._write(streamed_end(call.asked.plan.id, call.model, call.version))
            call.end(answered=True)
        except BROKEN:
            raise
        except Exception as error:  # noqa: BLE001 - as above
            meter.answered(
                call.model, call.version, index, good=False, empty=False,
                took_s=perf_counter() - before,
            )  # fmt: skip
            await self._write(self._said(call, error))

    def _said(self, call: Call, error: Exception) -> bytes:
        """Raises _EndedError where the client wants a status."""
        call.fail(error)
        if self._strict:
            raise _EndedError(error)
        return streamed_error(call.asked.plan.id, text_of(error))

    async def _write(self, said: bytes) -> None:
        async with self._one_writes:
            await self._context.write(said)

    def _over(
        self,
        call: Call,
        turn: _Turn | None,
        _: asyncio.Task[None],
        leave: Callable[[], object] | None = None,
    ) -> None:
        """Its task has ended, however that was: one that was cancelled before it began ran nothing."""
        if leave is not None:
            leave()
        call.end()
        if turn is not None:
            turn.pass_on()
        self._room.release()


class _Turn:
    """A place in the row of those that answer once."""

    __slots__ = ("_before", "_mine")

    def __init__(self, before: asyncio.Future[None] | None, mine: asyncio.Future[None]) -> None:
        self._before = before
        self._mine = mine

    async def come(self) -> None:
        """When those ahead have been answered."""
        before, self._before = self._before, None
        if before is not None:
            await asyncio.wait((before,))

    def pass_on(self) -> None:
        if not self._mine.done():
            self._mine.set_result(None)


def _first(group: BaseExceptionGroup[Any]) -> Any:
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found
