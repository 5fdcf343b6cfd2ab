"""Models in processes of their own: what they survive, and what they leave behind: nothing."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import uvloop

from repository.errors import (
    InferenceFailedError,
    InvalidRequestError,
    WorkerDiedError,
)
from repository.hosts import snapshots
from repository.lifecycle.placement import by_kind
from repository.messages import InferRequest
from repository.tensors import Tensor
from tests import models
from tests.hosting import (
    ask,
    children,
    forking,
    hosted,
    one,
    open_files,
)

ROOT = Path(__file__).parents[2]
X = Tensor.of("x", np.zeros((1, 4), np.float32))


async def test_a_model_is_loaded_asked_and_stopped_and_nothing_is_left(tmp_path):
    spec = models.spec_of(models.add_onnx(tmp_path / "m/1/model.onnx", 2.0))
    async with forking() as zygotes:
        await zygotes.warm("onnx")
        before, files = children(), open_files()
        async with hosted(spec, tmp_path / "state", zygotes) as (host, loaded):
            response = await host.infer(ask(X))
            assert one(response).tolist() == [[2.0] * 4]
            assert response.compute_s > 0
            assert loaded.platform == "onnxruntime_onnx"
            assert loaded.details["providers"] == ["CPUExecutionProvider"]
            assert set(loaded.details["pids"]) == children() - before
        assert children() == before
        assert open_files() == files
        assert not host.died.done()


def test_everything_works_under_uvloop_too(tmp_path):
    spec = models.spec_of(models.add_onnx(tmp_path / "m/1/model.onnx"), instances=2)
    big = Tensor.of("x", np.ones((1 << 20, 4), np.float32))

    async def story() -> None:
        async with forking() as zygotes, hosted(spec, tmp_path / "s", zygotes) as (host, loaded):
            answers = await asyncio.gather(*(host.infer(ask(big)) for _ in range(4)))
            assert all((one(a) == 2.0).all() for a in answers)
            os.kill(loaded.details["pids"][0], signal.SIGKILL)
            assert await host.died == "killed by signal 9 (SIGKILL)"

    uvloop.run(story())


async def test_tensors_of_64_megabytes_travel_both_ways(tmp_path):
    spec = models.spec_of(models.identity_onnx(tmp_path / "m/1/model.onnx", "FP32", (-1,)))
    sent = np.arange(1 << 24, dtype=np.float32)
    async with forking() as zygotes, hosted(spec, tmp_path / "s", zygotes) as (host, _):
        small = host.infer(ask(Tensor.of("x", sent[:3])))
        large = [host.infer(ask(Tensor.of("x", sent))) for _ in range(2)]
        after = host.infer(ask(Tensor.of("x", sent[3:6])))
        assert one(await small).tolist() == [0, 1, 2]
        for each in large:
            assert np.array_equal(one(await each), sent)
        assert one(await after).tolist() == [3, 4, 5]


async def test_answers_find_their_questions_among_many_of_all_sizes(tmp_path):
    spec = models.spec_of(
        models.identity_onnx(tmp_path / "m/1/model.onnx", "INT32", (-1,)), instances=2
    )
    sizes = [0, 1, 15, 16, 17, 16_000, 16_384, 100_000, 3, 700_000, 5] * 6
    async with forking() as zygotes, hosted(spec, tmp_path / "s", zygotes) as (host, _):
        asked = [
            host.infer(ask(Tensor.of("x", np.full(size, i, np.int32))))
            for i, size in enumerate(sizes)
        ]
        for i, (size, answer) in enumerate(zip(sizes, await asyncio.gather(*asked), strict=True)):
            assert np.array_equal(one(answer), np.full(size, i, np.int32))


async def test_a_sweep_leaves_the_snapshots_of_living_servers(tmp_path):
    snapshots.fresh(tmp_path).mkdir()
    assert snapshots.sweep(tmp_path) == 0
    assert len(list((tmp_path / "snapshots").iterdir())) == 1


async def test_twenty_loads_and_stops_leak_no_file_and_no_process(tmp_path):
    spec = models.spec_of(models.add_onnx(tmp_path / "m/1/model.onnx"), instances=2)
    async with forking() as zygotes:
        async with hosted(spec, tmp_path / "s", zygotes):
            pass
        before, files = children(), open_files()
        for _ in range(20):
            async with hosted(spec, tmp_path / "s", zygotes) as (host, _):
                await host.infer(ask(X))
        assert children() == before
        assert open_files() == files


async def test_a_tiny_onnx_worker_costs_few_megabytes(tmp_path):
    spec = models.spec_of(models.add_onnx(tmp_path / "m/1/model.onnx"), instances=8)
    async with forking() as zygotes, hosted(spec, tmp_path / "s", zygotes) as (host, _):
        await asyncio.gather(*(host.infer(ask(X)) for _ in range(16)))
        each = sum(by_kind(await host.memory()).values()) / 8
        assert 0 < each < 20e6


async def test_a_worker_lets_whoever_runs_go_first(tmp_path):
    spec = models.spec_of(models.add_onnx(tmp_path / "m/1/model.onnx"))
    async with forking() as zygotes, hosted(spec, tmp_path / "s", zygotes) as (_, loaded):
        (pid,) = loaded.details["pids"]
        assert os.sched_getscheduler(pid) == os.SCHED_BATCH


async def test_the_least_loaded_instance_is_asked(tmp_path):
    source = """
        import os, time
        import numpy as np
        class Model:
            def infer(self, inputs):
                if inputs["slow"].item():
                    time.sleep(0.5)
                return {"pid": np.array([os.getpid()])}
    """
    spec = models.spec_of(models.python_model(tmp_path / "m/1", source), "python", instances=2)
    slow, quick = (Tensor.of("slow", np.array(is_slow)) for is_slow in (True, False))
    async with forking() as zygotes, hosted(spec, tmp_path / "s", zygotes) as (host, _):
        assert host.slots == 2
        busy = host.infer(ask(slow))
        others = {int(one(await host.infer(ask(quick)))[0]) for _ in range(5)}
        assert not busy.done()
        assert others.isdisjoint(one(await busy).tolist())


async def test_quick_answers_that_wait_for_each_other_all_arrive(tmp_path):
    source = """
        import os
        class Model:
            def infer(self, inputs):
                if inputs["x"].size > 1:
                    os._exit(0)
                return inputs
    """
    spec = models.spec_of(models.python_model(tmp_path / "m/1", source), "python")
    async with forking() as zygotes:
        async with hosted(spec, tmp_path / "s", zygotes) as (host, _):
            for count in (1, 2, 3, 50):
                sent = [Tensor.of("x", np.array([i])) for i in range(count)]
                answers = await asyncio.gather(*(host.infer(ask(each)) for each in sent))
                assert [one(answer).item() for answer in answers] == list(range(count))
            asked = [host.infer(ask(each)) for each in sent]
            host._workers[0].channel.stop()  # in the same packet as the last of them
            assert [one(await each).item() for each in asked] == list(range(50))
        async with hosted(spec, tmp_path / "s", zygotes) as (host, _):
            asked = [host.infer(ask(each)) for each in [*sent, X, *sent]]
            await asyncio.wait(asked)
            late = {type(each.exception()) for each in asked[-51:]}
            assert late == {WorkerDiedError}


async def test_what_cannot_travel_is_refused_without_harm(tmp_path):
    spec = models.spec_of(models.add_onnx(tmp_path / "m/1/model.onnx"))
    async with forking() as zygotes, hosted(spec, tmp_path / "s", zygotes) as (host, _):
        for odd in (object(), 2**70, "\ud800"):
            with pytest.raises(InvalidRequestError):
                await host.infer(InferRequest([X], parameters={"odd": odd}))
        assert one(await host.infer(ask(X))).tolist() == [[1.0] * 4]


async def test_a_failure_of_the_model_leaves_the_worker_in_service(tmp_path):
    source = """
        import asyncio
        class Model:
            def infer(self, inputs):
                if inputs["x"].sum() == 0:
                    raise SystemExit("no zeros")
                if inputs["x"].sum() < 0:
                    raise asyncio.CancelledError
                return inputs
    """
    spec = models.spec_of(models.python_model(tmp_path / "m/1", source), "python")
    async with forking() as zygotes, hosted(spec, tmp_path / "s", zygotes) as (host, _):
        with pytest.raises(InferenceFailedError, match=r"^SystemExit: no zeros$"):
            await host.infer(ask(X))
        with pytest.raises(InferenceFailedError, match=r"^CancelledError$"):
            await host.infer(ask(Tensor.of("x", np.full(2, -1.0))))
        assert one(await host.infer(ask(Tensor.of("x", np.ones(2))))).tolist() == [1, 1]


async def test_a_worker_does_not_see_the_settings_of_the_server(tmp_path, monkeypatch):
    monkeypatch.setenv("MODELDEPOT_API_KEYS", "secret")
    source = """
        import os
        import numpy as np
        class Model:
            def infer(self, inputs):
                told = [k for k in os.environ if k.startswith("MODELDEPOT_")]
                fds = os.listdir("/proc/self/fd")
                return {"told": np.array([len(told)]), "fds": np.array([len(fds)])}
    """
    spec = models.spec_of(models.python_model(tmp_path / "m/1", source), "python")
    async with forking() as zygotes, hosted(spec, tmp_path / "s", zygotes) as (host, _):
        told, fds = (t.array()[0] for t in (await host.infer(ask())).outputs)
        assert told == 0
        assert fds <= 6  # 0, 1, 2, its socket, its arena, and the listing itself


async def test_zygotes_have_one_thread_when_they_fork():
    async with forking() as zygotes:
        for framework in ("onnx", "python"):
            zygote = await zygotes.warm(framework)
            assert len(os.listdir(f"/proc/{zygote.pid}/task")) == 1
