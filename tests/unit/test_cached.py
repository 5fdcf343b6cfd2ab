"""Answers that are kept, in front of a batcher and a fake host: who is answered without the model."""

from __future__ import annotations

import asyncio
import gc
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from repository.adapters.orders import ROW_ADAPTERS
from repository.cache import ResponseCache
from repository.cached import ON_LOOP, Cached
from repository.config import Ensemble, ModelConfig, Sequences
from repository.entrance import let_in
from repository.errors import InferenceFailedError, ModelNotReadyError, QueueFullError
from repository.folder.kept import never_kept
from repository.messages import InferRequest, InferResponse, Loaded
from repository.prompt import listen
from repository.tensors import Tensor, pack_bytes
from tests.batches import ask, batcher, rows_of, sizes
from tests.fakes.heart import newborn, spec
from tests.fakes.host import FakeHost

BIG = ON_LOOP  # rows of one float


def cached(host: FakeHost, *, limit: int = 1 << 30, most: int = 8, **rest: Any) -> Cached:
    ordered = bool(rest.get("preserve_ordering"))
    return Cached(batcher(host, most, **rest), ResponseCache(limit), ordered=ordered)


def named(*names: str) -> InferRequest:
    """With adapters, as the facade hands it on."""
    request = ask(*range(len(names)))
    data = pack_bytes(np.array([name.encode() for name in names], object))
    request.inputs.append(Tensor(ROW_ADAPTERS, "BYTES", (len(names),), data))
    return request


@pytest.mark.looptime
async def test_the_same_again_is_answered_at_once_and_the_model_is_not_run(looptime):
    host = FakeHost(infer_s=1.0)
    line = cached(host)
    first = await line.submit(ask(1, 2))
    assert (rows_of(first), first.compute_s, looptime) == ([1, 2], 1.0, 1)
    future = line.submit(ask(1, 2))
    assert future.done() and looptime == 1
    again = future.result()
    assert rows_of(again) == [1, 2]
    assert (again.queue_s, again.compute_s, again.batch_size) == (0, 0, 0)
    assert rows_of(await line.submit(ask(2, 1))) == [2, 1]
    assert (line.executions, line.samples, sizes(host)) == (2, 4, [2, 2])
    assert sum(count for count, _ in line.batches.values()) == 2
    assert (line.lookups.hits, line.lookups.misses) == (1, 2)
    assert line.lookups.hit_s > 0 and line.lookups.miss_s > 0


async def test_whoever_listens_hears_of_an_answer_that_is_there():
    line = cached(FakeHost())
    await line.submit(ask(1))
    heard = asyncio.Event()
    listen(line.submit(ask(1)), lambda _: heard.set())
    await heard.wait()


async def test_who_reads_answers_one_by_one_reads_one():
    host = FakeHost()
    line = cached(host)
    for _ in range(2):
        assert [rows_of(answer) async for answer in line.open(ask(3))] == [[3]]
    assert line.executions == 1
    responses = line.open(ask(3))
    responses.close()
    assert [answer async for answer in responses] == []


@pytest.mark.looptime
async def test_those_that_come_together_all_run(looptime):
    host = FakeHost(infer_s=1.0)
    line = cached(host)
    answers = await asyncio.gather(*[line.submit(ask(5)) for _ in range(3)])
    assert [rows_of(a) for a in answers] == [[5]] * 3 and sizes(host) == [3]
    assert line.submit(ask(5)).done() and line.lookups.misses == 3


async def test_errors_are_not_kept():
    wrong = [InferenceFailedError("no"), None]

    def result(request: InferRequest) -> InferResponse:
        if error := wrong.pop(0):
            raise error
        return InferResponse(list(request.inputs))

    line = cached(FakeHost(result=result))
    with pytest.raises(InferenceFailedError):
        await line.submit(ask(1))
    assert rows_of(await line.submit(ask(1))) == [1]
    assert line.submit(ask(1)).done() and (line.lookups.hits, line.lookups.misses) == (1, 2)


@pytest.mark.looptime
async def test_an_answer_that_nobody_waited_for_is_not_kept_and_disturbs_nobody(looptime):
    host = FakeHost(infer_s=1.0)
    line = cached(host)
    left = line.submit(ask(1))
    await asyncio.sleep(0.5)
    left.cancel()
    stays = line.submit(ask(1))
    assert not stays.done() and rows_of(await stays) == [1]
    assert line.submit(ask(1)).done()


@pytest.mark.looptime
async def test_an_answer_that_is_there_needs_no_place_in_a_full_queue(looptime):
    host = FakeHost(infer_s=1.0)
    line = cached(host, most=0, server_queue=1)
    await line.submit(ask(1))
    running, waiting = line.submit(ask(2)), line.submit(ask(3))
    with pytest.raises(QueueFullError):
        line.submit(ask(4))
    assert line.submit(ask(1)).done()
    assert (line.queue_length, line.in_flight) == (1, 1)
    assert line.lookups.misses == 3  # who was refused had no answer to look for
    await asyncio.gather(running, waiting)


async def test_a_closed_line_finds_nothing_and_the_memory_is_free_soon():
    cache = ResponseCache(1 << 30)
    line = Cached(batcher(FakeHost()), cache)
    for n in range(1200):  # more than leave at once
        await line.submit(ask(n))
    await asyncio.sleep(0)
    assert len(cache) == 1200
    line.close(ModelNotReadyError("it is unloading"))
    line.close(ModelNotReadyError("again"))
    with pytest.raises(ModelNotReadyError):
        line.submit(ask(1))
    assert 0 < len(cache) < 1200
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert (len(cache), cache.size) == (0, 0) and not cache.sweep()


@pytest.mark.looptime
async def test_what_is_answered_after_the_end_is_not_kept(looptime):
    cache = ResponseCache(1 << 30)
    line = Cached(batcher(FakeHost(infer_s=1.0)), cache)
    last = line.submit(ask(1))
    await asyncio.sleep(0.5)
    line.close(ModelNotReadyError("it is unloading"))
    assert rows_of(await last) == [1]
    await asyncio.sleep(1)
    assert len(cache) == 0


async def test_requests_of_sequences_and_with_adapters_pass():
    host = FakeHost()
    line = cached(host)
    for request in (
        lambda: ask(1, sequence_id=1),
        lambda: ask(1, sequence_start=1),
        lambda: named("", "a"),
    ):
        await line.submit(request())
        await line.submit(request())
        assert len([answer async for answer in line.open(request())]) == 1
    assert line.executions == 9 and (line.lookups.hits, line.lookups.misses) == (0, 0)
    await line.submit(named("", ""))
    assert line.submit(named("", "")).done()


@pytest.mark.looptime
async def test_where_answers_keep_their_order_nobody_overtakes(looptime):
    host = FakeHost(infer_s=1.0)
    line = cached(host, most=0, preserve_ordering=True)
    await line.submit(ask(1))
    assert line.submit(ask(1)).done()
    before, after = line.submit(ask(2)), line.submit(ask(1))
    assert not after.done()
    await after
    assert before.done() and looptime == 3
    large = line.submit(ask(*range(BIG)))
    assert rows_of(await large)[-1] == BIG - 1 and line.executions == 4


async def test_answers_that_are_too_large_are_not_kept():
    host = FakeHost()
    line = cached(host, limit=8000)
    for _ in range(2):
        await line.submit(ask(*range(400), width=4))
    assert line.executions == 2 and line.lookups.misses == 2


async def test_nothing_of_a_request_is_kept():
    host = FakeHost(result=lambda request: InferResponse([]))
    line = cached(host)
    request = ask(1)
    data = np.arange(3, dtype=np.float32)
    ref = weakref.ref(data)
    request.inputs[0] = Tensor("x", "FP32", (3,), data.view(np.uint8).data)
    del data
    await line.submit(request)
    del request
    host.batches.clear()
    await asyncio.sleep(0)
    gc.collect()
    assert ref() is None


# hashed in a thread -------------------------------------------------------------------------------


async def test_large_requests_are_looked_up_in_a_thread():
    host = FakeHost()
    line = cached(host)
    for hits in range(3):
        future = line.submit(ask(*range(BIG)))
        assert not future.done()
        assert rows_of(await future)[-1] == BIG - 1
        assert (line.lookups.hits, line.executions) == (hits, 1)
    assert [rows_of(a)[1] async for a in line.open(ask(*range(BIG)))] == [1]
    assert line.executions == 1


async def test_who_leaves_while_it_is_hashed_is_never_run():
    host = FakeHost()
    line = cached(host)
    future = line.submit(ask(*range(BIG)))
    future.cancel()
    await line.submit(ask(*range(1, BIG + 1)))
    assert sizes(host) == [BIG] and line.lookups.misses == 1


async def test_who_leaves_once_it_runs_leaves_the_line():
    gate: asyncio.Future[InferResponse] = asyncio.get_running_loop().create_future()

    asked = asyncio.Event()

    class Held(FakeHost):
        def infer(self, request, at=None):
            asked.set()
            return gate

    line = cached(Held(), most=0)
    future = line.submit(ask(*range(BIG)))
    await asked.wait()
    future.cancel()
    with pytest.raises(asyncio.CancelledError):
        await future
    gate.set_result(InferResponse([]))
    await asyncio.sleep(0)
    assert line.in_flight == 0 and line.lookups.misses == 1
    assert not line.submit(ask(*range(BIG))).done()  # and what nobody waited for was not kept


async def test_what_the_line_refuses_after_the_hashing_the_future_fails_with():
    line = cached(FakeHost())
    future = line.submit(ask(*range(BIG)))
    line.close(ModelNotReadyError("it is unloading"))
    with pytest.raises(ModelNotReadyError, match="unloading"):
        await future
    broken = cached(FakeHost(result=lambda request: 1 / 0))  # type: ignore[arg-type, return-value]
    with pytest.raises(InferenceFailedError, match="ZeroDivisionError"):
        await broken.submit(ask(*range(BIG)))


# which models -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "loaded", "cache", "is_cached"),
    [
        (ModelConfig(response_cache=True), Loaded(), True, True),
        (ModelConfig(response_cache=True), Loaded(abilities=("ask",)), True, True),
        (ModelConfig(response_cache=True), Loaded(), False, False),
        (ModelConfig(), Loaded(), True, False),
        (ModelConfig(response_cache=True), Loaded(abilities=("ask", "decoupled")), True, False),
        (ModelConfig(response_cache=True, ensemble=Ensemble()), Loaded(), True, False),
        (ModelConfig(response_cache=True, sequences=Sequences()), Loaded(), True, False),
    ],
)
async def test_only_models_that_want_it_and_can_have_it_are_looked_up(
    config, loaded, cache, is_cached
):
    gen = newborn(replace(spec("m"), config=config))
    memory = ResponseCache(1 << 20) if cache else None
    clock = asyncio.get_running_loop().time
    let_in(gen, FakeHost(), loaded, max_queue=9, clock=clock, cache=memory)
    assert isinstance(gen.batcher, Cached) == is_cached == (gen.lookups is not None)
    assert gen.batcher is not None
    gen.batcher.close(ModelNotReadyError("over"))


@pytest.mark.parametrize(
    ("config", "server", "why"),
    [
        (ModelConfig(), True, None),
        (ModelConfig(), False, "unless the server is started with --response-cache-size"),
        (ModelConfig(decoupled=True), True, "any number of answers"),
        (ModelConfig(ensemble=Ensemble()), False, "an ensemble"),
        (ModelConfig(sequences=Sequences()), True, "sequence"),
    ],
)
def test_why_answers_are_not_kept_is_told_before_the_load(
    config: ModelConfig, server: bool, why: str | None
) -> None:
    found = never_kept(config, server=server)
    assert (found is None) == (why is None)
    if found is not None and why is not None:
        assert why in found[0] and "response_cache" in found[1]
