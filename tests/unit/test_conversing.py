"""Requests that a model takes as they are, over a real socket: groups, answers from any thread, memory,
slow readers, sleep and stop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from repository.backends.abilities import Asked
from repository.errors import (
    InferenceFailedError,
    InvalidTensorError,
    RequestTimeoutError,
)
from repository.hosts import conversing, frames
from repository.hosts.frames import Kind
from repository.messages import InferResponse
from tests.talking import echo, every, talking, tensor

LARGE = 200_000  # floats: they travel through the arena


async def test_a_group_arrives_as_it_is_with_ids_and_parameters() -> None:
    groups: list[int] = []

    def act(asked: Sequence[Asked]) -> None:
        groups.append(len(asked))
        echo(asked)

    async with talking(act) as ends:
        first, second = tensor(1), tensor(2, LARGE)
        first.id, first.parameters = "a", {"sequence_id": 7, "timeout": 3}
        asked, returned = ends.ask(first, second)
        answers = [[r async for r in responses] for responses in asked]
        await returned
        assert groups == [2]
        assert [a.parameters for (a,) in answers] == [
            {"id": "a", "sequence_id": 7, "timeout": 3},
            {"id": ""},
        ]
        assert answers[1][0].outputs[0].array().tolist() == [2.0] * LARGE


async def test_what_the_model_raises_is_what_those_end_with_that_have_not_ended() -> None:
    def act(asked: Sequence[Asked]) -> None:
        asked[0].reply.last(InferResponse(asked[0].request.inputs))
        raise InvalidTensorError("not this one")

    async with talking(act) as ends:
        (good, bad), returned = ends.ask(tensor(1), tensor(2))
        assert await every(good) == [1]
        with pytest.raises(InvalidTensorError, match="not this one"):
            await anext(bad)
        await returned
        assert good.over and bad.over


async def test_an_answer_that_cannot_travel_is_an_error_of_its_own() -> None:
    def act(asked: Sequence[Asked]) -> None:
        for request, reply in asked:
            reply.send(InferResponse(request.inputs, {"what": object()}))
            reply.end()

    async with talking(act) as ends:
        with pytest.raises(InferenceFailedError, match="cannot travel"):
            await ends.one(tensor(1))


async def test_after_the_end_nothing_can_be_sent_and_the_end_comes_once() -> None:
    raised: list[BaseException] = []

    def act(asked: Sequence[Asked]) -> None:
        ((request, reply),) = asked
        reply.end()
        reply.end(InvalidTensorError("too late"))
        try:
            reply.send(InferResponse(request.inputs))
        except InferenceFailedError as error:
            raised.append(error)

    async with talking(act, decoupled=True) as ends:
        (asked,), returned = ends.ask(tensor(1))
        assert await every(asked) == []
        await returned
        assert len(raised) == 1


async def test_threads_that_answer_and_end_at_once_never_break_the_protocol() -> None:
    def act(asked: Sequence[Asked]) -> None:
        ((request, reply),) = asked

        def work() -> None:
            with contextlib.suppress(InferenceFailedError):
                for _ in range(20):
                    reply.send(InferResponse(request.inputs))
            reply.end()

        for _ in range(4):
            threading.Thread(target=work).start()

    async with talking(act, decoupled=True) as ends:
        for _ in range(20):
            (asked,), _ = ends.ask(tensor(1))
            assert len(await every(asked)) >= 20
        assert ends.lost == []


async def test_memory_that_a_model_still_sees_stays_its_own_and_then_comes_back() -> None:
    kept: list[Any] = []

    def act(asked: Sequence[Asked]) -> None:
        kept.extend(request.inputs[0].array() for request, _ in asked)
        for _, reply in asked:
            reply.end()

    async with talking(act, decoupled=True) as ends:
        for n in (1, 2, 3):
            _, returned = ends.ask(tensor(n, LARGE))
            await returned
        assert ends.kept == 3
        assert [float(array[-1]) for array in kept] == [1, 2, 3]
        kept.clear()
        _, returned = ends.ask(tensor(4))  # whatever is said next says it too
        await returned
        assert ends.kept == 0


async def test_a_request_that_nobody_wants_when_its_turn_comes_is_not_run() -> None:
    gate, seen = threading.Event(), list[float]()

    def act(asked: Sequence[Asked]) -> None:
        seen.extend(float(request.inputs[0].array()[0]) for request, _ in asked)
        gate.wait(10)
        echo(asked)

    async with talking(act) as ends:
        (first,), _ = ends.ask(tensor(1))
        (second, third), returned = ends.ask(tensor(2), tensor(3))
        second.close()
        await ends.until(lambda: any(r.cancelled for r in ends.talk._open.values()))
        gate.set()
        assert await every(first) == [1] and await every(third) == [3]
        await returned
        assert seen == [1, 3]


async def test_a_model_waits_for_its_reader_and_gives_up_one_who_never_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(conversing, "STALLED_S", 0.2)
    monkeypatch.setattr(conversing, "MOST_UNREAD", 50)

    def act(asked: Sequence[Asked]) -> None:
        ((request, reply),) = asked
        for _ in range(500):
            reply.send(InferResponse(request.inputs))
        reply.end()

    async with talking(act, decoupled=True) as ends:
        (reads,), _ = ends.ask(tensor(1))
        assert len(await every(reads)) == 500
        (sleeps,), returned = ends.ask(tensor(1))
        await returned
        assert sleeps.waiting == 50
        with pytest.raises(RequestTimeoutError, match="has read none of 50 answers"):
            await every(sleeps)


async def test_one_who_never_reads_is_given_up_also_while_others_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(conversing, "STALLED_S", 0.2)
    monkeypatch.setattr(conversing, "MOST_UNREAD", 50)
    threads: list[threading.Thread] = []

    def work(each: Asked) -> None:
        with contextlib.suppress(InferenceFailedError):
            while not each.reply.cancelled:
                each.reply.send(InferResponse(each.request.inputs))
        each.reply.end()

    def act(asked: Sequence[Asked]) -> None:
        threads.extend(threading.Thread(target=work, args=(each,)) for each in asked)
        for thread in threads:
            thread.start()

    async with talking(act, decoupled=True) as ends:
        (reads, sleeps), _ = ends.ask(tensor(1), tensor(2))
        async with asyncio.timeout(10):
            async for _ in reads:
                if sleeps.over:
                    break
        reads.close()
        for thread in threads:
            await asyncio.to_thread(thread.join, 10)


async def test_few_large_answers_wait_for_their_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversing, "MOST_UNREAD_BYTES", 2 << 20)
    sent: list[int] = []

    def act(asked: Sequence[Asked]) -> None:
        ((request, reply),) = asked
        for n in range(20):
            reply.send(InferResponse(request.inputs))
            sent.append(n)
        reply.end()

    async with talking(act, decoupled=True) as ends:
        (asked,), _ = ends.ask(tensor(1, (1 << 20) // 4))
        await ends.until(lambda: asked.waiting >= 2)
        await asyncio.sleep(0.1)
        assert asked.waiting == len(sent) == 2
        assert len(await every(asked)) == 20


async def test_a_cancellation_in_the_model_is_an_error_like_any() -> None:
    def act(asked: Sequence[Asked]) -> None:
        raise asyncio.CancelledError

    async with talking(act) as ends:
        with pytest.raises(InferenceFailedError, match="CancelledError"):
            await ends.one(tensor(1))


async def test_to_sleep_and_to_stop_wait_for_what_is_under_way_and_wanted() -> None:
    open_: list[Asked] = []

    async with talking(open_.extend, decoupled=True) as ends:
        (wanted, left), returned = ends.ask(tensor(1), tensor(2))
        await returned
        left.close()
        asleep = ends.channel.ask(Kind.SLEEP, None, frames.read_nothing)
        await ends.until(lambda: any(each.reply.cancelled for each in open_))
        assert not asleep.done()
        for request, reply in open_:
            reply.last(InferResponse(request.inputs))
        await asleep
        assert await every(wanted) == [1]
        (wanted, left), _ = ends.ask(tensor(3), tensor(4))
        await ends.until(lambda: len(open_) == 4)
        left.close()
        ends.channel.stop()
        await ends.until(lambda: open_[3].reply.cancelled)
        assert ends.lost == []
        open_[2].reply.last(InferResponse(open_[2].request.inputs))
        assert await every(wanted) == [3]
        await ends.until(lambda: ends.lost == [""])


async def test_answers_that_take_no_time_go_out_with_those_behind_them() -> None:
    async with talking(echo) as ends:
        asked = [ends.ask(tensor(n)) for n in range(50)]
        assert [await every(one) for (one,), _ in asked] == [[n] for n in range(50)]
        await asyncio.gather(*[returned for _, returned in asked])
        assert ends.channel.pending == 0
