"""Taking a request in and waiting for its answer, step by step and in virtual time."""

import asyncio
import gc
import weakref

import pytest

from repository.errors import WorkerDiedError
from repository.messages import InferResponse
from server.errors import PayloadTooLargeError
from server.faces.v2_infer import infer
from server.intake import ClientGoneError, read_body, read_headers
from server.patience import answer_of
from tests.integration.v2 import Stage

pytestmark = pytest.mark.looptime

ANSWER = InferResponse([])


class Line:
    """A client's side of a connection: it says nothing until it `leaves`."""

    def __init__(self):
        self.listened = 0
        self.gone = asyncio.Event()

    async def receive(self):
        self.listened += 1
        await self.gone.wait()
        return {"type": "http.disconnect"}

    def leaves_after(self, seconds):
        asyncio.get_running_loop().call_later(seconds, self.gone.set)


def answered_after(seconds, outcome=ANSWER):
    loop = asyncio.get_running_loop()
    future = loop.create_future()
    loop.call_later(seconds, lambda: future.done() or future.set_result(outcome))
    return future


async def settled():
    """Lets a second pass, and sees that nothing was left running."""
    await asyncio.sleep(1)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_an_answer_that_is_there_is_taken(looptime):
    future = asyncio.get_running_loop().create_future()
    future.set_result(ANSWER)
    assert await answer_of(future, Line().receive) is ANSWER
    assert looptime == 0


async def test_a_quick_answer_is_not_worth_watching_the_client():
    line = Line()
    assert await answer_of(answered_after(0.01), line.receive) is ANSWER
    await settled()
    assert line.listened == 0


async def test_a_slow_answer_leaves_no_watch_behind():
    line = Line()
    assert await answer_of(answered_after(5), line.receive) is ANSWER
    assert line.listened == 1
    await settled()


async def test_nobody_waits_for_a_client_that_has_left(looptime):
    line, future = Line(), answered_after(60)
    line.leaves_after(3)
    with pytest.raises(ClientGoneError):
        await answer_of(future, line.receive)
    assert looptime == 3 and future.cancelled()
    await settled()


async def test_a_connection_that_breaks_is_a_client_that_has_left():
    async def broken():
        raise OSError("reset")

    with pytest.raises(ClientGoneError):
        await answer_of(answered_after(60), broken)


async def test_work_that_was_given_up_elsewhere_may_be_asked_for_again():
    future = answered_after(60)
    asyncio.get_running_loop().call_later(1, future.cancel)
    with pytest.raises(WorkerDiedError):
        await answer_of(future, Line().receive)


async def test_cancelling_the_wait_cancels_the_work():
    future = answered_after(60)
    task = asyncio.create_task(answer_of(future, Line().receive))
    await asyncio.sleep(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert future.cancelled()
    await settled()


def said(*parts, more=False):
    messages = [{"type": "http.request", "body": p, "more_body": True} for p in parts]
    messages[-1]["more_body"] = more
    found = iter([*messages, {"type": "http.disconnect"}])

    async def receive():
        return next(found)

    return receive


async def test_a_body_is_what_came_in_its_pieces():
    assert await read_body(said(b"ab", b"", b"c"), 3) == b"abc"
    assert await read_body(said(b""), -1) == b""


@pytest.mark.parametrize("receive", [said(b"ab"), said(b"ab", more=True)])
async def test_a_body_that_ends_before_its_length_is_a_client_that_has_left(receive):
    with pytest.raises(ClientGoneError):
        await read_body(receive, 3)


async def test_reading_stops_at_the_piece_that_passes_a_limit():
    with pytest.raises(PayloadTooLargeError, match="of 4 bytes"):
        await read_body(said(b"ab", b"cd", b"never read"), -1, max_body=3)


@pytest.mark.parametrize("value", [b"-1", b"1e3", b"", b"9" * 30])
async def test_a_length_that_is_no_number_is_refused(value):
    with pytest.raises(Exception, match="Content-Length"):
        read_headers([(b"content-length", value)])


async def test_an_answer_that_breaks_half_way_is_not_followed_by_another(caplog):
    stage = Stage()
    sent = []

    async def send(message):
        sent.append(message["type"])
        if message["type"] == "http.response.body":
            raise RuntimeError("broken pipe of another sort")

    content = b'{"inputs":[{"name":"x","shape":[1,2],"datatype":"FP32","data":[1,2]}]}'
    scope = {"type": "http", "method": "POST", "path": "/v2/models/m/infer", "headers": []}
    await infer(scope, said(content), send, door=stage.door)
    assert sent == ["http.response.start", "http.response.body"]
    assert stage.leases == 0 and stage.meter.outcomes == ["backend_error"]
    assert "unexpected error" in caplog.text


class Large:
    """One whose end can be seen."""


@pytest.mark.parametrize("seconds", [0.01, 10])
async def test_what_was_answered_is_free_at_once_without_the_garbage_collector(seconds):
    ended = []
    gc.disable()
    try:
        answer = Large()
        weakref.finalize(answer, ended.append, True)
        waiting = asyncio.create_task(answer_of(answered_after(seconds, answer), Line().receive))
        del answer
        await waiting
        del waiting
        await settled()
        assert ended
    finally:
        gc.enable()
