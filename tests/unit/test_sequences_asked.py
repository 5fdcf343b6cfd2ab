"""Sequences of models that take requests as they are: each answers for itself, any number of times."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from repository.asks import AskLine
from repository.config import ModelConfig, Sequences, State
from repository.errors import InferenceFailedError
from repository.messages import InferRequest, InferResponse, Loaded
from repository.sequences.following import AHEAD
from repository.sequences.line import SequenceLine
from repository.sequences.oldest import instances_of
from repository.sequences.strategy import strategy_of, within
from repository.sequences.wiring import zeros
from repository.tensors import Tensor
from tests.fakes.host import FakeHost
from tests.sequences import CONTROLS, column, say

pytestmark = [pytest.mark.asyncio, pytest.mark.looptime]
BOTH = pytest.mark.parametrize("strategy", ["direct", "oldest"])


def echo(request: InferRequest) -> Iterator[InferResponse]:
    """As often as x says."""
    (x,) = column(request, "x")
    if x < 0:
        raise InferenceFailedError("unlucky")
    for _ in range(int(x)):
        yield InferResponse([Tensor("y", "FP32", (1, 1), request.inputs[0].data)])


def asked_line(host: FakeHost, **rules: Any) -> SequenceLine:
    config = ModelConfig(sequences=Sequences(controls=CONTROLS, **rules))
    loaded = Loaded(max_batch_size=4, abilities=("ask", "decoupled"))
    clock = asyncio.get_running_loop().time

    def strategy(line: SequenceLine) -> Any:
        fronts = [
            AskLine(one, loaded, within(config), max_queue=0, clock=clock)
            for one in instances_of(host)
        ]
        return strategy_of(line, host, config, loaded, fronts, clock)

    initial = {s.input: zeros(s.input, s.datatype, (1, 1)) for s in rules.get("states", ())}
    return SequenceLine(
        host, "m", config, loaded, strategy, max_queue=100, clock=clock, initial=initial
    )


def host_of() -> FakeHost:
    return FakeHost(infer_s=0.1, token_s=0.1, answers=echo)


@BOTH
async def test_requests_go_together_as_they_are_with_all_that_they_say(strategy: str):
    host = host_of()
    line = asked_line(host, strategy=strategy)
    await asyncio.gather(*[line.submit(say(1, n, start=True, mine="yes")) for n in (5, 6)])
    (group,) = host.groups
    assert [r.parameters["sequence_id"] for r in group] == [5, 6]
    assert [r.parameters["mine"] for r in group] == ["yes", "yes"]
    assert [column(r, "START") for r in group] == [[1], [1]]
    assert [column(r, "CORRID") for r in group] == [[5], [6]]


@BOTH
async def test_the_next_of_a_sequence_waits_for_the_last_answer_of_the_one_before(
    strategy: str, looptime
):
    host = host_of()
    line = asked_line(host, strategy=strategy)
    first, second = line.open(say(3, 5, start=True)), line.open(say(1, 5, end=True))
    assert len([answer async for answer in first]) == 3
    assert looptime == pytest.approx(0.4, abs=0.11) and len(host.groups) <= 2
    assert len([answer async for answer in second]) == 1
    assert [len(group) for group in host.groups] == [1, 1]
    await asyncio.sleep(0.2)
    assert not line.open_sequences and (line.queue_length, line.in_flight) == (0, 0)


@BOTH
async def test_one_that_fails_harms_no_other_and_ends_no_sequence(strategy: str):
    line = asked_line(host_of(), strategy=strategy)
    bad, good = line.submit(say(-1, 5, start=True)), line.submit(say(1, 6, start=True))
    with pytest.raises(InferenceFailedError, match="unlucky"):
        await bad
    await good
    await line.submit(say(1, 5))


@BOTH
async def test_one_that_gives_no_answer_is_told_so_where_one_is_wanted(strategy: str):
    line = asked_line(host_of(), strategy=strategy)
    with pytest.raises(InferenceFailedError, match="without an answer"):
        await line.submit(say(0, 5, start=True))
    assert [answer async for answer in line.open(say(0, 5))] == []


@BOTH
async def test_the_model_hears_of_a_client_that_leaves_and_the_sequence_goes_on(strategy: str):
    host = host_of()
    line = asked_line(host, strategy=strategy)
    answers = line.open(say(9, 5, start=True))
    await anext(answers)
    answers.close()
    assert len([answer async for answer in line.open(say(1, 5, end=True))]) == 1
    assert [column(left.request, "x") for left in host.left] == [[9]]
    assert not line.open_sequences


@BOTH
async def test_a_model_whose_state_is_wrong_is_not_listened_to_any_more(strategy: str):
    host = host_of()
    state = State(input="before", output="y", datatype="INT32", shape=(1,))
    line = asked_line(host, strategy=strategy, states=(state,))
    with pytest.raises(InferenceFailedError, match="said its state 'y' as FP32"):
        await line.submit(say(9, 5, start=True))
    await asyncio.sleep(0)
    assert [column(left.request, "x") for left in host.left] == [[9]]


@BOTH
async def test_a_model_is_not_far_ahead_of_its_reader(strategy: str):
    line = asked_line(host_of(), strategy=strategy)
    answers = line.open(say(50, 5, start=True))
    await asyncio.sleep(20)
    assert answers.waiting == AHEAD
    assert len([answer async for answer in answers]) == 50
