"""The line in front of a model that takes requests as they are, with a fake host, in virtual time."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from repository import asks
from repository.asks import AskLine
from repository.config import Batching, ModelConfig
from repository.errors import (
    InferenceFailedError,
    InvalidRequestError,
    ModelNotReadyError,
    QueueFullError,
    RequestTimeoutError,
    WorkerDiedError,
)
from repository.hosts.calls import circular
from repository.messages import InferRequest, InferResponse, Loaded
from repository.responding import Responses
from repository.tensors import Tensor
from tests.batches import ask, rows_of
from tests.fakes.host import FakeHost

pytestmark = pytest.mark.looptime


def line(host: FakeHost, most: int = 8, *, config: Any = None, **batching: Any) -> AskLine:
    return AskLine(
        host,
        Loaded(max_batch_size=most, abilities=("ask", "decoupled")),
        config or ModelConfig(batching=Batching(**batching)),
        max_queue=100,
        clock=asyncio.get_running_loop().time,
    )


def counted(request: InferRequest) -> Iterable[InferResponse]:
    """As many answers as the first value of x says; below zero it breaks after as many."""
    n = int(request.inputs[0].array().reshape(-1)[0])
    for i in range(abs(n)):
        yield InferResponse([Tensor.of("y", np.array([[i]], "f4"))])
    if n < 0:
        raise InvalidRequestError("less than nothing")


async def every(responses: Responses) -> list[float]:
    return [rows_of(response)[0] async for response in responses]


def firsts(host: FakeHost) -> list[list[float]]:
    """The first value of each request of each group."""
    return [[float(r.inputs[0].array()[0, 0]) for r in group] for group in host.groups]


async def test_what_came_together_goes_together_and_untouched() -> None:
    host = FakeHost(infer_s=1.0)
    queue = line(host)
    requests = [ask(n) for n in range(3)]
    answers = await asyncio.gather(*[queue.submit(request) for request in requests])
    assert [rows_of(a) for a in answers] == [[0], [1], [2]]
    await asyncio.sleep(0.1)
    assert [id(r) for r in host.groups[0]] == [id(r) for r in requests]
    assert all(a.batch_size == 3 and a.compute_s == 1.0 for a in answers)
    assert (queue.executions, queue.samples, queue.in_flight) == (1, 3, 0)
    assert queue.batches == {3: [1, 1.0]}


async def test_a_group_never_has_more_rows_than_the_model_takes_nor_other_shapes() -> None:
    host = FakeHost()
    queue = line(host, 4)
    requests = [ask(1, 1), ask(2, 2), ask(3), ask(4, width=2), ask(5, width=2, temperature=1)]
    await asyncio.gather(*[queue.submit(request) for request in requests])
    assert firsts(host) == [[1, 2], [3], [4, 5]]


async def test_shapes_that_the_config_lets_differ_go_together() -> None:
    host = FakeHost()
    ragged = ModelConfig(
        batching=Batching(), triton={"input": [{"name": "x", "allow_ragged_batch": True}]}
    )
    queue = line(host, config=ragged)
    await asyncio.gather(*[queue.submit(request) for request in (ask(1), ask(2, width=3))])
    assert firsts(host) == [[1, 2]]


async def test_the_next_group_goes_when_the_model_has_returned_not_when_all_have_ended(
    looptime: Any,
) -> None:
    host = FakeHost(answers=counted, token_s=10.0, returns_s=1.0)
    queue = line(host, 0)
    both = [queue.open(ask(3)) for _ in range(2)]
    await asyncio.sleep(0.5)
    assert (queue.in_flight, queue.queue_length, len(host.groups)) == (1, 1, 1)
    await asyncio.sleep(1)
    assert (queue.in_flight, queue.queue_length, len(host.groups)) == (2, 0, 2)
    assert await asyncio.gather(*map(every, both)) == [[0, 1, 2]] * 2
    await asyncio.sleep(20)
    assert queue.in_flight == 0
    assert queue.batches[1][0] == 2


async def test_each_request_fails_on_its_own() -> None:
    queue = line(FakeHost(answers=counted))
    good, bad = queue.open(ask(2)), queue.open(ask(-1))
    assert await every(good) == [0, 1]
    assert rows_of(await anext(bad)) == [0]
    with pytest.raises(InvalidRequestError, match="less than nothing"):
        await anext(bad)


async def test_who_leaves_while_it_waits_never_reaches_the_model() -> None:
    host = FakeHost(infer_s=1.0)
    queue = line(host, 0)
    first, gone, left, last = (
        queue.submit(ask(1)), queue.submit(ask(2)), queue.open(ask(3)), queue.submit(ask(4))
    )  # fmt: skip
    gone.cancel()
    left.close()
    assert queue.queue_length == 1
    await asyncio.gather(first, last)
    assert firsts(host) == [[1], [4]] and host.left == []


async def test_who_leaves_while_it_runs_is_told_to_the_host() -> None:
    host = FakeHost(answers=counted, token_s=1.0)
    queue = line(host, 0)
    stream, single = queue.open(ask(100)), queue.submit(ask(100))
    await anext(stream)
    stream.close()
    await asyncio.sleep(2)
    single.cancel()
    assert [r.request for r in host.left] == [stream.request, host.groups[1][0]]
    await asyncio.sleep(2)
    assert queue.in_flight == 0


async def test_one_answer_is_all_that_submit_takes() -> None:
    host = FakeHost(answers=counted)
    queue = line(host, 0)
    assert rows_of(await queue.submit(ask(1))) == [0]
    with pytest.raises(InvalidRequestError, match="several answers"):
        await queue.submit(ask(3))
    assert len(host.left) == 1
    with pytest.raises(InferenceFailedError, match="without an answer"):
        await queue.submit(ask(0))


async def test_the_queue_has_limits_and_times(looptime: Any) -> None:
    queue = line(FakeHost(infer_s=5.0), 0, max_queue=2, timeout_us=1_000_000)
    first, single, stream = queue.submit(ask(1)), queue.submit(ask(2)), queue.open(ask(3))
    with pytest.raises(QueueFullError):
        queue.open(ask(4))
    with pytest.raises(QueueFullError):
        queue.submit(ask(4))
    for late in (single, anext(stream)):
        with pytest.raises(RequestTimeoutError):
            await late
    assert looptime == pytest.approx(1, abs=0.01)
    await first


async def test_priorities_count() -> None:
    host = FakeHost(infer_s=1.0)
    queue = line(host, 0, priorities=2, default_priority=2)
    asked = [queue.submit(r) for r in (ask(1), ask(2), ask(3, priority=1))]
    await asyncio.gather(*asked)
    assert firsts(host) == [[1], [3], [2]]


async def test_answers_keep_the_order_of_the_requests_where_that_is_asked_for() -> None:
    host = FakeHost(slots=2, answers=counted, token_s=1.0)
    queue = line(host, 0, preserve_ordering=True)
    slow, quick, third = queue.open(ask(5)), queue.open(ask(1)), queue.submit(ask(1))
    heard: list[str] = []

    async def hear(name: str, responses: Responses) -> None:
        async for response in responses:
            heard.extend([name] * len(rows_of(response)))

    await asyncio.gather(hear("slow", slow), hear("quick", quick), third)
    assert heard == ["slow"] * 5 + ["quick"] and third.done()


async def test_of_who_must_wait_so_many_answers_count_as_read_and_every_one_is_told_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(asks, "MOST_AHEAD", 5)
    host = FakeHost(slots=2, answers=counted, token_s=1.0)
    queue = line(host, 0, preserve_ordering=True)
    slow, quick = queue.open(ask(10)), queue.open(ask(20))
    await asyncio.sleep(0)
    told: list[float] = []
    quick.on_read = lambda response: told.extend(rows_of(response))
    await asyncio.sleep(8.5)
    assert told == [0, 1, 2, 3, 4]
    assert await every(slow) == list(range(10))
    assert await every(quick) == list(range(20)) == told


async def test_of_large_answers_that_must_wait_few_count_as_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(asks, "MOST_AHEAD_BYTES", 8)
    queue = line(FakeHost(slots=2, answers=counted, token_s=1.0), 0, preserve_ordering=True)
    slow, quick = queue.open(ask(10)), queue.open(ask(5))
    await asyncio.sleep(0)
    told: list[float] = []
    quick.on_read = lambda response: told.extend(rows_of(response))
    await asyncio.sleep(9)
    assert told == [0, 1]
    slow.close()
    assert await every(quick) == list(range(5)) == told


async def test_who_leaves_holds_up_nobody_behind_it() -> None:
    queue = line(FakeHost(slots=2, answers=counted, token_s=1.0), 0, preserve_ordering=True)
    slow, quick = queue.open(ask(50)), queue.open(ask(1))
    await asyncio.sleep(2)
    slow.close()
    async with asyncio.timeout(1):
        assert await every(quick) == [0]


async def test_nothing_is_sent_ahead_where_several_instances_may_call_each_other() -> None:
    host = FakeHost(infer_s=0.0001, slots=2)
    queue = line(host, 0)
    for _ in range(30):
        await queue.submit(ask(1))
    host.infer_s = 1.0
    asked = [queue.submit(ask(1)) for _ in range(6)]
    await asyncio.sleep(0.5)
    assert queue.in_flight == 2
    await asyncio.gather(*asked)


async def test_after_close_all_that_waits_fails_and_what_runs_is_answered() -> None:
    queue = line(FakeHost(infer_s=1.0), 0)
    runs, waits, stream = queue.submit(ask(1)), queue.submit(ask(2)), queue.open(ask(3))
    queue.close(ModelNotReadyError("unloading"))
    for refused in (waits, anext(stream)):
        with pytest.raises(ModelNotReadyError):
            await refused
    with pytest.raises(ModelNotReadyError):
        queue.submit(ask(4))
    assert rows_of(await runs) == [1]


async def test_a_dead_worker_ends_all_that_it_had() -> None:
    host = FakeHost(answers=counted, token_s=1.0)
    queue = line(host, 0)
    stream = queue.open(ask(100))
    await anext(stream)
    host.kill()
    with pytest.raises(WorkerDiedError):
        await every(stream)


async def test_a_host_that_refuses_fails_the_requests_and_keeps_the_line() -> None:
    host = FakeHost()
    queue = line(host, 0)
    works, host.ask = host.ask, _broken  # type: ignore[method-assign]
    with pytest.raises(InferenceFailedError, match="no host"):
        await queue.submit(ask(1))
    host.ask = works  # type: ignore[method-assign]
    assert rows_of(await queue.submit(ask(2))) == [2]


def _broken(requests: Any, at: Any = None) -> Any:
    raise RuntimeError("no host")


async def test_no_tensor_waits_for_the_garbage_collector() -> None:
    queue = line(FakeHost(), 0)
    gc.disable()
    try:
        x = np.zeros((1, 4), "f4")
        seen = weakref.ref(x)
        request = InferRequest([Tensor("x", "FP32", (1, 4), x.reshape(-1).view("u1").data)])
        answer = await queue.submit(request)
        queue._host.groups.clear()  # type: ignore[attr-defined]
        del request, answer, x
        await asyncio.sleep(1)
        assert seen() is None
    finally:
        gc.enable()


async def test_who_hands_answers_on_waits_until_they_are_read() -> None:
    answers = Responses(ask(1))
    for n in range(3):
        answers.tell(InferResponse([Tensor.of("y", np.array([[n]], "f4"))]))
    waits = asyncio.ensure_future(answers.until_read(2))
    await anext(answers)
    await asyncio.sleep(0)
    assert not waits.done()
    await anext(answers)
    await waits
    closed = asyncio.ensure_future(answers.until_read(1))
    await asyncio.sleep(0)
    answers.close()
    await closed


# who may call whom --------------------------------------------------------------------------------


def host_of(slots: int) -> Any:
    return SimpleNamespace(slots=slots, blocked={})


async def test_the_call_that_would_close_a_circle_is_known() -> None:
    a, b = host_of(1), host_of(2)
    assert circular(a, "a1", a)
    assert not circular(a, "a1", b)
    a.blocked["a1"] = [b]
    assert not circular(b, "b1", a)  # the other instance of b will answer
    b.blocked["b1"] = [a]
    assert circular(b, "b2", a)
    assert circular(b, "b2", b)
    b.blocked["b1"] = [None]  # waits for somebody who waits for none of these
    assert not circular(b, "b2", a)
    assert not circular(b, "b2", SimpleNamespace(slots=1))
    ensemble = SimpleNamespace(slots=1, blocked={"its steps": [host_of(2), b]})
    b.blocked["b1"] = [ensemble]
    assert circular(b, "b2", ensemble)
    assert not circular(host_of(1), "c1", ensemble)
