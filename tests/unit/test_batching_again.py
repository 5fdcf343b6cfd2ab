"""A batch that fails because of one of its requests: only that one fails."""

from __future__ import annotations

import asyncio

import pytest

from repository.errors import InferenceFailedError, InvalidTensorError, WorkerDiedError
from repository.messages import InferRequest, InferResponse
from tests.batches import ask, batcher, rows_of, sizes, values_of
from tests.fakes.host import FakeHost, echo

pytestmark = pytest.mark.looptime
BAD = 13.0


def picky(request: InferRequest) -> InferResponse:
    if BAD in request.inputs[0].array():
        raise InvalidTensorError("13 is out of range")
    return echo(request)


async def test_only_the_bad_one_of_a_batch_fails():
    host = FakeHost(result=picky, infer_s=1.0)
    queue = batcher(host)
    futures = [queue.submit(ask(n)) for n in (1, 2, BAD, 4)]
    found = await asyncio.gather(*futures, return_exceptions=True)
    assert [type(f) for f in found] == [InferResponse] * 2 + [InvalidTensorError, InferResponse]
    assert values_of(host) == [[1, 2, 13, 4], [1], [2], [13], [4]]
    assert [f.batch_size for f in found if isinstance(f, InferResponse)] == [1, 1, 1]
    assert (queue.in_flight, queue.queue_length, queue.executions) == (0, 0, 5)


async def test_those_who_run_again_go_before_those_who_came_later_and_one_at_a_time():
    host = FakeHost(result=picky, infer_s=1.0)
    queue = batcher(host)
    first = [queue.submit(ask(n)) for n in (1, BAD, 3)]
    await asyncio.sleep(0.5)
    later = [queue.submit(ask(n)) for n in (4, 5)]
    await asyncio.sleep(1)
    assert queue.in_flight == 1 and queue.queue_length == 4
    await asyncio.gather(*first, *later, return_exceptions=True)
    assert values_of(host) == [[1, 13, 3], [1], [13], [3], [4, 5]]


async def test_every_slot_takes_its_part_of_what_runs_again(looptime):
    host = FakeHost(result=picky, infer_s=1.0, slots=2)
    queue = batcher(host, 4)
    await asyncio.gather(*[queue.submit(ask(n)) for n in (1, 2, 3, BAD)], return_exceptions=True)
    assert looptime == 3 and sizes(host) == [4, 1, 1, 1, 1]


async def test_whoever_has_left_does_not_run_again():
    host = FakeHost(result=picky, infer_s=1.0)
    queue = batcher(host)
    futures = [queue.submit(ask(n)) for n in (1, BAD, 3)]
    await asyncio.sleep(0.5)
    futures[0].cancel()
    await asyncio.sleep(1)
    assert queue.queue_length == 1
    futures[2].cancel()
    assert queue.queue_length == 0
    await asyncio.gather(*futures, return_exceptions=True)
    assert values_of(host) == [[1, 13, 3], [13]]


async def test_a_timeout_does_not_end_the_waiting_of_one_that_has_run_already():
    host = FakeHost(result=picky, infer_s=1.0)
    queue = batcher(host)
    futures = [queue.submit(ask(n, timeout=500_000)) for n in (BAD, 2)]
    assert rows_of(await futures[1]) == [2]
    assert isinstance(futures[0].exception(), InvalidTensorError)


async def test_a_bad_one_that_is_alone_is_not_tried_twice():
    host = FakeHost(result=picky)
    queue = batcher(host)
    with pytest.raises(InvalidTensorError):
        await queue.submit(ask(BAD))
    assert sizes(host) == [1]


@pytest.mark.parametrize("error", [InferenceFailedError("node 7"), WorkerDiedError("gone")])
async def test_any_other_failure_fails_the_batch_and_nothing_runs_twice(error: Exception):
    def broken(request: InferRequest) -> InferResponse:
        raise error

    host = FakeHost(result=broken)
    queue = batcher(host)
    found = await asyncio.gather(*[queue.submit(ask(n)) for n in range(3)], return_exceptions=True)
    assert [type(f) for f in found] == [type(error)] * 3 and sizes(host) == [3]


async def test_a_batch_that_is_too_long_to_be_sent_goes_in_parts():
    class Narrow(FakeHost):
        def infer(self, request: InferRequest) -> asyncio.Future[InferResponse]:
            if request.inputs[0].shape[0] > 1:
                raise InvalidTensorError("too many bytes in one message")
            return super().infer(request)

    queue = batcher(Narrow())
    answers = await asyncio.gather(*[queue.submit(ask(n)) for n in range(3)])
    assert [rows_of(a) for a in answers] == [[0], [1], [2]]


async def test_closing_fails_those_who_wait_to_run_again():
    host = FakeHost(result=picky, infer_s=1.0)
    queue = batcher(host)
    futures = [queue.submit(ask(n)) for n in (1, BAD, 3)]
    await asyncio.sleep(1.5)
    queue.close(WorkerDiedError("the model is going"))
    found = await asyncio.gather(*futures, return_exceptions=True)
    assert [type(f) for f in found] == [InferResponse, WorkerDiedError, WorkerDiedError]


async def test_a_batch_that_is_refused_after_closing_is_not_run_again_and_blames_nobody():
    host = FakeHost(result=picky, infer_s=1.0)
    queue = batcher(host)
    futures = [queue.submit(ask(n)) for n in (1, BAD)]
    await asyncio.sleep(0.5)
    queue.close(WorkerDiedError("the model is going"))
    found = await asyncio.gather(*futures, return_exceptions=True)
    assert [type(f) for f in found] == [WorkerDiedError] * 2 and sizes(host) == [2]
