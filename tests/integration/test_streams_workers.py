"""Workers that generate, one step after the other: real processes, a backend without a framework."""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from repository.adapters.orders import AdapterOrder
from repository.backends import registry
from repository.config import ModelConfig
from repository.errors import (
    AdapterNotFoundError,
    InferenceFailedError,
    InvalidRequestError,
    LoadFailedError,
    WorkerDiedError,
)
from repository.generate import GenerateRequest, Sampling
from repository.hosts import zygote as zygote_program
from repository.hosts import zygotes as zygotes_module
from repository.hosts.process import ProcessHost
from repository.messages import InferRequest
from repository.spec import ModelSpec
from repository.streaming import Streams
from tests.fakes import counting
from tests.fakes.heart import folders, load, reconciler
from tests.hosting import Waymark, fails, forking, hosted, one


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setattr(registry, "BACKENDS", registry.BACKENDS | counting.ENTRIES)
    monkeypatch.setattr(zygotes_module, "PROGRAM", "tests.fakes.zygote")


def spec_of(path: Path, **config) -> ModelSpec:
    path.mkdir(parents=True, exist_ok=True)
    return ModelSpec(
        "m", 1, "f", path=path, config=ModelConfig(backend="counting", **config), backend="counting"
    )


@asynccontextmanager
async def counting_host(tmp_path, **config):
    spec = spec_of(tmp_path / "m", **config)
    async with forking() as zygotes, hosted(spec, tmp_path / "s", zygotes) as (host, loaded):
        yield host, loaded


def ask(text="", tokens=3, **rest):
    return GenerateRequest(text=text, sampling=Sampling(max_tokens=tokens), **rest)


class Heard(list):
    """The texts of the pieces; `first` is set with the first of them."""

    def __init__(self):
        super().__init__()
        self.first = asyncio.Event()

    def tell(self, piece):
        self.append(piece.text)
        self.first.set()


async def test_texts_are_stepped_together_and_what_else_is_asked_goes_between(tmp_path):
    async with counting_host(tmp_path) as (host, loaded):
        assert loaded.abilities == ("generate", "adapt") and loaded.details["private"] is False
        heard = [Heard() for _ in range(6)]
        asked = [host.generate(ask(tokens=n + 1), h.tell) for n, h in enumerate(heard)]
        ended = await asyncio.gather(*asked)
        assert heard == [[f"{i} " for i in range(n + 1)] for n in range(6)]
        assert [e.completion_tokens for e in ended] == [1, 2, 3, 4, 5, 6]

        # While something runs for ever: tensors, memory and adapters are answered.
        long = Heard()
        endless = host.generate(ask(tokens=10**9), long.tell)
        await long.first.wait()
        assert one(await host.infer(InferRequest([]))).tolist() == [1]
        assert (await host.memory())["cpu"]["workspace"] > 0
        (report,) = await host.adapt([AdapterOrder("a")])
        assert (report.name, report.error) == ("a", "")
        assert (await host.generate(ask(adapter="a"), Heard().tell)).finish == "length"
        (report,) = await host.adapt([])
        assert report.name == "a"
        assert not endless.done()

        # One that nobody wants is gone within a step, and says nothing more.
        endless.cancel()
        said = len(long)
        assert one(await host.infer(InferRequest([]))).tolist()[0] <= 1  # it may be before the step
        while host._workers[0].busy:
            await host.memory()
        assert one(await host.infer(InferRequest([]))).tolist() == [0]
        assert len(long) == said
        assert (await host.generate(ask(), Heard().tell)).completion_tokens == 3


async def test_one_frame_a_step_and_no_step_for_who_has_left(tmp_path):
    mark, notes = Waymark(tmp_path / "mark"), tmp_path / "notes"
    async with counting_host(tmp_path) as (host, _):
        channel = host._workers[0].channel
        frames, tell = [], channel._tell
        channel._tell = lambda meta: (frames.append(1), tell(meta))
        heard = [Heard() for _ in range(3)]
        held = host.generate(ask(f"hold={mark.path}", 5), Heard().tell)  # until all others are here
        others = [host.generate(ask(tokens=4), h.tell) for h in heard]
        left = Heard()
        leaving = host.generate(ask(f"note={notes}", 10**9), left.tell)
        leaving.cancel()  # before the worker has even heard of it
        assert await mark.reached() == "here"
        await asyncio.gather(held, *others)
        assert all(h == ["0 ", "1 ", "2 ", "3 "] for h in heard)
        assert len(frames) <= 5 + 4  # and not one for each piece
        assert left == []
        assert not notes.exists() or len(notes.read_text().split()) <= 1


async def test_what_a_model_refuses_or_breaks_at_fails_alone_and_the_engine_goes_on(
    tmp_path, capfd
):
    async with counting_host(tmp_path) as (host, _):
        quiet = Heard()

        def start(text, **rest):
            return lambda: host.generate(ask(text, **rest), quiet.tell)

        assert await fails(start("fail"), InvalidRequestError) == "the prompt says fail"
        assert "ZeroDivisionError" in await fails(start("break"), InferenceFailedError)
        assert "has not been registered" in await fails(
            start("", adapter="x"), AdapterNotFoundError
        )
        assert quiet == []
        assert await fails(start("wrong"), InferenceFailedError) == "the prompt says wrong"
        quoted = await fails(start("quote"), InferenceFailedError)
        assert quoted == "the model broke: OSError: no x.so"

        # A step that raises fails all that ran, and none that comes after.
        beside = Heard()
        other = host.generate(ask(tokens=10**9), beside.tell)
        await beside.first.wait()
        text = await fails(start("raise"), InferenceFailedError)
        assert text == "ZeroDivisionError: the prompt says raise"
        with pytest.raises(InferenceFailedError):
            await other
        assert (await host.generate(ask(), Heard().tell)).finish == "length"
        assert "RuntimeError: no adapters today" in await fails(
            lambda: host.adapt([AdapterOrder("raises")]), InferenceFailedError
        )
        refused, taken = await host.adapt([AdapterOrder("refused"), AdapterOrder("b")])
        assert (refused.error, taken.error) == ("too large", "")
        assert not host.died.done() and host._workers[0].busy == 0
    log = capfd.readouterr().err
    assert "Traceback" in log and "the prompt says raise" in log


@pytest.mark.parametrize(("how", "why"), [("die", "exit code 3"), ("stuck raise", "exit code 1")])
async def test_a_worker_that_dies_ends_every_stream_and_one_out_of_its_mind_dies(
    tmp_path, capfd, how, why
):
    async with counting_host(tmp_path) as (host, loaded):
        streams = Streams(host, loaded, ModelConfig(), max_queue=9)
        first = streams.open(ask(tokens=10**9))
        await anext(first)
        opened = [first, *(streams.open(ask(how, 9)) for _ in range(2))]
        for stream in opened:
            with pytest.raises(WorkerDiedError, match="the worker of 'm' version 1 died"):
                async for _ in stream:
                    pass
        assert await host.died == why
        assert (streams.in_flight, streams.queue_length) == (0, 0)
        with pytest.raises(WorkerDiedError):
            await anext(streams.open(ask()))


async def test_stopping_lets_texts_finish_in_time_and_cuts_off_the_others(tmp_path):
    async with counting_host(tmp_path) as (host, _):
        asked = [host.generate(ask(tokens=500), Heard().tell) for _ in range(3)]
        await host.stop(20.0)
        assert [(await a).completion_tokens for a in asked] == [500] * 3
    async with counting_host(tmp_path) as (host, _):
        heard = Heard()
        endless = host.generate(ask(tokens=10**9), heard.tell)
        await heard.first.wait()
        await host.stop(0.1)
        with pytest.raises(WorkerDiedError):
            await endless


async def test_a_reload_breaks_no_stream(tmp_path):
    mark = Waymark(tmp_path / "mark")
    async with forking() as zygotes:
        models = reconciler(lambda spec: ProcessHost(zygotes, state_dir=tmp_path / "s"))
        async with models.running():
            first = spec_of(tmp_path / "m")
            models.observe(folders(first))
            old = await load(models, "m")
            with old.lease():
                stream = old.streams.open(ask(f"hold={mark.path}", 5))
                await anext(stream)
                models.observe(folders(replace(first, fingerprint="g")))
                new = await load(models, "m")
                assert new is not old and (await anext(new.streams.open(ask()))).text == "0 "
                await mark.reached()
                assert [piece.text async for piece in stream] == ["1 ", "2 ", "3 ", "4 "]
                assert stream.ended is not None and stream.ended.finish == "length"
            await old.ended.wait()
            assert old.error is None


async def test_sequences_go_to_the_instance_with_the_least_to_do(tmp_path):
    async with counting_host(tmp_path, instances=2) as (host, loaded):
        assert loaded.memory == {"kv": 128} and len(loaded.details["pids"]) == 2
        heard = [Heard() for _ in range(4)]
        endless = [host.generate(ask(tokens=10**9), h.tell) for h in heard]
        await asyncio.gather(*(h.first.wait() for h in heard))
        assert [w.busy for w in host._workers] == [2, 2]
        assert len(await host.adapt([AdapterOrder("a"), AdapterOrder("b")])) == 2
        (first, second) = await host.adapt([])
        assert (first.name, second.name, first.rank) == ("a", "b", 1)  # of the second instance
        for each in endless:
            each.cancel()


async def test_a_model_that_generates_is_refused_inline(tmp_path):
    spec = spec_of(tmp_path / "m")
    with pytest.raises(LoadFailedError, match="set host to process"):
        async with hosted(spec, tmp_path / "s"):
            pass


async def test_an_inline_model_takes_adapters(tmp_path):
    spec = spec_of(tmp_path / "m", options={"mute": 1}, instances=2)
    async with hosted(spec, tmp_path / "s") as (host, loaded):
        assert loaded.abilities == ("adapt",) and loaded.memory == {"kv": 128}
        refused, taken = await host.adapt([AdapterOrder("refused"), AdapterOrder("b")])
        assert (refused.error, taken.error, taken.rank) == ("too large", "", 1)
        assert [report.name for report in await host.adapt([])] == ["b"]
        with pytest.raises(InvalidRequestError):
            host.generate(ask(), Heard().tell)


async def test_a_backend_is_told_whether_its_files_are_its_own(tmp_path):
    spec = replace(spec_of(tmp_path / "m", options={"mute": 1}), backend="counting_copy")
    async with hosted(spec, tmp_path / "s") as (_, inline):
        assert inline.details["private"] is True
    async with forking() as zygotes, hosted(spec, tmp_path / "s", zygotes) as (_, loaded):
        assert loaded.details["private"] is True


async def test_torch_and_text_are_forked_from_one_thread_ready_and_offline(tmp_path, monkeypatch):
    monkeypatch.setitem(registry.BACKENDS, "counting", replace(counting.ENTRY, framework="text"))
    async with forking() as zygotes:
        for zygote in await asyncio.gather(zygotes.warm("torch"), zygotes.warm("text")):
            assert os.listdir(f"/proc/{zygote.pid}/task") == [str(zygote.pid)]
        async with hosted(spec_of(tmp_path / "m"), tmp_path / "s", zygotes) as (_, loaded):
            assert loaded.details["offline"] == "1"
            assert set(loaded.details["modules"]) >= set(zygote_program.TEXT)


def test_everything_that_a_zygote_imports_is_there():
    modules = {module for of in zygote_program.FRAMEWORKS.values() for module in of}
    assert [m for m in sorted(modules) if m.startswith("repository") and not find_spec(m)] == []
