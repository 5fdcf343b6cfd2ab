"""The batcher in front of a fake host, in virtual time."""

from __future__ import annotations

import asyncio
import gc
import weakref

import numpy as np
import pytest

from repository.errors import InferenceFailedError, QueueFullError, WorkerDiedError
from repository.messages import InferRequest, InferResponse
from repository.tensors import Tensor
from tests.batches import ask, batcher, rows_of, sizes, values_of
from tests.fakes.host import FakeHost

pytestmark = pytest.mark.looptime


async def test_without_batching_each_slot_is_given_one_and_the_rest_wait_in_order(looptime):
    host = FakeHost(infer_s=1.0, slots=2)
    queue = batcher(host, most=0)
    futures = [queue.submit(ask(n)) for n in range(6)]
    assert (queue.in_flight, queue.queue_length, len(host.batches)) == (2, 4, 2)
    answers = await asyncio.gather(*futures)
    assert [rows_of(a) for a in answers] == [[n] for n in range(6)]
    assert looptime == 3
    assert values_of(host) == [[n] for n in range(6)]
    assert (queue.in_flight, queue.queue_length) == (0, 0)
    assert all(a.batch_size == 0 and a.compute_s == 1.0 for a in answers)
    assert [a.queue_s for a in answers] == pytest.approx([0, 0, 1, 1, 2, 2])


async def test_requests_are_not_merged_where_batching_is_switched_off(looptime):
    host = FakeHost(infer_s=1.0)
    queue = batcher(host, most=8, enabled=False)
    answers = await asyncio.gather(*[queue.submit(ask(n, n + 0.5)) for n in range(3)])
    assert sizes(host) == [2, 2, 2] and looptime == 3
    assert [rows_of(a) for a in answers] == [[0, 0.5], [1, 1.5], [2, 2.5]]
    assert all(a.batch_size == 2 for a in answers) and queue.samples == 6


async def test_a_request_alone_is_handed_over_untouched():
    for most in (0, 8):
        host = FakeHost()
        request = ask(1, 2)
        await batcher(host, most).submit(request)
        assert host.batches[0] is request


async def test_a_full_queue_refuses_at_once_and_says_when_to_return():
    host = FakeHost(infer_s=4.0)
    queue = batcher(host, most=0, server_queue=3)
    kept = [queue.submit(ask(n)) for n in range(4)]
    with pytest.raises(QueueFullError, match="Exceeds maximum queue size: 3 ") as refusal:
        queue.submit(ask(9))
    assert refusal.value.retry_after_s is not None and refusal.value.retry_after_s > 0
    assert len(await asyncio.gather(*kept)) == 4


async def test_the_models_own_queue_limit_overrides_the_servers():
    queue = batcher(FakeHost(infer_s=1.0), 8, server_queue=1, max_queue=2)
    kept = [queue.submit(ask(n)) for n in range(2)]
    with pytest.raises(QueueFullError):
        queue.submit(ask(9))
    await asyncio.gather(*kept)


async def test_those_who_left_make_way_in_a_full_queue():
    queue = batcher(FakeHost(infer_s=1.0), server_queue=2)
    gone = queue.submit(ask(1))
    stays = queue.submit(ask(2))
    gone.cancel()
    late = queue.submit(ask(3))
    assert queue.queue_length == 2
    assert [rows_of(await stays), rows_of(await late)] == [[2], [3]]


async def test_requests_that_come_together_go_together(looptime):
    host = FakeHost(infer_s=1.0)
    queue = batcher(host)
    answers = await asyncio.gather(*[queue.submit(ask(n, n + 0.5)) for n in range(3)])
    assert [rows_of(a) for a in answers] == [[0, 0.5], [1, 1.5], [2, 2.5]]
    assert sizes(host) == [6] and looptime == 1
    assert all(a.batch_size == 6 for a in answers)
    assert (queue.executions, queue.samples) == (1, 6)


async def test_one_batch_is_in_flight_per_slot_and_what_came_meanwhile_is_the_next():
    host = FakeHost(infer_s=1.0)
    queue = batcher(host)
    first = queue.submit(ask(0))
    await asyncio.sleep(0.5)
    rest = [queue.submit(ask(n)) for n in range(1, 6)]
    await asyncio.sleep(0.25)
    assert sizes(host) == [1] and queue.queue_length == 5
    await asyncio.gather(first, *rest)
    assert sizes(host) == [1, 5]
    assert (await rest[0]).queue_s == pytest.approx(0.5, abs=0.005)


async def test_two_slots_take_two_batches():
    host = FakeHost(infer_s=1.0, slots=2)
    queue = batcher(host, 4)
    futures = [queue.submit(ask(n)) for n in range(10)]
    await asyncio.sleep(0.5)
    assert sizes(host) == [4, 4] and queue.in_flight == 8
    await asyncio.gather(*futures)
    assert sizes(host) == [4, 4, 2]


async def test_a_batch_is_never_larger_than_the_model_takes():
    host = FakeHost()
    queue = batcher(host, 8)
    futures = [queue.submit(ask(*[n] * 3)) for n in range(5)]
    assert [rows_of(a) for a in await asyncio.gather(*futures)] == [[n] * 3 for n in range(5)]
    assert sizes(host) == [6, 6, 3]


async def test_nobody_overtakes_a_request_that_does_not_fit():
    host = FakeHost()
    queue = batcher(host)
    plain = [ask(1), ask(2), ask(3, width=2), ask(4)]
    other = [ask(5), ask(6, datatype="INT32"), ask(7), ask(8)]
    other[3].outputs = ("y",)
    more = [ask(9), ask(10)]
    more[1].parameters = {"temperature": 0.5}
    await asyncio.gather(*[queue.submit(r) for r in (*plain, *other, *more)])
    seen = [r.inputs[0].array()[:, 0].tolist() for r in host.batches]
    assert seen == [[1, 2], [3], [4, 5], [6], [7], [8], [9], [10]]


async def test_inputs_without_a_common_batch_axis_go_alone():
    host = FakeHost()
    queue = batcher(host)
    scalar = InferRequest([Tensor.of("x", np.array(1.0, "f4"))])
    uneven = InferRequest([*ask(1).inputs, Tensor.of("y", np.zeros((2, 1), "f4"))])
    await asyncio.gather(*[queue.submit(r) for r in (scalar, scalar, uneven, uneven)])
    assert [id(r) for r in host.batches] == [id(scalar)] * 2 + [id(uneven)] * 2


async def test_a_lone_request_waits_for_company_no_longer_than_the_delay(looptime):
    host = FakeHost()
    answer = await batcher(host, max_delay_us=250_000).submit(ask(1))
    assert looptime == 0.25 and answer.queue_s == pytest.approx(0.25)


async def test_the_delay_counts_from_the_oldest_request(looptime):
    host = FakeHost()
    queue = batcher(host, max_delay_us=1_000_000)
    futures = []
    for n in range(3):
        futures.append(queue.submit(ask(n)))
        await asyncio.sleep(0.4)
    await asyncio.gather(*futures)
    assert looptime == 1.2 and sizes(host) == [3]
    assert (await futures[0]).queue_s == pytest.approx(1.0)


async def test_a_full_batch_does_not_wait(looptime):
    host = FakeHost()
    queue = batcher(host, 4, max_delay_us=1_000_000)
    await asyncio.gather(*[queue.submit(ask(n)) for n in range(4)])
    assert looptime == 0


async def test_a_batch_that_cannot_grow_does_not_wait():
    host = FakeHost()
    queue = batcher(host, 4, max_delay_us=1_000_000)
    first = [queue.submit(ask(1, 1, 1)), queue.submit(ask(2, 2, 2))]
    await first[0]
    assert sizes(host) == [3] and not first[1].done()
    await first[1]


async def test_the_largest_preferred_size_goes_at_once_and_the_rest_waits(looptime):
    host = FakeHost()
    queue = batcher(host, 8, max_delay_us=1_000_000, preferred_sizes=(2, 4))
    futures = [queue.submit(ask(n)) for n in range(5)]
    await asyncio.gather(*futures[:4])
    assert sizes(host) == [4] and looptime == 0
    await futures[4]
    assert sizes(host) == [4, 1] and looptime == 1


async def test_past_the_delay_all_that_fits_goes_preferred_or_not():
    host = FakeHost(infer_s=5.0)
    queue = batcher(host, 8, max_delay_us=1_000_000, preferred_sizes=(4,))
    first = [queue.submit(ask(n)) for n in range(4)]
    await asyncio.sleep(1)
    later = [queue.submit(ask(n)) for n in range(6)]
    await asyncio.gather(*first, *later)
    assert sizes(host) == [4, 6]


async def test_without_a_delay_a_preferred_size_is_still_preferred():
    host = FakeHost()
    queue = batcher(host, 8, preferred_sizes=(4,))
    await asyncio.gather(*[queue.submit(ask(n)) for n in range(7)])
    assert sizes(host) == [4, 3]


async def test_a_request_above_every_preferred_size_does_not_wait(looptime):
    queue = batcher(FakeHost(), 8, max_delay_us=1_000_000, preferred_sizes=(2,))
    await queue.submit(ask(1, 2, 3))
    assert looptime == 0


async def test_a_client_that_leaves_the_queue_is_dropped_and_hurts_nobody():
    for most in (0, 8):
        host = FakeHost(infer_s=1.0)
        queue = batcher(host, most)
        blocker = queue.submit(ask(0))
        await asyncio.sleep(0.1)
        futures = [queue.submit(ask(n)) for n in range(1, 5)]
        futures[0].cancel()
        futures[2].cancel()
        assert queue.queue_length == 2
        await blocker
        assert [rows_of(await futures[1]), rows_of(await futures[3])] == [[2], [4]]
        seen = [v for r in host.batches for v in r.inputs[0].array()[:, 0].tolist()]
        assert seen == [0, 2, 4]


async def test_a_client_that_leaves_in_flight_hurts_nobody():
    queue = batcher(FakeHost(infer_s=1.0))
    futures = [queue.submit(ask(n)) for n in range(3)]
    await asyncio.sleep(0.5)
    futures[1].cancel()
    assert queue.in_flight == 3  # the worker still computes its rows
    assert [rows_of(await futures[0]), rows_of(await futures[2])] == [[0], [2]]
    assert queue.in_flight == 0


async def test_a_head_that_leaves_takes_its_timer_along(looptime):
    host = FakeHost()
    queue = batcher(host, max_delay_us=1_000_000)
    gone = queue.submit(ask(1))
    await asyncio.sleep(0.5)
    gone.cancel()
    await queue.submit(ask(2))
    assert sizes(host) == [1] and looptime == 1.5


async def test_everyone_in_a_broken_batch_gets_an_exception_of_its_own():
    def broken(request: InferRequest) -> InferResponse:
        raise InferenceFailedError("node 7 overflowed")

    queue = batcher(FakeHost(result=broken))
    errors = await asyncio.gather(*[queue.submit(ask(n)) for n in range(3)], return_exceptions=True)
    assert [str(e) for e in errors] == ["node 7 overflowed"] * 3
    assert all(isinstance(e, InferenceFailedError) for e in errors)
    assert len({id(e) for e in errors}) == 3


async def test_a_foreign_exception_comes_out_as_ours_with_its_type():
    def broken(request: InferRequest) -> InferResponse:
        raise ZeroDivisionError("division by zero")

    with pytest.raises(InferenceFailedError, match="ZeroDivisionError: division by zero") as info:
        await batcher(FakeHost(result=broken)).submit(ask(1))
    assert isinstance(info.value.__cause__, ZeroDivisionError)


async def test_a_host_that_dies_fails_what_it_had_and_what_waited():
    host = FakeHost(infer_s=1.0)
    queue = batcher(host, 2)
    futures = [queue.submit(ask(n)) for n in range(5)]
    await asyncio.sleep(0.5)
    host.kill("exit code -9")
    errors = await asyncio.gather(*futures, return_exceptions=True)
    assert all(isinstance(e, WorkerDiedError) for e in errors) and len({id(e) for e in errors}) == 5
    assert (queue.in_flight, queue.queue_length) == (0, 0)


async def test_a_host_that_refuses_to_take_a_request_leaves_nobody_waiting():
    class Refusing(FakeHost):
        def infer(self, request: InferRequest) -> asyncio.Future[InferResponse]:
            raise OSError("channel closed")

    for most in (0, 8):
        queue = batcher(Refusing(), most)
        errors = await asyncio.gather(
            *[queue.submit(ask(n)) for n in range(3)], return_exceptions=True
        )
        assert [type(e) for e in errors] == [InferenceFailedError] * 3
        assert queue.in_flight == 0


async def test_close_fails_what_waits_and_what_comes_and_lets_the_host_finish():
    for most in (0, 1):
        host = FakeHost(infer_s=1.0)
        queue = batcher(host, most)
        futures = [queue.submit(ask(n)) for n in range(4)]
        await asyncio.sleep(0.5)
        taken = queue.in_flight
        reason = WorkerDiedError("the model is going")
        queue.close(reason)
        with pytest.raises(WorkerDiedError, match="going"):
            queue.submit(ask(9))
        answers = await asyncio.gather(*futures, return_exceptions=True)
        assert [isinstance(a, InferResponse) for a in answers] == [n < taken for n in range(4)]
        assert str(answers[3]) == "the model is going" and answers[3] is not reason
        assert (queue.in_flight, queue.queue_length) == (0, 0)


async def test_close_stops_a_waiting_timer(looptime):
    queue = batcher(FakeHost(), max_delay_us=1_000_000)
    future = queue.submit(ask(1))
    await asyncio.sleep(0.1)
    queue.close(WorkerDiedError("gone"))
    with pytest.raises(WorkerDiedError):
        await future
    await asyncio.sleep(5)


class Failing(FakeHost):
    def infer(self, request: InferRequest) -> asyncio.Future[InferResponse]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[InferResponse] = loop.create_future()
        loop.call_later(1.0, future.set_exception, WorkerDiedError("died"))
        return future


@pytest.mark.parametrize("requests", [1, 3])
async def test_of_a_request_that_failed_nothing_waits_for_the_garbage_collector(requests: int):
    queue = batcher(Failing(), most=8)
    gc.collect()
    gc.disable()
    try:
        bodies = [np.zeros((1, 1), "f4") for _ in range(requests)]
        held = [weakref.ref(body) for body in bodies]
        futures = [queue.submit(InferRequest([Tensor.of("x", body)])) for body in bodies]
        del bodies
        await asyncio.wait(futures)
        assert all(isinstance(f.exception(), WorkerDiedError) for f in futures)
        del futures
        await asyncio.sleep(1)
        assert [ref() for ref in held] == [None] * requests
    finally:
        gc.enable()
