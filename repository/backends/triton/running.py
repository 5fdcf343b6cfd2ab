"""How `execute` is run: what it returns becomes answers, and every request ends.

    returned                         decoupled           not decoupled
    a list, one for each request     an error            each is answered, or fails, on its own
    None                             as it should be     where every request's sender was taken
    a coroutine                      runs beside others  runs to its end first, on the model's thread

Requests that the model has marked RESCHEDULE are run again, at once and by themselves, until none is.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import threading
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from repository.backends.triton.answer import InferenceResponse
from repository.backends.triton.errors import TritonModelException
from repository.backends.triton.request import InferenceRequest
from repository.errors import InferenceFailedError, RepositoryError, RequestCancelledError

Execute = Callable[[list[InferenceRequest]], Any]
Requests = list[InferenceRequest]
CLOSE_S = 5.0


class Running:
    """One model's `execute`. One thread calls."""

    def __init__(self, execute: Execute, *, decoupled: bool) -> None:
        self._execute = execute
        self._decoupled = decoupled
        self._runner: asyncio.Runner | None = None  # for coroutines on the model's thread
        self._beside: _Beside | None = None

    def run(self, requests: Requests) -> None:
        """Raises what the model raised; those that have not ended are told nothing any more."""
        try:
            while requests:
                requests = self._once(requests)
        except BaseException:
            for request in requests:
                request.way().abandon()
            raise

    def is_ready(self, says: Callable[[], Any]) -> bool:
        """What the model's own `is_ready` says; it may be a coroutine. Raises what that raises, and
        InferenceFailedError for what is no bool."""
        said = says()
        if inspect.isawaitable(said):
            said = self._until_done_here(said)
        if not isinstance(said, bool):
            raise InferenceFailedError(f"is_ready() returned {_kind(said)}; it must return a bool")
        return said

    def close(self) -> None:
        """Coroutines that still run are cancelled."""
        beside, self._beside = self._beside, None
        if beside is not None:
            beside.close()
        runner, self._runner = self._runner, None
        if runner is not None:
            runner.close()

    def _once(self, requests: Requests) -> Requests:
        returned = self._execute(requests)
        if inspect.isawaitable(returned):
            if self._decoupled:
                self._begin_beside(requests, returned)
                return []
            returned = self._until_done_here(returned)
        return self._settle(requests, returned)

    def _until_done_here(self, execution: Awaitable[Any]) -> Any:
        if self._runner is None:
            self._runner = asyncio.Runner()
        # As it is now, not as it was the first time: calls know from it whom they are made for.
        return self._runner.run(_awaited(execution), context=contextvars.copy_context())

    def _begin_beside(self, requests: Requests, execution: Awaitable[Any]) -> None:
        if self._beside is None:
            self._beside = _Beside()
        self._beside.begin(self._until_done(requests, execution))

    async def _until_done(self, requests: Requests, execution: Awaitable[Any]) -> None:
        """As `run`, but for who hears of an error: nobody is there to raise it to."""
        try:
            again = self._settle(requests, await execution)
            while again:
                requests = again
                again = self._settle(requests, await self._execute(requests))
        except asyncio.CancelledError:
            _fail(requests, InferenceFailedError("the model was unloaded before it had answered"))
            raise
        except RepositoryError as error:
            _fail(requests, error)
        except Exception as error:  # noqa: BLE001 - the model's edge
            traceback.print_exc()
            text = str(error).strip()
            named = f"{type(error).__name__}: {text}" if text else type(error).__name__
            _fail(requests, InferenceFailedError(named))

    def _settle(self, requests: Requests, returned: Any) -> Requests:
        """Those that are to run again. Raises InferenceFailedError for what nobody can be told of."""
        if self._decoupled:
            if returned is not None:
                raise InferenceFailedError(
                    f"execute() of a decoupled model returned {_kind(returned)}; it must return None "
                    "and answer with each request's get_response_sender()"
                )
            returned = [None] * len(requests)
        elif returned is None and any(request.way().taken for request in requests):
            returned = [None] * len(requests)
        elif not isinstance(returned, list | tuple):
            raise InferenceFailedError(
                f"execute() returned {_kind(returned)}; it must return a list of InferenceResponse, "
                "one for each request"
            )
        if len(returned) != len(requests):
            raise InferenceFailedError(
                f"execute() returned {len(returned)} responses for {len(requests)} requests; it must "
                "return one for each, in their order"
            )
        return [
            request
            for request, response in zip(requests, returned, strict=True)
            if self._answered(request, response)
        ]

    def _answered(self, request: InferenceRequest, response: Any) -> bool:
        """Or, if True, to be run again."""
        way = request.way()
        if request.again():
            if not way.cancelled:
                return not way.closed
            way.end(RequestCancelledError("the request was cancelled before its next turn"))
        elif response is None and (self._decoupled or way.taken):
            pass  # it has been answered, or will be
        elif not isinstance(response, InferenceResponse):
            way.end(
                InferenceFailedError(
                    f"execute() returned {_kind(response)} for this request; it must be an "
                    "InferenceResponse"
                )
            )
        else:
            try:
                way.last(response)
            except TritonModelException as error:
                way.end(InferenceFailedError(str(error)))
        return False


class _Beside:
    """A loop on a thread of its own, for coroutines that are not waited for."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="triton asyncio", daemon=True)
        self._thread.start()

    def begin(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self) -> None:
        """A coroutine that will not be cancelled, or a call of it that hangs, is left behind."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            running = asyncio.all_tasks(self._loop)
            for task in running:
                task.cancel()
            if running:
                self._loop.run_until_complete(asyncio.gather(*running, return_exceptions=True))
        finally:
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()


async def _awaited(execution: Awaitable[Any]) -> Any:
    return await execution


def _fail(requests: Sequence[InferenceRequest], error: RepositoryError) -> None:
    for request in requests:
        request.way().end(error)


def _kind(value: Any) -> str:
    kind = type(value).__name__
    return "None" if value is None else f"an {kind}" if kind[0] in "aeiouAEIOU" else f"a {kind}"
