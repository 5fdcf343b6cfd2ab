"""Priorities, time limits, order and refusal of those who wait, in virtual time."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import Any

import numpy as np
import pytest

from repository.config import LevelPolicy
from repository.errors import QueueFullError, RequestTimeoutError, WorkerDiedError
from repository.messages import InferRequest
from repository.queueing import STALE
from repository.tensors import Tensor
from tests.batches import ask, batcher, rows_of, sizes, values_of
from tests.fakes.host import FakeHost

pytestmark = pytest.mark.looptime


async def served(*futures: asyncio.Future[object]) -> list[bool]:
    """Which were answered; the others were refused because their time was over."""
    found = await asyncio.gather(*futures, return_exceptions=True)
    assert all(isinstance(f, RequestTimeoutError) for f in found if isinstance(f, Exception))
    return [not isinstance(f, Exception) for f in found]


# time limits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [0, 1])
async def test_a_request_whose_time_is_over_while_it_waits_is_refused_at_that_moment(
    looptime, most: int
):
    queue = batcher(FakeHost(infer_s=2.0), most)
    first = queue.submit(ask(1))
    late = queue.submit(ask(2, timeout=500_000))
    patient = queue.submit(ask(3, timeout=2_500_000))
    with pytest.raises(RequestTimeoutError, match="Request timeout expired: ") as refusal:
        await late
    assert looptime == 0.5 and refusal.value.retry_after_s is not None
    assert queue.queue_length == 1
    assert [rows_of(await first), rows_of(await patient)] == [[1], [3]]


@pytest.mark.parametrize("most", [0, 8])
async def test_a_timeout_never_ends_what_already_runs(looptime, most: int):
    queue = batcher(FakeHost(infer_s=60.0), most)
    assert rows_of(await queue.submit(ask(1, timeout=1_000))) == [1]
    assert looptime == 60


async def test_the_models_own_limit_holds_for_those_who_bring_none(looptime):
    queue = batcher(FakeHost(infer_s=2.0), 0, timeout_us=1_000_000)
    assert await served(*[queue.submit(ask(n)) for n in range(3)]) == [True, False, False]


async def test_a_request_may_shorten_the_models_limit_and_not_lengthen_it(looptime):
    queue = batcher(FakeHost(infer_s=9.0), 0, timeout_us=1_000_000)
    first = queue.submit(ask(1))
    shorter, longer = queue.submit(ask(2, timeout=300_000)), queue.submit(ask(3, timeout=10**9))
    assert await served(shorter) == [False] and looptime == 0.3
    assert await served(longer) == [False] and looptime == 1.0
    await first


async def test_where_the_model_does_not_allow_it_a_requests_own_timeout_means_nothing(looptime):
    queue = batcher(FakeHost(infer_s=2.0), 0, allow_timeout_override=False)
    assert await served(*[queue.submit(ask(n, timeout=1)) for n in range(3)]) == [True] * 3


async def test_timeouts_that_are_none_limit_nothing(looptime):
    queue = batcher(FakeHost(infer_s=2.0), 0)
    futures = [queue.submit(ask(1, timeout=t)) for t in (0, -1, -(10**20), 10**30)]
    assert await served(*futures) == [True] * 4


async def test_one_whose_time_is_over_does_not_run_even_if_the_timer_is_late():
    loop = asyncio.get_running_loop()
    host = FakeHost(infer_s=1.0)
    queue = batcher(host, 0)
    first, late = queue.submit(ask(1)), queue.submit(ask(2, timeout=500_000))
    queue._time_over.stop()  # as where the loop was too busy to look
    loop.call_later(0.9, host.kill)
    assert isinstance((await asyncio.gather(first, return_exceptions=True))[0], WorkerDiedError)
    assert await served(late) == [False]
    assert len(host.batches) == 1


async def test_the_late_are_put_behind_all_others_where_the_model_says_delay():
    host = FakeHost(infer_s=1.0)
    queue = batcher(host, 0, timeout_action="delay")
    futures = [queue.submit(ask(0))]
    futures += [queue.submit(ask(n, timeout=1_500_000 if n < 4 else 0)) for n in range(1, 6)]
    await asyncio.sleep(1.75)
    futures.append(queue.submit(ask(6)))
    await asyncio.gather(*futures)
    assert values_of(host) == [[0], [1], [4], [5], [6], [2], [3]]


async def test_one_timer_serves_a_whole_queue_of_deadlines():
    loop = asyncio.get_running_loop()
    timers: list[float] = []
    call_later = loop.call_later

    def counted(delay_s: float, *args: object, **kwargs: object) -> asyncio.TimerHandle:
        timers.append(delay_s)
        return call_later(delay_s, *args, **kwargs)  # type: ignore[arg-type]

    queue = batcher(FakeHost(infer_s=100.0), 0, timeout_us=5_000_000)
    first = queue.submit(ask(0))
    loop.call_later = counted  # type: ignore[method-assign,assignment]
    futures = [queue.submit(ask(n)) for n in range(200)]
    assert len(timers) == 1
    assert await served(*futures) == [False] * 200
    assert len(timers) == 1
    del loop.call_later
    await first


async def test_deadlines_in_any_order_each_end_at_their_own_time(looptime):
    loop = asyncio.get_running_loop()
    queue = batcher(FakeHost(infer_s=100.0), 0)
    first = queue.submit(ask(0))
    ended: dict[int, float] = {}
    futures = []
    for n in (7, 3, 9, 1, 5, 3):
        future = queue.submit(ask(n, timeout=n * 1_000_000))
        future.add_done_callback(lambda f, n=n: ended.setdefault(n, loop.time()))
        futures.append(future)
    futures[4].cancel()
    await asyncio.gather(*futures, return_exceptions=True)
    del ended[5]
    assert ended == pytest.approx({n: n for n in (1, 3, 7, 9)})
    await first


# leaving ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [0, 8])
async def test_nothing_is_kept_of_those_who_leave_a_queue_that_does_not_move(most: int):
    queue = batcher(FakeHost(infer_s=1000.0), most, server_queue=10, timeout_us=10**9)
    running = queue.submit(ask(0))
    await asyncio.sleep(0)
    held: list[weakref.ref[np.ndarray[Any, Any]]] = []
    for _ in range(1000):
        body = np.zeros((1, 1), "f4")
        held.append(weakref.ref(body))
        queue.submit(InferRequest([Tensor.of("x", body)])).cancel()
        del body
        assert queue.queue_length == 0
    gc.collect()
    assert sum(ref() is not None for ref in held) == 0
    assert len(queue._queue.deadlines) <= STALE + 2
    running.cancel()


async def test_a_client_that_leaves_ends_its_deadline_with_it():
    queue = batcher(FakeHost(infer_s=3.0), 0)
    first, gone = queue.submit(ask(0)), queue.submit(ask(1, timeout=1_000_000))
    gone.cancel()
    await first
    assert gone.cancelled() and queue.queue_length == 0


# priorities -------------------------------------------------------------------------------------


async def test_lower_numbers_go_first_and_equals_in_the_order_they_came():
    host = FakeHost(infer_s=1.0)
    queue = batcher(host, 0, priorities=3, default_priority=2)
    futures = [queue.submit(ask(0))]
    futures += [queue.submit(ask(n, priority=p)) for n, p in enumerate((3, 2, 1, 3, 1), 1)]
    futures.append(queue.submit(ask(6)))
    await asyncio.gather(*futures)
    assert values_of(host) == [[0], [3], [5], [2], [6], [1], [4]]


async def test_a_priority_that_does_not_exist_is_the_default_one():
    host = FakeHost(infer_s=1.0)
    queue = batcher(host, 0, priorities=2, default_priority=1)
    futures = [queue.submit(ask(0)), queue.submit(ask(1, priority=2))]
    futures += [queue.submit(ask(9, priority=p)) for p in (0, 3, 2**63, -1)]
    await asyncio.gather(*futures)
    assert values_of(host) == [[0], [9], [9], [9], [9], [1]]


async def test_without_priorities_the_parameter_means_nothing():
    host = FakeHost(infer_s=1.0)
    queue = batcher(host, 0)
    futures = [queue.submit(ask(n, priority=9 - n)) for n in range(5)]
    await asyncio.gather(*futures)
    assert values_of(host) == [[n] for n in range(5)]


async def test_a_batch_begins_with_the_most_urgent_and_is_filled_up_with_the_next():
    host = FakeHost(infer_s=1.0)
    queue = batcher(host, 4, priorities=2, default_priority=2)
    first = queue.submit(ask(0))
    await asyncio.sleep(0.5)
    futures = [queue.submit(ask(n, priority=1 + n % 2, timeout=10**7 + n)) for n in range(1, 7)]
    await asyncio.gather(first, *futures)
    assert values_of(host) == [[0], [2, 4, 6, 1], [3, 5]]


async def test_a_delay_counts_from_the_oldest_even_if_another_goes_first(looptime):
    host = FakeHost()
    queue = batcher(host, 8, priorities=2, default_priority=2, max_delay_us=1_000_000)
    old = queue.submit(ask(1))
    await asyncio.sleep(0.75)
    await asyncio.gather(old, queue.submit(ask(2, priority=1)))
    assert looptime == 1.0 and values_of(host) == [[2, 1]]


async def test_each_priority_may_have_a_policy_of_its_own(looptime):
    own = (
        LevelPolicy(priority=1, timeout_us=0, max_queue=1),
        LevelPolicy(priority=3, timeout_action="delay", allow_timeout_override=False),
    )
    host = FakeHost(infer_s=4.0)
    queue = batcher(
        host, 0, priorities=3, default_priority=2, timeout_us=1_000_000, by_priority=own
    )
    running = queue.submit(ask(0))
    urgent = queue.submit(ask(1, priority=1))
    with pytest.raises(QueueFullError, match="Exceeds maximum queue size: 1 "):
        queue.submit(ask(9, priority=1))
    usual = queue.submit(ask(2))
    idle = [queue.submit(ask(n, priority=3, timeout=1)) for n in (3, 4)]
    assert await served(usual) == [False] and looptime == 1.0
    fresh = [queue.submit(ask(n, priority=3)) for n in (5,)]
    assert await served(running, urgent, *idle, *fresh) == [True] * 5
    assert values_of(host) == [[0], [1], [3], [4], [5]]


async def test_the_servers_limit_counts_all_priorities_together():
    queue = batcher(FakeHost(infer_s=1.0), 0, server_queue=2, priorities=2, default_priority=2)
    kept = [queue.submit(ask(0)), queue.submit(ask(1)), queue.submit(ask(1, priority=1))]
    with pytest.raises(QueueFullError) as refusal:
        queue.submit(ask(1, priority=1))
    assert refusal.value.retry_after_s is not None
    await asyncio.gather(*kept)


# order ------------------------------------------------------------------------------------------


class Uneven(FakeHost):
    """A request takes as long as its value says."""

    def infer(self, request: InferRequest):  # type: ignore[no-untyped-def]
        self.infer_s = float(request.inputs[0].array()[0, 0])
        return super().infer(request)


@pytest.mark.parametrize(("ordered", "expected"), [(False, [1, 2, 3, 5]), (True, [5, 1, 3, 2])])
async def test_with_preserve_ordering_answers_come_as_the_requests_did(
    ordered: bool, expected: list[int]
):
    queue = batcher(Uneven(slots=4), 0, preserve_ordering=ordered)
    came: list[int] = []
    futures = []
    for n in (5, 1, 3, 2):
        future = queue.submit(ask(n))
        future.add_done_callback(lambda f, n=n: came.append(n))
        futures.append(future)
    await asyncio.gather(*futures)
    assert came == expected


async def test_an_answer_in_order_does_not_wait_for_those_who_were_refused_or_have_left(looptime):
    queue = batcher(Uneven(slots=2), 0, preserve_ordering=True)
    slow, quick = queue.submit(ask(5)), queue.submit(ask(1))
    late, last = queue.submit(ask(9, timeout=500_000)), queue.submit(ask(2))
    assert await served(late) == [False] and looptime == 0.5
    await asyncio.sleep(2)
    assert not quick.done()
    slow.cancel()
    assert await served(quick) == [True] and looptime == 2.5
    assert await served(last) == [True] and looptime == 3


async def test_order_keeps_nothing_of_those_who_have_left():
    queue = batcher(FakeHost(infer_s=1000.0), 0, preserve_ordering=True)
    running = queue.submit(ask(0))
    for n in range(1000):
        queue.submit(ask(n)).cancel()
    assert queue._order is not None and len(queue._order._expected) <= STALE + 3
    running.cancel()


async def test_order_keeps_no_answer_of_those_who_leave_before_their_turn():
    queue = batcher(Uneven(slots=2), 0, preserve_ordering=True)
    slow = queue.submit(ask(5))
    for _ in range(10):
        quick = queue.submit(ask(0))
        await asyncio.sleep(0.1)
        quick.cancel()
        await asyncio.sleep(0)
        assert queue._order is not None and not queue._order._ready
    await slow


async def test_closing_a_queue_in_order_leaves_nobody_waiting():
    host = Uneven(slots=2)
    queue = batcher(host, 0, preserve_ordering=True)
    futures = [queue.submit(ask(n)) for n in (5, 1, 1)]
    await asyncio.sleep(1.5)
    queue.close(WorkerDiedError("the model is going"))
    found = await asyncio.gather(*futures, return_exceptions=True)
    assert [isinstance(f, Exception) for f in found] == [False, False, False]
    host.kill()
    assert sizes(host) == [1, 1, 1]
