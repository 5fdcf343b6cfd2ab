"""Models that take requests as they are, in real worker processes: groups, answers from threads, calls
of other models, and all the ways in which that ends."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from repository.config import Batching
from repository.errors import (
    InferenceFailedError,
    InvalidRequestError,
    LoadFailedError,
    WorkerDiedError,
)
from repository.hosts.zygotes import Zygotes
from repository.messages import InferRequest, InferResponse
from repository.responding import Responses
from repository.tensors import Tensor
from tests.asking import (
    CALLS,
    COUNTS,
    DECOUPLED,
    GROUPS,
    HANGS,
    HEAD,
    READS,
    every,
    home,
    question,
    until,
    values,
)
from tests.hosting import forking, hosted
from tests.models import python_model, spec_of

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def zygotes() -> AsyncIterator[Zygotes]:
    async with forking() as made:
        yield made


async def test_requests_that_came_together_are_given_together_and_answered_singly(
    tmp_path: Path, zygotes: Zygotes
) -> None:
    async with home(tmp_path, zygotes) as house:
        line = await house.add("m", GROUPS, max_batch_size=8, batching=Batching())
        asked = [InferRequest([Tensor.of("x", np.full((1, 2), n, "f4"))]) for n in range(3)]
        answers = await asyncio.gather(*[line.submit(request) for request in asked])
        assert [a.outputs[0].array().tolist() for a in answers] == [
            [[n + 3.0] * 2] for n in range(3)
        ]
        assert all(a.batch_size == 3 and a.compute_s > 0 for a in answers)
        assert (line.executions, line.samples, line.in_flight) == (1, 3, 0)
        assert list(line.batches) == [3]


async def test_threads_answer_after_execute_has_returned(tmp_path: Path, zygotes: Zygotes) -> None:
    async with home(tmp_path, zygotes) as house:
        line = await house.add("m", COUNTS, **DECOUPLED)
        both = [line.open(question(3, 0.01)), line.open(question(2))]
        assert await asyncio.gather(*map(every, both)) == [[[0], [1], [2]], [[0], [1]]]
        assert line.in_flight == 0 and line.executions == 2


async def test_who_leaves_is_told_to_the_model(tmp_path: Path, zygotes: Zygotes) -> None:
    async with home(tmp_path, zygotes) as house:
        line = await house.add("m", COUNTS, **DECOUPLED)
        endless = line.open(question(1e6, 0.001))
        assert values(await anext(endless)) == [0]
        endless.close()
        await until(lambda: not line.in_flight)


async def test_a_thousand_answers_reach_a_slow_reader_in_order(
    tmp_path: Path, zygotes: Zygotes
) -> None:
    async with home(tmp_path, zygotes) as house:
        line = await house.add("m", COUNTS, **DECOUPLED)
        many = line.open(question(3000))
        await anext(many)
        await until(lambda: many.waiting >= 900)
        await asyncio.sleep(0.1)
        assert many.waiting <= 1000  # the model waits for its reader
        assert await every(many) == [[n] for n in range(1, 3000)]


async def test_models_call_models_that_call_models(tmp_path: Path, zygotes: Zygotes) -> None:
    async with home(tmp_path, zygotes) as house:
        await house.add("c", GROUPS)
        await house.add("b", CALLS.replace("NEXT", "'c'"))
        line = await house.add("a", CALLS.replace("NEXT", "'b'"))
        assert values(await line.submit(question(1, 2))) == [4, 5]
        assert house.caller.calls == ["b", "c"]


async def test_large_tensors_travel_through_calls_unharmed(
    tmp_path: Path, zygotes: Zygotes
) -> None:
    async with home(tmp_path, zygotes) as house:
        await house.add("b", GROUPS)
        line = await house.add("a", CALLS.replace("NEXT", "'b'"))
        for size in (5_000_000, 150_000, 5_000_000):
            x = np.arange(size, dtype=np.float32)
            response = await line.submit(InferRequest([Tensor.of("x", x)]))
            assert np.array_equal(response.outputs[0].array(), x + 2)
            del response  # it lies in memory of a model's host


async def test_what_a_call_comes_to_is_what_the_model_hears(
    tmp_path: Path, zygotes: Zygotes
) -> None:
    async with home(tmp_path, zygotes) as house:
        line = await house.add("a", CALLS.replace("NEXT", "'nobody'"))
        with pytest.raises(InferenceFailedError, match="unknown model: 'nobody' is not found"):
            await line.submit(question(1))
        house.caller.answering["nobody"] = lambda request: _one(request)
        assert values(await line.submit(question(1))) == [2]


def _one(request: InferRequest) -> Responses:
    responses = Responses(request)
    responses.tell(InferResponse([Tensor("y", "FP32", (1,), request.inputs[0].data)]))
    responses.end()
    return responses


async def test_a_call_ends_when_the_caller_is_killed_and_the_callee_serves_on(
    tmp_path: Path, zygotes: Zygotes
) -> None:
    async with home(tmp_path, zygotes) as house:
        callee = await house.add("c", COUNTS, **DECOUPLED)
        line = await house.add("a", READS)
        answer = line.submit(question(1e6, 0.01))
        await until(lambda: house.caller.leases > 0)
        os.kill(house.pid("a"), signal.SIGKILL)
        with pytest.raises(WorkerDiedError):
            await answer
        await until(lambda: not callee.in_flight)
        assert await every(callee.open(question(1))) == [[0]]


async def test_a_call_fails_when_the_callee_is_killed_and_the_caller_serves_on(
    tmp_path: Path, zygotes: Zygotes
) -> None:
    async with home(tmp_path, zygotes) as house:
        mark = tmp_path / "mark"
        await house.add("b", HANGS.replace("MARK", repr(str(mark))))
        line = await house.add("a", CALLS.replace("NEXT", "'b'"))
        answer = line.submit(question(1))
        await until(lambda: mark.exists())
        os.kill(house.pid("b"), signal.SIGKILL)
        with pytest.raises(InferenceFailedError, match="worker of 'b' version 1 died"):
            await answer
        await house.hosts["b"].stop(1.0)
        await house.add("c", GROUPS)
        house.caller.models["b"] = house.caller.models["c"]
        assert values(await line.submit(question(1))) == [3]


async def test_a_model_calls_itself_where_an_instance_is_free_and_is_told_where_none_is(
    tmp_path: Path, zygotes: Zygotes
) -> None:
    itself = """
    class TritonPythonModel:
        def execute(self, requests):
            return [answer(value(r) if value(r)[0] == 0 else checked(called("m", value(r) - 1)) + 1)
                    for r in requests]
    """
    async with home(tmp_path, zygotes) as house:
        line = await house.add("m", itself, instances=2)
        assert values(await line.submit(question(1))) == [1]
        with pytest.raises(InferenceFailedError, match="would wait for ever"):
            await line.submit(question(5))
        both = await asyncio.gather(
            *[line.submit(question(1)) for _ in range(2)], return_exceptions=True
        )
        assert [b for b in both if isinstance(b, InferResponse)]
        assert values(await line.submit(question(1))) == [1]


async def test_a_stop_lets_what_runs_end_with_its_calls(tmp_path: Path, zygotes: Zygotes) -> None:
    async with home(tmp_path, zygotes) as house:
        mark = tmp_path / "mark"
        source = f"open({str(mark)!r}, 'w').write('x'); time.sleep(0.3); return [answer"
        await house.add("b", GROUPS)
        line = await house.add("a", CALLS.replace("NEXT", "'b'").replace("return [answer", source))
        answer = line.submit(question(1))
        await until(lambda: mark.exists())
        await house.hosts["a"].stop(5.0)
        assert values(await answer) == [3]


async def test_a_stop_does_not_wait_for_what_nobody_wants(tmp_path: Path, zygotes: Zygotes) -> None:
    async with home(tmp_path, zygotes) as house:
        line = await house.add(
            "m", COUNTS.replace("if sender.is_cancelled()", "if False"), **DECOUPLED
        )
        endless = line.open(question(1e6, 0.01))
        await anext(endless)
        endless.close()
        began = asyncio.get_running_loop().time()
        await house.hosts["m"].stop(20.0)
        assert asyncio.get_running_loop().time() - began < 10


async def test_every_open_request_hears_of_the_death_of_its_worker(
    tmp_path: Path, zygotes: Zygotes
) -> None:
    async with home(tmp_path, zygotes) as house:
        line = await house.add("m", COUNTS, **DECOUPLED)
        those = [line.open(question(1e6, 0.01)) for _ in range(3)]
        await asyncio.gather(*map(anext, those))
        os.kill(house.pid("m"), signal.SIGKILL)
        for responses in those:
            with pytest.raises(WorkerDiedError):
                await every(responses)
        assert line.in_flight == 0


async def test_what_a_model_keeps_of_a_request_stays_as_it_was(
    tmp_path: Path, zygotes: Zygotes
) -> None:
    keeps = """
    class TritonPythonModel:
        kept = []
        def execute(self, requests):
            self.kept += [value(r) for r in requests]
            return [answer(np.array([k[0] for k in self.kept] + [k[-1] for k in self.kept]))
                    for r in requests]
    """
    async with home(tmp_path, zygotes) as house:
        line = await house.add("m", keeps)
        for n in range(1, 5):
            x = np.full(200_000 if n % 2 else 100, n, "f4")
            answer = await line.submit(InferRequest([Tensor.of("x", x)]))
            assert values(answer) == [*range(1, n + 1)] * 2


async def test_models_load_unload_and_look_for_others(tmp_path: Path, zygotes: Zygotes) -> None:
    manages = """
    class TritonPythonModel:
        def initialize(self, args):
            pb_utils.load_model("early")
        def execute(self, requests):
            pb_utils.load_model("b", config='{"max_batch_size": 4}')
            ready = [pb_utils.is_model_ready("m"), pb_utils.is_model_ready("b")]
            pb_utils.unload_model("b")
            try:
                pb_utils.load_model("broken")
            except Exception as error:
                ready.append("no such model" in str(error))
            return [answer(np.array(ready, "f4")) for r in requests]
    """
    async with home(tmp_path, zygotes) as house:
        line = await house.add("m", manages)
        assert values(await line.submit(question(1))) == [1, 0, 1]
        assert [told[:2] for told in house.caller.told] == [
            ("load", "early"), ("load", "b"), ("unload", "b")]  # fmt: skip


async def test_one_answer_is_asked_of_a_model_that_gives_many(
    tmp_path: Path, zygotes: Zygotes
) -> None:
    async with home(tmp_path, zygotes) as house:
        line = await house.add("m", COUNTS, **DECOUPLED)
        assert values(await line.submit(question(1))) == [0]
        with pytest.raises(InvalidRequestError, match="several answers"):
            await line.submit(question(3))
        with pytest.raises(InferenceFailedError, match="without an answer"):
            await line.submit(question(0))
        assert values(await house.hosts["m"].infer(question(1))) == [0]
        with pytest.raises(InvalidRequestError, match="several answers"):
            await house.hosts["m"].infer(question(2))


async def test_such_a_model_is_refused_where_it_would_share_the_servers_process(
    tmp_path: Path,
) -> None:
    folder = python_model(tmp_path / "m" / "1", HEAD + GROUPS)
    with pytest.raises(LoadFailedError, match="set host to process"):
        async with hosted(spec_of(folder, "triton_python"), tmp_path):
            pass


async def test_memory_is_measured_between_two_groups(tmp_path: Path, zygotes: Zygotes) -> None:
    async with home(tmp_path, zygotes) as house:
        line = await house.add("m", GROUPS)
        answers = [line.submit(question(n)) for n in range(20)]
        assert (await house.hosts["m"].memory())["cpu"]["workspace"] > 1 << 20
        assert [values(await a) for a in answers] == [[n + 1] for n in range(20)]
