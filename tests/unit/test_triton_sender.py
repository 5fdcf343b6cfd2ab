"""The way back of one request, whatever a model does with it, in whatever order, from whatever thread:
it ends once, hears nothing afterwards, and its model is told when it goes too far."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repository.backends.triton.answer import InferenceResponse
from repository.backends.triton.errors import TritonError, TritonModelException
from repository.backends.triton.sender import FINAL, InferenceResponseSender, Mourner, Way
from repository.errors import InferenceFailedError
from repository.messages import InferResponse
from tests.fakes.asking import FakeReply

ANSWER = InferenceResponse([])
FAILURE = InferenceResponse(error=TritonError("no"))
DOINGS = {
    "answer": (ANSWER, 0), "last": (ANSWER, FINAL), "final": (None, FINAL),
    "error": (FAILURE, 0), "last error": (FAILURE, FINAL),
}  # fmt: skip


def sent(response: InferenceResponse) -> InferResponse:
    return InferResponse([])


def way_of(reply: FakeReply, mourner: Mourner, *, decoupled: bool = True) -> Way:
    return Way(reply, sent, mourner, decoupled=decoupled)


def do(sender: InferenceResponseSender, doing: str) -> bool:
    """Whether the model was told that it cannot."""
    response, flags = DOINGS[doing]
    try:
        sender.send(response, flags)
    except TritonModelException:
        return True
    return False


def expected(doings: Sequence[str], *, decoupled: bool) -> tuple[int, list[bool], str]:
    """Answers, what is refused, and how the request ends: "" without an error."""
    answers, refused, end = 0, [], ""
    failed = closed = False
    for doing in doings:
        response, flags = DOINGS[doing]
        two_many = response is ANSWER and answers == 1 and not decoupled and not failed
        refused.append(closed or two_many)
        if refused[-1]:
            continue
        if response is FAILURE and not failed:
            failed, end = True, "no"
        elif response is ANSWER and not failed:
            answers += 1
        if flags:
            closed = True
            if not failed and not answers and not decoupled:
                failed, end = True, "sent no response"
    if not closed and not failed and (decoupled or not answers):
        end = "dropped the request"
    return answers, refused, end


@given(st.lists(st.sampled_from(sorted(DOINGS)), max_size=8), st.booleans())
def test_whatever_a_model_sends_its_request_ends_once(doings: list[str], decoupled: bool) -> None:
    reply, mourner = FakeReply(), Mourner()
    sender = InferenceResponseSender(way_of(reply, mourner, decoupled=decoupled))
    refused = [do(sender, doing) for doing in doings]
    del sender
    error = reply.wait()
    mourner.stop()
    answers, told, end = expected(doings, decoupled=decoupled)
    assert refused == told and len(reply.answers) == answers
    assert (str(error) if error else "").find(end) >= 0 and bool(error) == bool(end)


def test_two_threads_that_send_are_each_heard_or_told() -> None:
    reply, mourner = FakeReply(), Mourner()
    sender = InferenceResponseSender(way_of(reply, mourner))
    together = threading.Barrier(5)
    refused: list[bool] = []

    def send(doing: str) -> None:
        together.wait()
        refused.extend(do(sender, doing) for _ in range(200))

    threads = [threading.Thread(target=send, args=("answer",)) for _ in range(4)]
    threads.append(threading.Thread(target=send, args=("final",)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reply.wait() is None
    assert len(refused) == 1000 and len(reply.answers) + refused.count(True) == 999
    mourner.stop()


def test_a_way_that_was_given_up_is_closed_and_ended_by_somebody_else() -> None:
    reply, mourner = FakeReply(), Mourner()
    way = way_of(reply, mourner)
    sender = InferenceResponseSender(way)
    way.abandon()
    assert do(sender, "answer") and do(sender, "final")
    del sender, way
    mourner.stop()
    assert not reply.over


def test_an_end_from_outside_is_the_last_word() -> None:
    reply, mourner = FakeReply(), Mourner()
    way = way_of(reply, mourner)
    way.end(InferenceFailedError("first"))
    way.end(InferenceFailedError("second"))
    with pytest.raises(TritonModelException, match="has ended"):
        way.send(ANSWER, final=False)
    assert str(reply.wait()) == "first"


class Unwilling(FakeReply):
    """Takes no answer."""

    def send(self, response: InferResponse) -> None:
        raise InferenceFailedError("the answer cannot travel")


@pytest.mark.parametrize("final", [False, True])
def test_an_answer_that_cannot_travel_is_told_to_the_model_and_the_request_ends(
    final: bool,
) -> None:
    reply, mourner = Unwilling(), Mourner()
    sender = InferenceResponseSender(way_of(reply, mourner))
    with pytest.raises(TritonModelException, match="cannot travel"):
        sender.send(ANSWER, FINAL if final else 0)
    assert not reply.over
    del sender
    assert "dropped the request" in str(reply.wait())
    mourner.stop()


class Broken(FakeReply):
    """Its other side is gone."""

    def end(self, error: BaseException | None = None) -> None:
        raise BrokenPipeError


def test_a_server_that_is_gone_does_not_end_the_mourner() -> None:
    mourner = Mourner()
    with suppress(TritonModelException):
        InferenceResponseSender(way_of(Broken(), mourner)).send(ANSWER)
    reply = FakeReply()
    InferenceResponseSender(way_of(reply, mourner))
    assert "dropped the request" in str(reply.wait())
    mourner.stop()
