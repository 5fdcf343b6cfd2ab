"""What a model asks of the server, over a real socket."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest

from repository.backends.abilities import Asked
from repository.errors import (
    InvalidRequestError,
    ModelNotFoundError,
    QueueFullError,
    RequestCancelledError,
    WorkerDiedError,
)
from repository.hosts import frames
from repository.hosts.frames import Kind
from repository.messages import InferRequest, InferResponse
from repository.responding import Responses
from repository.tensors import Tensor
from tests.talking import Ends, echo, every, talking, tensor

LARGE = 200_000  # floats: they travel through the arena


def caller_of(ends: list[Ends], model: str = "other") -> Callable[[Sequence[Asked]], None]:
    """Answers with what `model` says, answer by answer."""

    def act(asked: Sequence[Asked]) -> None:
        for request, reply in asked:
            for response in ends[0].talk.others.call(model, None, request):
                reply.send(response)
            reply.end()

    return act


def many(count: int, into: list[Responses]) -> Callable[[InferRequest], Responses]:
    def answer(request: InferRequest) -> Responses:
        responses = Responses(request)
        into.append(responses)
        for n in range(count):
            responses.tell(InferResponse([Tensor.of("y", np.full(1, n, "f4"))]))
        responses.end()
        return responses

    return answer


async def test_a_call_brings_all_answers_and_few_are_under_way() -> None:
    there: list[Ends] = []
    opened: list[Responses] = []
    async with talking(caller_of(there), decoupled=True) as ends:
        there.append(ends)
        ends.caller.answering["other"] = many(500, opened)
        (asked,), _ = ends.ask(tensor(1))
        assert await every(asked) == list(range(500))
        assert ends.host.blocked == {} and opened[0].over


async def test_a_call_that_is_not_read_on_is_left_and_so_is_one_that_is_dropped() -> None:
    there: list[Ends] = []
    opened: list[Responses] = []

    def act(asked: Sequence[Asked]) -> None:
        others = there[0].talk.others
        closed = others.call("other", None, asked[0].request)
        next(closed)
        closed.close()
        next(others.call("other", None, asked[0].request))
        gc.collect()
        echo(asked)

    async with talking(act) as ends:
        there.append(ends)
        ends.caller.answering["other"] = many(10_000, opened)
        await ends.one(tensor(1))
        await ends.until(lambda: not ends.channel._calls._tasks)
        assert [r.over and not r.waiting for r in opened] == [True, True]


async def test_a_call_that_is_dropped_while_nothing_else_is_said_is_left_too() -> None:
    there: list[Ends] = []
    opened: list[Responses] = []
    kept: list[Any] = []

    def act(asked: Sequence[Asked]) -> None:
        kept.append(there[0].talk.others.call("other", None, asked[0].request))
        next(kept[0])
        echo(asked)

    async with talking(act) as ends:
        there.append(ends)
        ends.caller.answering["other"] = many(10_000, opened)
        await ends.one(tensor(1))
        assert ends.channel._calls._tasks
        kept.clear()
        await ends.until(lambda: not ends.channel._calls._tasks)


async def test_an_answer_that_crosses_the_leaving_frees_itself_and_no_other() -> None:
    there: list[Ends] = []
    kept: list[Any] = []
    crossing, left = threading.Event(), threading.Event()

    def act(asked: Sequence[Asked]) -> None:
        if not kept:
            answers = there[0].talk.others.call("other", None, asked[0].request)
            kept.append(next(answers).outputs[0].array())
            crossing.wait(10)
            answers.close()
            left.set()
        echo(asked)

    async with talking(act) as ends:
        there.append(ends)
        others, calls = ends.talk.others, ends.channel._calls
        hear = others.hear

        def late(*frame: Any) -> None:
            crossing.set()
            left.wait(10)
            hear(*frame)

        answers = Responses(tensor(1))
        ends.caller.answering["other"] = lambda request: answers
        answers.tell(InferResponse([Tensor.of("y", np.full(LARGE, 1, "f4"))]))
        (asked,), _ = ends.ask(tensor(1))
        await ends.until(lambda: bool(kept))
        others.hear = late
        answers.tell(InferResponse([Tensor.of("y", np.full(LARGE, 2, "f4"))]))
        await anext(asked)
        await ends.until(lambda: not calls._tasks and not others._told)
        await ends.one(tensor(2))  # whatever is said next says what was freed
        assert [number for _, number in ends.channel._groups._kept] == [1]
        again = ends.arena.take(LARGE * 4)
        assert again is not None
        again[0][:] = bytes(LARGE * 4)
        assert kept[0].tolist() == [1.0] * LARGE
        kept.clear()
        del again


@pytest.mark.parametrize("error", [ModelNotFoundError("no such"), QueueFullError("too many")])
async def test_errors_of_a_call_keep_their_class_and_text(error: Any) -> None:
    there: list[Ends] = []

    def fails(request: InferRequest) -> Responses:
        responses = Responses(request)
        responses.end(error)
        return responses

    async with talking(caller_of(there)) as ends:
        there.append(ends)
        ends.caller.answering["other"] = fails
        with pytest.raises(type(error), match=str(error)):
            await ends.one(tensor(1))


async def test_a_call_of_nonsense_is_refused_and_nothing_else_breaks() -> None:
    there: list[Ends] = []
    async with talking(caller_of(there, 7)) as ends:  # type: ignore[arg-type]
        there.append(ends)
        with pytest.raises(InvalidRequestError, match="cannot be understood"):
            await ends.one(tensor(1))
        assert ends.lost == []


async def test_a_lost_server_ends_what_waits_for_it() -> None:
    there: list[Ends] = []
    raised: list[BaseException] = []

    def act(asked: Sequence[Asked]) -> None:
        try:
            list(there[0].talk.others.call("silent", None, asked[0].request))
        except WorkerDiedError as error:
            raised.append(error)
            raise

    async with talking(act, fatal=True) as ends:
        there.append(ends)
        ends.caller.answering["silent"] = Responses
        (asked,), _ = ends.ask(tensor(1))
        await ends.until(lambda: bool(ends.host.blocked))
        ends.channel.fail("it was killed")
        with pytest.raises(WorkerDiedError, match="it was killed"):
            await anext(asked)
    assert len(raised) == 1 and ends.host.blocked == {}


async def test_a_worker_that_answers_what_nobody_asked_is_lost() -> None:
    def act(asked: Sequence[Asked]) -> None:
        number = asked[0].reply.number  # type: ignore[attr-defined]
        asked[0].reply.end()
        there[0].talk._send(frames.pack(Kind.END, number, b""))

    there: list[Ends] = []
    async with talking(act, fatal=True) as ends:
        there.append(ends)
        ends.ask(tensor(1))
        await ends.until(lambda: bool(ends.lost))
        assert "which nobody asked" in ends.lost[0]


def dead(answer: Callable[[], Any]) -> str:
    """What a call came to that was not to be answered."""
    try:
        answer()
    except RequestCancelledError as error:
        return str(error)
    return "it was answered"


async def test_when_all_requests_of_a_group_are_cancelled_so_is_what_was_asked_for_them() -> None:
    there: list[Ends] = []
    opened: list[Responses] = []
    heard: list[str] = []

    def act(asked: Sequence[Asked]) -> None:
        call = there[0].talk.others.call("other", None, asked[0].request)
        heard.append(dead(lambda: next(call)))
        late = there[0].talk.others.call("quick", None, asked[0].request)
        heard.append(dead(lambda: list(late)))
        echo(asked)

    def silent(request: InferRequest) -> Responses:
        opened.append(Responses(request))
        return opened[-1]

    async with talking(act) as ends:
        there.append(ends)
        ends.caller.answering |= {"other": silent, "quick": many(1, [])}
        (one, two), returned = ends.ask(tensor(1), tensor(2))
        await ends.until(lambda: bool(opened))
        one.close()
        await ends.until(lambda: any(r.cancelled for r in ends.talk._open.values()))
        assert not opened[0].over and not heard
        two.close()
        async with asyncio.timeout(10):
            await returned
        assert heard == ["the request that this call was made for was cancelled", "it was answered"]
        await ends.until(lambda: opened[0].over and not ends.channel._calls._tasks)
        assert not ends.talk.others._behind and not ends.talk.others._open


async def test_a_call_from_a_thread_of_the_models_own_belongs_to_nobody() -> None:
    there: list[Ends] = []
    opened: list[Responses] = []
    found: SimpleQueue[Any] = SimpleQueue()

    def act(asked: Sequence[Asked]) -> None:
        others, request = there[0].talk.others, asked[0].request
        thread = threading.Thread(
            target=lambda: found.put(list(others.call("other", None, request)))
        )
        thread.start()
        kept.append((asked[0], thread))

    def later(request: InferRequest) -> Responses:
        opened.append(Responses(request))
        return opened[-1]

    kept: list[Any] = []
    async with talking(act) as ends:
        there.append(ends)
        ends.caller.answering["other"] = later
        (asked,), _ = ends.ask(tensor(1))
        await ends.until(lambda: bool(opened))
        asked.close()
        await ends.until(lambda: kept[0][0].reply.cancelled)
        opened[0].tell(InferResponse([]))
        opened[0].end()
        assert len(await asyncio.to_thread(found.get, timeout=10)) == 1
        kept[0][0].reply.end()
        kept[0][1].join(10)
