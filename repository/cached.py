"""What stands in front of the line of a model whose answers are kept (`response_cache` in its config):
who asks what was asked before is answered at once, and the model is not run.

Rules: the line behind it sees every other request as it came, and its future is the one that is handed
out, so waiting, leaving and failing are as without. Only answers are kept, no errors. A request that
belongs to a sequence, or names an adapter, passes; so do all, where answers keep an order, while one is
under way. Requests that are alike and come together all run: none waits for another.

Hashing what comes holds up the loop for as long as that takes; more than ON_LOOP bytes are hashed in a
thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

from repository.adapters.orders import ROW_ADAPTERS
from repository.batching import one_answer
from repository.cache import ResponseCache, Shelf, key_of
from repository.errors import RepositoryError
from repository.lines import Line
from repository.messages import InferRequest, InferResponse
from repository.prompt import Prompt, error_of, listen, own
from repository.reports import Lookups
from repository.responding import Responses

ON_LOOP = 64 * 1024  # bytes of a request
STOPPED = "the model was stopped before it answered; ask again"
NO_NAME = b"\0"  # an empty text is the four bytes of its length
SEQUENCE = frozenset({"sequence_id", "sequence_start", "sequence_end"})


class Later(Prompt[InferResponse]):
    """The answer to a request that is looked up in a thread. `behind`: the line's, once it was asked."""

    __slots__ = ("behind",)

    behind: asyncio.Future[InferResponse] | None

    def cancel(self, msg: Any | None = None) -> bool:
        cancelled = super().cancel(msg)
        if cancelled and self.behind is not None:
            self.behind.cancel()
        return cancelled


class Cached:
    """A `Line` (`repository.lines`). What it counts as executions are the model's own.

    lookups   what became of the requests that were looked up
    ordered   answers are to keep the order of their requests
    """

    def __init__(self, line: Line, cache: ResponseCache, *, ordered: bool = False) -> None:
        self.lookups = Lookups()
        self._line = line
        self._cache = cache
        self._shelf: Shelf = cache.shelf()
        self._ordered = ordered
        self._loop = asyncio.get_running_loop()

    @property
    def executions(self) -> int:
        return self._line.executions

    @property
    def samples(self) -> int:
        return self._line.samples

    @property
    def batches(self) -> dict[int, list[float]]:
        return self._line.batches

    @property
    def queue_length(self) -> int:
        return self._line.queue_length

    @property
    def in_flight(self) -> int:
        return self._line.in_flight

    def room(self, size: int) -> memoryview | None:
        return self._line.room(size)

    def submit(self, request: InferRequest) -> asyncio.Future[InferResponse]:
        """As `Batcher.submit`. Of a request that is hashed in a thread, what would be raised is what the
        future fails with."""
        if not self._may_be_known(request):
            return self._line.submit(request)
        if sum([len(tensor.data) for tensor in request.inputs]) > ON_LOOP:
            # Two that are hashed side by side may change places.
            return self._line.submit(request) if self._ordered else self._submit_later(request)
        began = perf_counter()
        key = key_of(request)
        response = self._shelf.find(key)
        if response is None:
            return self._ask(request, key, perf_counter() - began)
        future: Prompt[InferResponse] = Prompt(loop=self._loop)
        future.listener = None
        future.set_result(response)
        self._hit(perf_counter() - began)
        return future

    def open(self, request: InferRequest) -> Responses:
        if not self._may_be_known(request):
            return self._line.open(request)
        return one_answer(request, self.submit)

    def close(self, cause: BaseException) -> None:
        if self._shelf.close():
            _sweep(self._loop, self._cache)
        self._line.close(cause)

    def _may_be_known(self, request: InferRequest) -> bool:
        if request.parameters and not SEQUENCE.isdisjoint(request.parameters):
            return False
        inputs = request.inputs
        if inputs and inputs[-1].name == ROW_ADAPTERS and bytes(inputs[-1].data).strip(NO_NAME):
            return False
        return not (self._ordered and (self._line.in_flight or self._line.queue_length))

    # asked ------------------------------------------------------------------------------------------

    def _ask(
        self, request: InferRequest, key: bytes, took_s: float
    ) -> asyncio.Future[InferResponse]:
        """The model is run. Raises as `submit`."""
        future = self._line.submit(request)
        self.lookups.misses += 1
        self.lookups.miss_s += took_s
        future.add_done_callback(partial(self._keep, key))
        return future

    def _keep(self, key: bytes, answer: asyncio.Future[InferResponse]) -> None:
        if answer.cancelled() or answer.exception() is not None:
            return
        began = perf_counter()
        self._shelf.keep(key, answer.result())
        self.lookups.miss_s += perf_counter() - began

    def _hit(self, took_s: float) -> None:
        self.lookups.hits += 1
        self.lookups.hit_s += took_s

    # in a thread ------------------------------------------------------------------------------------

    def _submit_later(self, request: InferRequest) -> Later:
        future = Later(loop=self._loop)
        future.listener = future.behind = None
        hashing = self._loop.run_in_executor(None, _hashed, request)
        hashing.add_done_callback(partial(self._look_up, future, request))
        return future

    def _look_up(
        self, future: Later, request: InferRequest, hashing: asyncio.Future[tuple[bytes, float]]
    ) -> None:
        if future.done():
            return  # its client has left
        try:
            key, took_s = hashing.result()
            began = perf_counter()
            response = self._shelf.find(key)
            took_s += perf_counter() - began
            if response is not None:
                self._hit(took_s)
                future.set_result(response)
                return
            future.behind = self._ask(request, key, took_s)
        except Exception as error:  # noqa: BLE001 - whatever broke, nobody may wait for ever
            future.set_exception(
                error if isinstance(error, RepositoryError) else own(error, STOPPED)
            )
        else:
            listen(future.behind, partial(_hand_on, future))


def _hashed(request: InferRequest) -> tuple[bytes, float]:
    """With the seconds that it took."""
    began = perf_counter()
    return key_of(request), perf_counter() - began


def _hand_on(future: Later, answer: asyncio.Future[InferResponse]) -> None:
    if future.done():
        return
    error = error_of(answer)
    if error is None:
        future.set_result(answer.result())
    else:
        future.set_exception(own(error, STOPPED))


def _sweep(loop: asyncio.AbstractEventLoop, cache: ResponseCache) -> None:
    """A bit at a time: a large cache has millions of answers."""
    if cache.sweep():
        again: Callable[..., None] = _sweep
        loop.call_soon(again, loop, cache)
