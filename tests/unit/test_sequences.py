"""The rules that both strategies keep: order, START and END, silence, limits, what is told to whom."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from repository.config import Batching, Control, State
from repository.errors import (
    InferenceFailedError,
    InvalidRequestError,
    ModelNotReadyError,
    QueueFullError,
    RequestTimeoutError,
    WorkerDiedError,
)
from repository.lifecycle.generation import Lease
from repository.messages import InferRequest, InferResponse
from tests.fakes.host import FakeHost
from tests.sequences import adding, column, columns, line_of, say, value_of

pytestmark = [pytest.mark.asyncio, pytest.mark.looptime]
BOTH = pytest.mark.parametrize("strategy", ["direct", "oldest"])


def host_of(**knobs: Any) -> FakeHost:
    return FakeHost(**{"infer_s": 0.1, "result": adding, **knobs})


async def values(*futures: asyncio.Future[InferResponse]) -> list[float]:
    return [value_of(response) for response in await asyncio.gather(*futures)]


async def refused(line: Any, request: InferRequest) -> str:
    with pytest.raises(InvalidRequestError) as raised:
        await line.submit(request)
    return str(raised.value)


@BOTH
@pytest.mark.parametrize("flat", [False, True])
async def test_each_sequence_has_a_memory_of_its_own(strategy: str, flat: bool):
    line = line_of(host_of(), 0 if flat else 4, strategy=strategy)
    said = [
        say(1, 5, start=True, flat=flat), say(10, 6, start=True, flat=flat),
        say(2, 5, flat=flat), say(20, 6, flat=flat),
        say(3, 5, end=True, flat=flat), say(30, 6, end=True, flat=flat),
    ]  # fmt: skip
    assert await values(*map(line.submit, said)) == [1, 10, 3, 30, 6, 60]
    assert not line.open_sequences


@BOTH
async def test_requests_of_one_sequence_run_one_at_a_time_in_order(strategy: str):
    host = host_of(slots=2)
    line = line_of(host, strategy=strategy)
    said = [say(n, 7, start=n == 0, end=n == 4) for n in range(5)]
    assert await values(*map(line.submit, said)) == [0, 1, 3, 6, 10]
    assert columns(host, "x") == [[n] for n in range(5)]
    assert len(set(host.ats)) == 1, "a sequence stays where it is"


@BOTH
async def test_a_request_without_start_is_told_that_its_sequence_is_not_open(strategy: str):
    line = line_of(host_of(), strategy=strategy)
    assert (await refused(line, say(1, 5))).startswith(
        "inference request for sequence 5 to model 'm' must specify the START flag on the first "
        "request of the sequence"
    )
    await values(line.submit(say(1, 5, start=True, end=True)))
    assert "must specify the START flag" in await refused(line, say(1, 5))
    line.submit(say(1, 5, start=True))
    line.submit(say(1, 5, end=True))
    assert "must specify the START flag" in await refused(line, say(1, 5))


@pytest.mark.parametrize("nobody", [{}, {"sequence_id": 0}, {"sequence_id": ""}])
async def test_a_request_must_name_its_sequence(nobody: dict[str, Any]):
    line = line_of(host_of())
    request = say(1, 1)
    request.parameters = {"sequence_start": True, **nobody}
    assert (await refused(line, request)).startswith(
        "inference request to model 'm' must specify a non-zero or non-empty correlation ID"
    )


@pytest.mark.parametrize("wrong", [-1, 2**64, True, 1.5, [], None, "x" * 129])
async def test_what_cannot_be_an_id_is_refused(wrong: Any):
    assert "sequence_id" in await refused(line_of(host_of()), say(1, wrong, start=True))


@pytest.mark.parametrize("flag", ["sequence_start", "sequence_end"])
async def test_a_flag_is_true_or_false(flag: str):
    request = say(1, 5, start=True)
    request.parameters = {**request.parameters, flag: "yes"}
    assert (
        await refused(line_of(host_of()), request)
        == f"{flag} of a request to model 'm' must be true or false"
    )


async def test_a_text_is_no_id_where_the_model_wants_a_number():
    line = line_of(host_of())
    assert "is a text; model 'm' takes a number (UINT64" in await refused(
        line, say(1, "a", start=True)
    )


async def test_an_id_must_fit_the_models_control():
    controls = (Control(name="CORRID", kind="corrid", datatype="INT32"),)
    line = line_of(host_of(), controls=controls)
    assert "does not fit INT32" in await refused(line, say(1, 2**31, start=True))


async def test_texts_reach_a_model_that_takes_them_and_numbers_do_too():
    controls = (Control(name="CORRID", kind="corrid", datatype="BYTES"),)
    host = host_of(result=lambda r: InferResponse([r.inputs[0]]))
    line = line_of(host, controls=controls, states=())
    await asyncio.gather(line.submit(say(1, "né", start=True)), line.submit(say(1, 42, start=True)))
    assert columns(host, "CORRID") == [["né".encode(), b"42"]]


async def test_a_request_is_one_row():
    request = say(1, 5, start=True)
    request.inputs[0].shape, request.inputs[0].data = (2, 1), bytes(8)
    assert "must specify batch-size 1" in await refused(line_of(host_of()), request)


@BOTH
async def test_a_start_of_an_open_sequence_begins_it_anew(strategy: str):
    line = line_of(host_of(), strategy=strategy)
    said = [say(1, 5, start=True), say(2, 5), say(7, 5, start=True), say(1, 5, end=True)]
    assert await values(*map(line.submit, said)) == [1, 3, 7, 8]


@BOTH
async def test_a_start_behind_an_end_waits_for_a_place_like_any_other(strategy: str):
    line = line_of(host_of(), 1, strategy=strategy, max_candidates=1)
    done: list[str] = []
    for name, request in [
        ("first", say(1, 5, start=True)), ("end", say(1, 5, end=True)), ("again", say(9, 5, start=True)),
        ("other", say(3, 6, start=True, end=True)),
    ]:  # fmt: skip
        line.submit(request).add_done_callback(lambda _, name=name: done.append(name))
    await asyncio.sleep(1)
    assert done == ["first", "end", "other", "again"]


@BOTH
async def test_a_silent_sequence_is_over_and_its_place_is_free(strategy: str, looptime):
    line = line_of(host_of(), 1, strategy=strategy, max_candidates=1, idle_us=2_000_000)
    await values(line.submit(say(1, 5, start=True)))
    other = line.submit(say(3, 6, start=True))
    assert await values(other) == [3]
    assert looptime == pytest.approx(0.1 + 2 + 0.1, abs=0.01)
    assert "silent for more than 2 s" in await refused(line, say(1, 5))
    assert list(line.open_sequences) == [6]


@BOTH
async def test_no_sequence_is_over_while_a_request_of_it_runs_or_waits(strategy: str, looptime):
    line = line_of(host_of(infer_s=5), strategy=strategy, idle_us=1_000_000)
    said = [line.submit(say(n, 5, start=n == 0)) for n in range(3)]
    assert await values(*said) == [0, 1, 3]
    await asyncio.sleep(0.9)
    assert await values(line.submit(say(4, 5))) == [7]
    await asyncio.sleep(1.1)
    assert not line.open_sequences


@BOTH
async def test_sequences_without_a_place_come_first_come_first_served(strategy: str):
    host = host_of()
    line = line_of(host, 1, strategy=strategy, max_candidates=1)
    said = [line.submit(say(n, n, start=True, end=True)) for n in range(1, 6)]
    assert line.queue_length + line.in_flight == 5
    await values(*said)
    assert columns(host, "x") == [[n] for n in range(1, 6)]


@BOTH
async def test_no_more_may_wait_than_the_queue_holds(strategy: str):
    line = line_of(host_of(), strategy=strategy, batching=Batching(max_queue=3))
    said = [line.submit(say(n, 5, start=n == 0)) for n in range(3)]
    with pytest.raises(QueueFullError, match="Exceeds maximum queue size") as raised:
        line.submit(say(4, 6, start=True))
    assert raised.value.retry_after_s and 6 not in line.open_sequences
    await values(*said)


@BOTH
async def test_who_has_waited_too_long_is_refused_and_the_sequence_goes_on(strategy: str, looptime):
    line = line_of(host_of(infer_s=1), strategy=strategy)
    first, late = line.submit(say(1, 5, start=True)), line.submit(say(2, 5, timeout=500_000))
    third = line.submit(say(4, 5))
    with pytest.raises(RequestTimeoutError):
        await late
    assert looptime == pytest.approx(0.5, abs=0.01)
    assert await values(first, third) == [1, 5]


@BOTH
async def test_what_came_behind_a_start_that_was_too_late_is_refused(strategy: str):
    line = line_of(host_of(infer_s=1), 1, strategy=strategy, max_candidates=1)
    line.submit(say(1, 5, start=True, end=True))
    late = line.submit(say(2, 6, start=True, timeout=500_000))
    behind = line.submit(say(3, 6))
    again = line.submit(say(7, 6, start=True))
    with pytest.raises(RequestTimeoutError):
        await late
    with pytest.raises(InvalidRequestError, match="must specify the START flag"):
        await behind
    assert await values(again) == [7]


@BOTH
async def test_a_client_that_leaves_while_it_waits_is_left_out(strategy: str):
    host = host_of()
    line = line_of(host, strategy=strategy)
    said = [line.submit(say(n, 5, start=n == 0)) for n in range(4)]
    said[2].cancel()
    assert await values(said[0], said[1], said[3]) == [0, 1, 4]
    assert columns(host, "x") == [[0], [1], [3]]


@BOTH
async def test_a_client_that_leaves_while_it_runs_has_been_heard(strategy: str):
    line = line_of(host_of(), strategy=strategy)
    said = [line.submit(say(n + 1, 5, start=n == 0)) for n in range(3)]
    await asyncio.sleep(0.15)
    said[1].cancel()
    assert await values(said[0], said[2]) == [1, 6]


@BOTH
async def test_a_sequence_ends_also_if_the_client_of_its_end_has_left(strategy: str):
    line = line_of(host_of(), strategy=strategy)
    first, last = line.submit(say(1, 5, start=True)), line.submit(say(2, 5, end=True))
    last.cancel()
    assert await values(first) == [1]
    await asyncio.sleep(0)
    assert not line.open_sequences


@BOTH
async def test_a_request_that_fails_changes_nothing(strategy: str):
    def picky(request: InferRequest) -> InferResponse:
        if 13 in column(request, "x"):
            raise InferenceFailedError("unlucky")
        return adding(request)

    line = line_of(host_of(result=picky), strategy=strategy)
    said = [line.submit(say(n, 5, start=n == 1)) for n in (1, 13, 2)]
    assert await values(said[0], said[2]) == [1, 3]
    with pytest.raises(InferenceFailedError, match="unlucky"):
        await said[1]


@BOTH
async def test_when_its_worker_dies_a_sequence_is_over(strategy: str):
    host = host_of()
    line = line_of(host, strategy=strategy)
    said = [line.submit(say(n, 5, start=n == 1)) for n in (1, 2, 3)]
    await asyncio.sleep(0.15)
    host.kill()
    with pytest.raises(WorkerDiedError):
        await said[1]
    with pytest.raises(InvalidRequestError, match="the model that had begun it is gone"):
        await said[2]
    assert not line.open_sequences


@BOTH
async def test_a_state_that_is_not_what_the_config_says_is_the_models_fault(strategy: str):
    state = State(input="SUM_IN", output="SUM_OUT", datatype="INT64", shape=(1,))
    line = line_of(host_of(), strategy=strategy, states=(state,))
    with pytest.raises(InferenceFailedError, match="its config has INT64"):
        await line.submit(say(1, 5, start=True))


@BOTH
async def test_closed_it_refuses_everybody_and_keeps_nothing(strategy: str):
    line = line_of(host_of(), strategy=strategy)
    said = [line.submit(say(n, 5, start=n == 0)) for n in range(3)]
    await asyncio.sleep(0.05)
    line.close(ModelNotReadyError("m is unloading"))
    assert await values(said[0]) == [0]
    for future in said[1:]:
        with pytest.raises(ModelNotReadyError):
            await future
    with pytest.raises(ModelNotReadyError):
        line.submit(say(1, 6, start=True))
    assert (line.queue_length, line.in_flight, dict(line.open_sequences)) == (0, 0, {})


@BOTH
async def test_an_answer_says_how_long_it_waited_and_what_was_run_is_counted(strategy: str):
    line = line_of(host_of(), strategy=strategy)
    said = [line.submit(say(n, 5, start=n == 0)) for n in range(3)]
    answers = await asyncio.gather(*said)
    assert [a.queue_s for a in answers] == pytest.approx([0, 0.1, 0.2], abs=0.01)
    assert [a.batch_size for a in answers] == [1, 1, 1]
    assert (line.executions, line.samples) == (3, 3)
    assert line.batches == {1: [3, pytest.approx(0.3)]}


@BOTH
async def test_an_open_request_has_its_one_answer(strategy: str):
    line = line_of(host_of(), strategy=strategy)
    answers = line.open(say(1, 5, start=True))
    assert [value_of(answer) async for answer in answers] == [1]
    left = line.open(say(2, 5))
    await asyncio.sleep(0.05)
    left.close()
    assert await values(line.submit(say(4, 5))) == [7]


async def test_a_model_that_asks_to_be_called_again_needs_no_ids():
    host = host_of()
    line = line_of(host, iterative=True)
    request = InferRequest(say(1, 1).inputs)
    assert await values(line.submit(request), line.submit(request)) == [1, 1]
    assert not line.open_sequences and columns(host, "START") == [[1, 1]]


@BOTH
async def test_only_the_outputs_that_were_asked_for_come_back(strategy: str):
    host = host_of()
    line = line_of(host, strategy=strategy)
    first, second = say(1, 5, start=True), say(2, 5)
    first.outputs = second.outputs = ("y",)
    assert await values(line.submit(first), line.submit(second)) == [1, 3]
    assert host.batches[0].outputs == ("y", "SUM_OUT")
    assert not {"sequence_id", "sequence_start"} & set(host.batches[0].parameters)


@BOTH
async def test_let_go_it_keeps_only_sequences_that_have_something_to_do(strategy: str):
    line = line_of(host_of(), strategy=strategy, idle_us=10**9)
    await values(line.submit(say(1, 5, start=True)))
    said = [line.submit(say(n, 6, start=n == 0)) for n in range(3)]
    line.let_go()
    assert list(line.open_sequences) == [6]
    assert await values(*said) == [0, 1, 3]
    assert not line.open_sequences


async def test_a_sequence_that_the_model_cannot_be_kept_for_does_not_begin():
    def gone() -> Lease:
        raise ModelNotReadyError("m is unloading")

    line = line_of(host_of(), hold=gone)
    with pytest.raises(ModelNotReadyError):
        line.submit(say(1, 5, start=True))
    assert line.queue_length == 0 and not line.open_sequences
