"""What the batcher concludes from how quickly a host answers, in virtual time."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest

from repository.batching import Batcher
from repository.forming import ALONE
from repository.messages import InferRequest, InferResponse
from tests.batches import ask, batcher, sizes
from tests.fakes.host import FakeHost, echo

pytestmark = pytest.mark.looptime


async def client(queue: Batcher, requests: int, back_s: float) -> None:
    """Asks again `back_s` after each answer."""
    for _ in range(requests):
        await queue.submit(ask(1))
        await asyncio.sleep(back_s)


# sending ahead ----------------------------------------------------------------------------------


async def test_a_worker_that_is_quick_is_given_its_next_work_ahead():
    for slots, infer_s, ahead in ((1, 0.0001, 7), (1, 0.001, 4), (1, 0.006, 0), (3, 0.0001, 1)):
        host = FakeHost(infer_s=infer_s, slots=slots)
        queue = batcher(host, most=0)
        futures = [queue.submit(ask(n)) for n in range(50)]
        assert queue.in_flight == slots, "how quick it is is not known yet"
        await futures[30]
        assert slots * ahead <= queue.in_flight <= slots * (1 + ahead)
        await asyncio.gather(*futures)


async def test_a_quick_worker_that_slows_down_is_given_one_at_a_time_again():
    host = FakeHost(infer_s=0.0001)
    queue = batcher(host, most=0)
    await asyncio.gather(*[queue.submit(ask(n)) for n in range(50)])
    host.infer_s = 1.0
    futures = [queue.submit(ask(n)) for n in range(30)]
    assert queue.in_flight == 8
    await futures[10]
    assert queue.in_flight <= 1
    await asyncio.gather(*futures)


class Lines(FakeHost):
    """Two workers, each with a line of its own; a request goes to the shorter one."""

    def infer(self, request: InferRequest) -> asyncio.Future[InferResponse]:
        lines = self.__dict__.setdefault("lines", [FakeHost(), FakeHost()])
        line = min(lines, key=lambda each: each.running + len(each._waiting))
        line.infer_s = float(request.inputs[0].array()[0, 0])
        return line.infer(request)


async def test_nobody_is_sent_to_stand_behind_a_request_that_is_stuck():
    queue = batcher(Lines(slots=2), most=0)
    await asyncio.gather(*[queue.submit(ask(0.001)) for _ in range(50)])
    stuck = queue.submit(ask(60))
    await asyncio.sleep(0.02)
    await asyncio.gather(*[queue.submit(ask(0.001)) for _ in range(50)])
    assert not stuck.done() and asyncio.get_running_loop().time() < 1
    await stuck


async def test_one_that_stands_behind_a_stuck_one_holds_up_nobody_else():
    queue = batcher(Lines(slots=2), most=0)
    await asyncio.gather(*[queue.submit(ask(0.001)) for _ in range(50)])
    stuck = queue.submit(ask(60))
    await asyncio.sleep(0.005)
    free, behind = queue.submit(ask(0.001)), queue.submit(ask(0.001))
    await free
    await asyncio.sleep(0.006)
    await asyncio.wait_for(queue.submit(ask(0.001)), 0.02)
    assert not stuck.done() and not behind.done()
    await asyncio.gather(stuck, behind)


# waiting for those who come back ----------------------------------------------------------------


async def test_two_groups_that_take_turns_become_one(looptime):
    host = FakeHost(infer_s=0.008)
    queue = batcher(host, 8)
    early = [asyncio.create_task(client(queue, 20, 0.001)) for _ in range(4)]
    await asyncio.sleep(0.004)
    late = [asyncio.create_task(client(queue, 20, 0.001)) for _ in range(4)]
    await asyncio.gather(*early, *late)
    assert sizes(host)[0] == 4 and sizes(host)[3:-3] == [8] * (len(host.batches) - 6)
    assert looptime < 24 * 0.009


async def test_who_is_alone_waits_for_nobody(looptime):
    host = FakeHost(infer_s=0.008)
    await client(batcher(host, 8), 10, 0.001)
    assert looptime == pytest.approx(10 * 0.009)


async def test_nobody_is_waited_for_where_not_all_fit_into_one_batch(looptime):
    host = FakeHost(infer_s=0.008)
    queue = batcher(host, 8)
    first = [queue.submit(ask(n)) for n in range(6)]
    await asyncio.sleep(0.004)
    rest = [queue.submit(ask(n)) for n in range(3)]
    await asyncio.gather(*first, *rest)
    assert looptime == 0.016


async def test_where_nobody_comes_back_it_is_soon_given_up():
    """One comes in the middle of each run, so whatever the host is idle is what was waited."""
    loop = asyncio.get_running_loop()
    idle_s: list[float] = []
    answered_at = loop.time()
    over = loop.create_future()

    class Watched(FakeHost):
        def infer(self, request: InferRequest) -> asyncio.Future[InferResponse]:
            idle_s.append(loop.time() - answered_at)
            if len(idle_s) < 200:
                loop.call_later(0.004, queue.submit, ask(1))
            else:
                over.set_result(None)
            return super().infer(request)

    def answer(request: InferRequest) -> InferResponse:
        nonlocal answered_at
        answered_at = loop.time()
        return echo(request)

    queue = batcher(Watched(infer_s=0.008, result=answer), 8)
    queue.submit(ask(1))
    await over
    waited = [at for at, each in enumerate(idle_s) if each > 0.0001]
    assert max(idle_s) < 0.0021
    assert [b - a for a, b in pairwise(waited)] == [2, 4, 8, 16, 32, 64, 65]


async def test_several_slots_and_models_with_a_delay_of_their_own_do_not_wait_so(looptime):
    for slots, delay in ((2, {}), (1, {"preferred_sizes": (8,)})):
        began = asyncio.get_running_loop().time()
        host = FakeHost(infer_s=0.008, slots=slots)
        queue = batcher(host, 8, **delay)
        first = queue.submit(ask(0))
        await asyncio.sleep(0.004)
        second = [queue.submit(ask(1)) for _ in range(slots + 1)]
        await asyncio.gather(first, *second)
        took_s = asyncio.get_running_loop().time() - began
        assert took_s == pytest.approx(0.016 if slots == 1 else 0.012)


# coming alone -----------------------------------------------------------------------------------


async def test_whoever_always_came_alone_does_not_wait_for_company():
    host = FakeHost(infer_s=0.0001)
    queue = batcher(host)
    for n in range(ALONE):
        future = queue.submit(ask(n))
        assert queue.in_flight == 0, "others may come in the same iteration"
        await future
    future = queue.submit(ask(1))
    assert queue.in_flight == 1
    await future


async def test_company_is_waited_for_again_once_it_was_seen():
    host = FakeHost(infer_s=0.0001)
    queue = batcher(host)
    for n in range(ALONE):
        await queue.submit(ask(n))
    await asyncio.gather(queue.submit(ask(1)), queue.submit(ask(2)), queue.submit(ask(3)))
    assert sizes(host)[ALONE:] == [1, 2]
    await asyncio.gather(queue.submit(ask(1)), queue.submit(ask(2)))
    assert sizes(host)[-1] == 2
