"""Sleep that goes wrong: the call says so, and the host's end leaves nothing."""

from __future__ import annotations

import asyncio
import gc
import os
import signal

import numpy as np
import pytest

from repository.errors import FailedError, FilesChangedError, LoadFailedError, WorkerDiedError
from tests import models
from tests.hosting import Waymark, ask, children, fails, forking, hosted, make, one
from tests.torch_models import given, write_mlp

ROWS = np.random.default_rng(7).normal(size=(5, 4)).astype(np.float32)


async def test_one_of_two_that_fails_to_sleep_fails_the_call_and_stop_leaves_nothing(tmp_path):
    source = """
        class Model:
            def load(self, context):
                self.bad = context.instance
            def infer(self, inputs):
                return inputs
            def sleep(self):
                if self.bad:
                    raise OSError("no room in /nowhere")
            def wake(self): ...
    """
    spec = models.spec_of(models.python_model(tmp_path / "m/1", source), "python", instances=2)
    async with forking() as zygotes:
        await zygotes.warm("python")
        before = children()
        async with hosted(spec, tmp_path / "s", zygotes) as (host, _):
            assert "OSError: no room in" in await fails(host.sleep, LoadFailedError)
            assert not host.died.done()
        assert children() == before


async def test_a_model_whose_file_has_changed_cannot_sleep(tmp_path):
    path = models.add_onnx(tmp_path / "m/1/model.onnx", 2.0)
    spec = models.spec_of(path)
    async with forking() as zygotes, hosted(spec, tmp_path / "s", zygotes) as (host, _):
        models.add_onnx(path, 3.0)
        text = await fails(host.sleep, FilesChangedError)
        assert "the model cannot sleep" in text


async def test_a_sleeping_onnx_model_needs_its_file_no_more(tmp_path):
    path = models.add_onnx(tmp_path / "m/1/model.onnx", 2.0)
    spec = models.spec_of(path)
    async with forking() as zygotes, hosted(spec, tmp_path / "s", zygotes) as (host, _):
        await host.sleep()
        assert (await host.memory())["host"] == {"weights": path.stat().st_size}
        path.unlink()
        await host.wake()
        assert one(await host.infer(ask(*given(x=ROWS)))).tolist() == (ROWS + 2).tolist()


async def test_a_worker_killed_asleep_is_reported_and_leaves_nothing(tmp_path):
    spec = models.spec_of(write_mlp(tmp_path / "m/1"), "torch_module")
    async with forking() as zygotes, hosted(spec, tmp_path / "s", zygotes) as (host, loaded):
        await host.sleep()
        os.kill(loaded.details["pids"][0], signal.SIGKILL)
        assert await host.died == "killed by signal 9 (SIGKILL)"
        await fails(host.wake, WorkerDiedError)


@pytest.mark.parametrize("when", ["sleep", "wake"])
async def test_a_worker_killed_on_the_way_fails_the_call_and_stop_leaves_nothing(tmp_path, when):
    mark = Waymark(tmp_path / "mark")
    source = f"""
        import pathlib, time
        def hang():
            pathlib.Path({str(mark.path)!r}).write_text("here")
            time.sleep(600)
        class Model:
            def infer(self, inputs):
                return inputs
            def sleep(self):
                {"hang()" if when == "sleep" else "pass"}
            def wake(self):
                {"hang()" if when == "wake" else "pass"}
    """
    spec = models.spec_of(models.python_model(tmp_path / "m/1", source), "python", instances=2)
    async with forking() as zygotes:
        await zygotes.warm("python")
        before = children()
        async with hosted(spec, tmp_path / "s", zygotes) as (host, loaded):
            if when == "wake":
                await host.sleep()
            moving = asyncio.create_task(getattr(host, when)())
            assert (await mark.reached()).startswith("here")  # or both of them have come so far
            for pid in loaded.details["pids"]:
                os.kill(pid, signal.SIGKILL)
            with pytest.raises(FailedError):
                await moving
            assert "SIGKILL" in await host.died
        assert children() == before


async def test_a_call_that_is_given_up_leaves_a_host_that_stops(tmp_path):
    mark = Waymark(tmp_path / "mark")
    source = f"""
        import pathlib, time
        class Model:
            def infer(self, inputs):
                return inputs
            def sleep(self):
                pathlib.Path({str(mark.path)!r}).write_text("here")
                time.sleep(600)
            def wake(self): ...
    """
    spec = models.spec_of(models.python_model(tmp_path / "m/1", source), "python")
    async with forking() as zygotes:
        host = make(spec, tmp_path / "s", zygotes)
        await host.load(spec, ["cpu"])
        said: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, what: said.append(what))
        sleeping = asyncio.create_task(host.sleep())
        await mark.reached()
        sleeping.cancel()
        await asyncio.wait([sleeping])
        await host.stop(0.1)
        del sleeping
        gc.collect()
        assert said == [], "an answer that nobody waits for is no error that nobody has seen"


@pytest.mark.parametrize("way", ["sleep", "wake"])
async def test_who_hangs_in_a_call_that_is_given_up_is_not_waited_for(tmp_path, way):
    mark = Waymark(tmp_path / "mark")
    hang = f"pathlib.Path({str(mark.path)!r}).write_text('here'); time.sleep(600)"
    source = f"""
        import pathlib, time
        class Model:
            def infer(self, inputs):
                return inputs
            def sleep(self):
                {hang if way == "sleep" else "pass"}
            def wake(self):
                {hang if way == "wake" else "pass"}
    """
    spec = models.spec_of(models.python_model(tmp_path / "m/1", source), "python")
    async with forking() as zygotes:
        await zygotes.warm("python")
        before = children()
        host = make(spec, tmp_path / "s", zygotes)
        await host.load(spec, ["cpu"])
        if way == "wake":
            await host.sleep()
        moving = asyncio.create_task(getattr(host, way)())
        await mark.reached()
        moving.cancel()
        await asyncio.wait([moving])
        async with asyncio.timeout(20):
            await host.stop(600)
        assert children() == before
