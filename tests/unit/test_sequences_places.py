"""Who is in which row of which batch: what differs between direct and oldest."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from repository.config import Batching, State
from repository.errors import (
    InvalidRequestError,
    InvalidTensorError,
    QueueFullError,
    RequestTimeoutError,
)
from repository.messages import InferRequest, InferResponse
from repository.tensors import Tensor
from tests.fakes.host import FakeHost
from tests.sequences import adding, column, columns, line_of, say, value_of

pytestmark = [pytest.mark.asyncio, pytest.mark.looptime]


def host_of(**knobs: object) -> FakeHost:
    return FakeHost(**{"infer_s": 0.1, "result": adding, **knobs})  # type: ignore[arg-type]


# direct -------------------------------------------------------------------------------------------


async def test_a_sequence_keeps_its_row_and_rows_between_are_not_ready():
    host = host_of()
    line = line_of(host)
    await asyncio.gather(*[line.submit(say(n, n, start=True)) for n in (1, 2, 3)])
    await asyncio.gather(line.submit(say(10, 1)), line.submit(say(30, 3)))
    assert columns(host, "x") == [[1, 2, 3], [10, 0, 30]]
    assert columns(host, "READY") == [[True] * 3, [True, False, True]]
    assert columns(host, "CORRID") == [[1, 2, 3], [1, 0, 3]]
    assert columns(host, "START") == [[1, 1, 1], [0, 0, 0]]
    assert columns(host, "SUM_IN") == [[0, 0, 0], [1, 0, 3]]


async def test_rows_behind_the_last_that_says_something_are_left_out():
    host = host_of()
    line = line_of(host)
    await asyncio.gather(*[line.submit(say(n, n, start=True)) for n in (1, 2, 3)])
    await line.submit(say(10, 1, end=True))
    assert columns(host, "x")[1] == [10] and columns(host, "END")[1] == [1]


async def test_a_row_is_taken_again_when_its_sequence_has_ended():
    host = host_of()
    line = line_of(host)
    await asyncio.gather(*[line.submit(say(n, n, start=True)) for n in (1, 2, 3)])
    await line.submit(say(10, 2, end=True))
    assert value_of(await line.submit(say(5, 9, start=True))) == 5
    assert columns(host, "CORRID")[2] == [0, 9]


async def test_a_start_behind_an_end_that_was_left_opens_its_sequence():
    line = line_of(host_of())
    await line.submit(say(1, 5, start=True))
    end, start = line.submit(say(2, 5, end=True)), line.submit(say(3, 5, start=True))
    end.cancel()
    assert value_of(await start) == 3
    assert value_of(await line.submit(say(4, 5))) == 7


async def test_places_are_given_evenly_to_the_instances_and_each_runs_by_itself(looptime):
    host = host_of(slots=2)
    line = line_of(host, 2)
    await asyncio.gather(*[line.submit(say(n, n, start=True)) for n in (1, 2, 3, 4)])
    assert looptime == pytest.approx(0.1, abs=0.01)
    assert sorted(zip(host.ats, columns(host, "CORRID"), strict=True)) == [(0, [1, 3]), (1, [2, 4])]


async def test_a_batch_waits_for_company_until_enough_places_are_filled(looptime):
    host = host_of(infer_s=0)
    line = line_of(host, max_delay_us=1_000_000, min_slots_ratio=0.5)
    alone = line.submit(say(1, 1, start=True))
    await asyncio.sleep(0.6)
    assert not host.batches
    await asyncio.gather(alone, line.submit(say(2, 2, start=True)))
    assert looptime == pytest.approx(0.6, abs=0.01) and columns(host, "x") == [[1, 2]]


async def test_nobody_waits_for_company_longer_than_the_delay(looptime):
    host = host_of(infer_s=0)
    line = line_of(host, max_delay_us=1_000_000, min_slots_ratio=1.0)
    await line.submit(say(1, 1, start=True))
    assert looptime == pytest.approx(1, abs=0.01)


async def test_requests_of_other_shapes_wait_for_the_next_batch():
    host = host_of(result=lambda r: InferResponse([r.inputs[0]]))
    line = line_of(host, states=())
    wide = InferRequest(
        [Tensor.of("x", np.ones((1, 3), "f4"))],
        parameters={"sequence_id": 2, "sequence_start": True},
    )
    asked = [say(1, 1, start=True), wide, say(3, 3, start=True)]
    answers = await asyncio.gather(*map(line.submit, asked))
    assert [a.outputs[0].shape for a in answers] == [(1, 1), (1, 3), (1, 1)]
    assert columns(host, "CORRID") == [[1, 0, 3], [0, 2]]


async def test_how_long_a_request_may_wait_keeps_it_in_no_batch_of_its_own():
    host = host_of()
    line = line_of(host)
    said = [line.submit(say(n, n, start=True, timeout=n * 1_000_000)) for n in (1, 2, 3)]
    await asyncio.gather(*said)
    assert columns(host, "x") == [[1, 2, 3]]


async def test_only_the_request_that_the_model_refuses_fails():
    def picky(request: InferRequest) -> InferResponse:
        if 13 in column(request, "x"):
            raise InvalidTensorError("unlucky")
        return adding(request)

    host = host_of(result=picky)
    line = line_of(host)
    said = [line.submit(say(n, n, start=True)) for n in (1, 13, 3)]
    with pytest.raises(InvalidTensorError, match="unlucky"):
        await said[1]
    assert [value_of(await said[0]), value_of(await said[2])] == [1, 3]
    assert columns(host, "CORRID") == [[1, 13, 3], [1], [0, 13], [0, 0, 3]]
    assert value_of(await line.submit(say(2, 13))) == 2, "its sequence goes on, from the beginning"


async def test_a_text_input_has_empty_texts_in_nobodys_row():
    host = host_of(result=lambda r: InferResponse([r.inputs[0]]))
    line = line_of(host, states=())

    def text(sequence: int, **flags: bool) -> InferRequest:
        said = np.array([[f"of {sequence}"]], object)
        return InferRequest([Tensor.of("x", said)], parameters={"sequence_id": sequence, **flags})

    await asyncio.gather(*[line.submit(text(n, sequence_start=True)) for n in (1, 2)])
    answer = await line.submit(text(2))
    assert columns(host, "x") == [[b"of 1", b"of 2"], [b"", b"of 2"]]
    assert answer.outputs[0].array().tolist() == [[b"of 2"]]


async def test_a_state_may_grow():
    def growing(request: InferRequest) -> InferResponse:
        given = {tensor.name: tensor.array() for tensor in request.inputs}
        return InferResponse(
            [
                Tensor.of("y", given["KEPT"].sum(axis=1, keepdims=True)),
                Tensor.of("KEPT_OUT", np.concatenate([given["KEPT"], given["x"]], axis=1)),
            ]
        )

    state = State(input="KEPT", output="KEPT_OUT", datatype="FP32", shape=(-1,))
    host = host_of(result=growing)
    line = line_of(host, states=(state,))
    said = [line.submit(say(n, 5, start=n == 1)) for n in (1, 2, 3)]
    others = [line.submit(say(10, 6, start=True)), line.submit(say(10, 6))]
    assert [value_of(a) for a in await asyncio.gather(*said, *others)] == [0, 1, 3, 0, 10]
    assert [c[0].shape for c in ([t for t in b.inputs if t.name == "KEPT"] for b in host.batches)] == [
        (2, 1), (2, 2), (1, 3)
    ]  # fmt: skip


# oldest -------------------------------------------------------------------------------------------


async def test_a_batch_of_oldest_has_one_request_of_each_and_no_empty_row():
    host = host_of()
    line = line_of(host, strategy="oldest")
    first = [line.submit(say(n, n, start=True)) for n in (1, 2, 3)]
    second = [line.submit(say(10 * n, n)) for n in (3, 1)]
    assert [value_of(a) for a in await asyncio.gather(*first, *second)] == [1, 2, 3, 33, 11]
    assert [sorted(c) for c in columns(host, "CORRID")] == [[1, 2, 3], [1, 3]]
    assert columns(host, "READY")[1] == [True, True]


async def test_no_instance_has_more_candidates_than_it_may():
    host = host_of(slots=2)
    line = line_of(host, strategy="oldest", max_candidates=1)
    waiting = [line.submit(say(n, n, start=True)) for n in (1, 2, 3)]
    await asyncio.gather(*waiting[:2])
    assert not waiting[2].done() and line.queue_length == 1
    await line.submit(say(1, 2, end=True))
    await waiting[2]
    assert host.ats == [0, 1, 1, 1]


async def test_preferred_sizes_and_the_delay_hold(looptime):
    host = host_of(infer_s=0)
    line = line_of(host, strategy="oldest", preferred_sizes=(2,), max_delay_us=1_000_000)
    lone = line.submit(say(1, 1, start=True))
    await asyncio.sleep(0.5)
    assert not host.batches
    pair = line.submit(say(2, 2, start=True))
    await asyncio.gather(lone, pair)
    assert looptime == pytest.approx(0.5, abs=0.01)
    await line.submit(say(1, 1))
    assert looptime == pytest.approx(1.5, abs=0.01)


async def test_those_who_wait_in_a_batch_count_for_the_limit():
    line = line_of(host_of(infer_s=5), 1, strategy="oldest", batching=Batching(max_queue=2))
    said = [line.submit(say(1, 1, start=True))]
    await asyncio.sleep(0.01)
    said += [line.submit(say(n, n, start=True)) for n in (2, 3)]
    with pytest.raises(QueueFullError, match="Exceeds maximum queue size"):
        line.submit(say(4, 4, start=True))
    assert (line.queue_length, line.in_flight) == (2, 1)
    await asyncio.gather(*said)


async def test_the_time_that_is_left_goes_with_a_request_into_its_batch(looptime):
    line = line_of(host_of(infer_s=5), 1, strategy="oldest")
    said = line.submit(say(1, 1, start=True))
    late = line.submit(say(2, 2, start=True, timeout=2_000_000))
    with pytest.raises(RequestTimeoutError, match="Request timeout expired"):
        await late
    assert looptime == pytest.approx(2, abs=0.01)
    with pytest.raises(InvalidRequestError, match="must specify the START flag"):
        line.submit(say(2, 2))
    await said
