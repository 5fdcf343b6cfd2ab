"""Streams of texts in front of a fake host, in virtual time."""

import asyncio

import pytest

from repository.adapters.orders import AdapterReport
from repository.config import Batching, ModelConfig
from repository.errors import (
    InvalidRequestError,
    ModelNotReadyError,
    QueueFullError,
    WorkerDiedError,
)
from repository.generate import Ended, GenerateRequest, Piece, Sampling
from repository.hosts import failures, together
from repository.lifecycle.states import State
from repository.messages import Loaded
from repository.streaming import Streams
from tests.fakes.heart import folders, load, reconciler, spec
from tests.fakes.host import FakeHost

pytestmark = pytest.mark.looptime

WRITES = Loaded(abilities=("generate",))


def streams(host, slots=0, max_queue=0, own=0):
    loaded = Loaded(details={"slots": slots} if slots else {})
    config = ModelConfig(batching=Batching(max_queue=own) if own else None)
    return Streams(host, loaded, config, max_queue=max_queue)


def ask(tokens=3, **rest):
    return GenerateRequest(text="x", sampling=Sampling(max_tokens=tokens), **rest)


async def text_of(stream):
    return "".join([piece.text async for piece in stream])


async def test_pieces_come_in_order_and_then_how_it_ended(looptime):
    stream = streams(FakeHost(token_s=1.0)).open(ask(4))
    assert stream.ended is None
    assert await text_of(stream) == "0 1 2 3 "
    assert looptime == 4
    assert stream.ended == Ended("length", 1, 4, total_s=4.0)
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_a_slow_reader_holds_up_nobody_and_loses_nothing(looptime):
    both = streams(FakeHost(token_s=1.0))
    slow, quick = both.open(ask(5)), both.open(ask(5))
    assert await text_of(quick) == "0 1 2 3 4 "
    assert looptime == 5
    await asyncio.sleep(100)
    assert await text_of(slow) == "0 1 2 3 4 "
    assert slow.ended is not None


async def test_an_error_comes_after_the_pieces_before_it():
    def writes(request):
        yield Piece("a")
        raise InvalidRequestError("too long")

    stream = streams(FakeHost(writes=writes)).open(ask())
    assert (await anext(stream)).text == "a"
    with pytest.raises(InvalidRequestError, match="too long"):
        await anext(stream)
    assert stream.ended is None


async def test_a_closed_stream_is_cancelled_and_over():
    host = FakeHost(token_s=1.0)
    both = streams(host)
    stream = both.open(ask(9))
    await anext(stream)
    stream.close()
    stream.close()
    await asyncio.sleep(0)
    assert host.cancelled == host.asked
    assert both.in_flight == 0 and both.samples == 1
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    assert stream.ended is None


async def test_closing_a_stream_wakes_its_reader():
    stream = streams(FakeHost(token_s=100.0)).open(ask())
    reader = asyncio.create_task(text_of(stream))
    await asyncio.sleep(1)
    stream.close()
    assert await reader == ""


async def test_a_reader_that_is_cancelled_can_come_back():
    stream = streams(FakeHost(token_s=10.0)).open(ask(1))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(stream), 1)
    assert (await anext(stream)).text == "0 "


async def test_beyond_slots_and_queue_it_is_refused_with_a_time_to_come_back():
    full = streams(FakeHost(slots=2, token_s=1.0), slots=3, max_queue=1)
    opened = [full.open(ask()) for _ in range(7)]
    assert (full.in_flight, full.queue_length) == (6, 1)
    with pytest.raises(QueueFullError, match="6 sequences of the model run and 1 wait") as caught:
        full.open(ask())
    assert caught.value.retry_after_s
    opened[0].close()
    await asyncio.sleep(0)
    full.open(ask())


async def test_a_models_own_queue_limit_overrides_the_servers():
    own = streams(FakeHost(token_s=1.0), max_queue=100, own=1)
    own.open(ask())
    own.open(ask())
    with pytest.raises(QueueFullError):
        own.open(ask())


async def test_sequences_and_tokens_are_counted_without_the_prompts_echo():
    counted = streams(FakeHost(token_s=1.0))
    await text_of(counted.open(ask(4)))
    left = counted.open(ask(9, echo=True))
    for _ in range(3):
        await anext(left)
    left.close()
    await asyncio.sleep(0)
    assert (counted.executions, counted.samples) == (2, 4 + 2)


async def test_a_host_that_dies_ends_every_stream_after_its_pieces():
    host = FakeHost(token_s=1.0)
    both = streams(host)
    opened = [both.open(ask(9)) for _ in range(3)]
    await asyncio.sleep(2.5)
    host.kill()
    for stream in opened:
        assert [(await anext(stream)).text, (await anext(stream)).text] == ["0 ", "1 "]
        with pytest.raises(WorkerDiedError):
            await anext(stream)


# the life of a generation -----------------------------------------------------------------------


async def test_a_reload_lets_running_streams_finish(looptime):
    hosts = []

    def make(what):
        hosts.append(FakeHost(token_s=1.0, loaded=WRITES))
        return hosts[-1]

    models = reconciler(make, lives={"drain_s": 30.0})
    async with models.running():
        models.observe(folders(spec(print_="f1")))
        old = await load(models, "m")
        lease = old.lease()
        lease.begin()
        stream = old.streams.open(ask(10))
        await anext(stream)
        models.observe(folders(spec(print_="f2")))
        new = await load(models, "m")
        await asyncio.sleep(0.5)
        assert new is not old and old.state is State.DRAINING
        assert await text_of(stream) == "1 2 3 4 5 6 7 8 9 "
        assert stream.ended is not None and looptime == 10
        lease.end()
        await old.ended.wait()
        assert await text_of(new.streams.open(ask(1))) == "0 "


async def test_what_still_runs_when_patience_ends_is_told_why():
    models = reconciler(lambda s: FakeHost(token_s=1.0, loaded=WRITES), lives={"drain_s": 3.0})
    async with models.running():
        models.observe(folders(spec()))
        gen = await load(models, "m")
        with gen.lease():
            stream = gen.streams.open(ask(100))
            models.unwant("m")
            with pytest.raises(ModelNotReadyError, match="unloading"):
                await text_of(stream)
            with pytest.raises(ModelNotReadyError, match="unloading"):
                gen.streams.open(ask())
        await gen.ended.wait()


async def test_sequences_and_tokens_count_as_work_of_the_generation():
    models = reconciler(lambda s: FakeHost(token_s=1.0, loaded=WRITES), lives={"max_queue": 5})
    async with models.running():
        models.observe(folders(spec()))
        gen = await load(models, "m")
        with gen.lease():
            first, second = gen.streams.open(ask(2)), gen.streams.open(ask(9))
            assert gen.work == (1, 1, 2, 0)
            await text_of(first)
            assert gen.work == (0, 1, 2, 2)
            second.close()


async def test_only_a_model_that_generates_has_streams():
    models = reconciler(lambda s: FakeHost())
    async with models.running():
        models.observe(folders(spec()))
        assert (await load(models, "m")).streams is None


# several workers --------------------------------------------------------------------------------


def test_an_error_of_any_worker_is_the_reports_error():
    one = [AdapterReport("a", "", "host", 4, 10), AdapterReport("b", "first", "registered")]
    two = [AdapterReport("a", "no", "device", 4, 10), AdapterReport("b", "second", "registered")]
    found = together.answers([one, two])
    assert [(r.name, r.error, r.residence) for r in found] == [
        ("a", "no", "device"),
        ("b", "first", "registered"),
    ]


def test_where_adapters_are_is_told_by_name():
    one, two = (
        [AdapterReport("a"), AdapterReport("b", "", "host")],
        [AdapterReport("b", "", "device")],
    )
    assert {r.name: r.residence for r in together.whereabouts([one, two])} == {
        "a": "registered",
        "b": "device",
    }


def test_an_error_from_a_worker_keeps_its_class_whatever_a_face_adds_to_it():
    class OfAFaceError(InvalidRequestError):
        def __init__(self, field, why):
            super().__init__(f"{field}: {why}")

    failures._classes.cache_clear()
    sent = failures.to_wire(InvalidRequestError("too long"))
    assert type(failures.from_wire(sent)) is InvalidRequestError
    assert type(failures.from_wire(failures.to_wire(OfAFaceError("a", "b")))) is InvalidRequestError
