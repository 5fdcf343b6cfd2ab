"""Requests go from here to the host; where the model batches, a group of them goes as one.

Who goes when, and with whom: `repository.forming`. Here the requests of a group are merged into one,
and the answer is cut.

Rules: a batch of one is passed through untouched. Whoever cancels in flight, its rows are thrown away.
A batch that the model refuses for what one of its requests holds (InvalidTensorError), or for an
adapter that one of them names, is run again one by one, so that only that one fails; nothing else is
ever run twice.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial

from repository.config import ModelConfig
from repository.errors import DependencyError, InvalidTensorError, NoAdapterSlotError
from repository.forming import STOPPED, Forming
from repository.hosts.base import Host
from repository.merging import merge, split
from repository.messages import InferRequest, InferResponse, Loaded
from repository.prompt import error_of, listen, own
from repository.queueing import Outcome, Waiting, settle
from repository.responding import Responses

OF_ONE = (InvalidTensorError, DependencyError, NoAdapterSlotError)  # one request's fault, perhaps


class Batcher(Forming):
    """What stands in front of the host of a model that takes one request, or one batch, at a time."""

    def __init__(
        self,
        host: Host,
        loaded: Loaded,
        config: ModelConfig,
        *,
        max_queue: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(host, loaded, config, max_queue=max_queue, clock=clock)
        self._give: Callable[[Waiting, Outcome], None]
        self._give = settle if self._order is None else self._order.give

    def open(self, request: InferRequest) -> Responses:
        """As `submit`, for who reads answers one by one: there will be one."""
        return one_answer(request, self.submit)

    def submit(self, request: InferRequest) -> asyncio.Future[InferResponse]:
        """The answer to come. It fails with what the host says, with RequestTimeoutError, or with
        what `close` was given.

        Raises QueueFullError at once; after `close`, the error that it was given.
        """
        waiting = Waiting(loop=self._loop)
        self._enter(waiting, request)
        return waiting

    # running --------------------------------------------------------------------------------------

    def _launch(self, batch: list[Waiting], rows: int, now: float) -> None:
        if len(batch) == 1:
            self._launch_one(batch[0], now)
            return
        try:
            answer = self._host.infer(merge([waiting.request for waiting in batch]))
        except Exception as error:  # noqa: BLE001 - whatever broke, nobody may wait for ever
            self._failed(batch, error)
            return
        self._busy += 1
        self._in_flight += len(batch)
        self.executions += 1
        self.samples += rows
        listen(answer, partial(self._answered, batch, rows, now))

    def _answered(
        self,
        batch: list[Waiting],
        rows: int,
        started: float,
        answer: asyncio.Future[InferResponse],
    ) -> None:
        self._alone_in_a_row = 0
        self._make_room(started, len(batch), left=len(batch))
        error = error_of(answer)
        if error is not None:
            self._failed(batch, error)
            return
        try:
            responses = split(answer.result(), [waiting.rows for waiting in batch])
        except Exception as broken:  # noqa: BLE001 - as above
            self._failed(batch, broken)
            return
        self._count(rows, answer.result().compute_s)
        for waiting, response in zip(batch, responses, strict=True):
            response.queue_s = started - waiting.arrived
            response.batch_size = rows
            self._give(waiting, response)

    def _launch_one(self, waiting: Waiting, now: float) -> None:
        """As `_launch`, for the one that goes alone: what most models do all the time."""
        try:
            answer = self._host.infer(waiting.request)
        except Exception as error:  # noqa: BLE001 - as above
            self._failed([waiting], error)
            return
        self._busy += 1
        self._in_flight += 1
        self.executions += 1
        self.samples += waiting.rows
        if self._since is not None:
            self._since[waiting] = now
        listen(answer, partial(self._answered_one, waiting, now))

    def _answered_one(
        self, waiting: Waiting, started: float, answer: asyncio.Future[InferResponse]
    ) -> None:
        if self._since is not None:
            del self._since[waiting]
        self._alone_in_a_row = 0 if self._queue.length else self._alone_in_a_row + 1
        self._make_room(started, 1, left=1)
        error = error_of(answer)
        if error is not None:
            self._failed([waiting], error)
            return
        response = answer.result()
        response.queue_s = started - waiting.arrived
        self._count(waiting.rows, response.compute_s)
        if self._most:
            response.batch_size = waiting.rows
        self._give(waiting, response)

    def _failed(self, batch: list[Waiting], error: BaseException) -> None:
        if len(batch) > 1 and isinstance(error, OF_ONE):
            if self._closed is None:
                self._again.extend(batch)
                self._go_on(self._clock())
                return
            error = self._closed  # for nobody knows whose fault it was
        for waiting in batch:
            self._give(waiting, own(error, STOPPED))


def one_answer(
    request: InferRequest, submit: Callable[[InferRequest], asyncio.Future[InferResponse]]
) -> Responses:
    """The answer to come, for who reads answers one by one. Raises what `submit` does."""
    responses = Responses(request)
    future = submit(request)
    responses.on_close = partial(_leave, future)
    listen(future, partial(_told, responses))
    return responses


def _told(responses: Responses, answer: asyncio.Future[InferResponse]) -> None:
    error = error_of(answer)
    if error is None:
        responses.tell(answer.result())
    responses.end(error)


def _leave(answer: asyncio.Future[InferResponse], responses: Responses) -> None:
    answer.cancel()
