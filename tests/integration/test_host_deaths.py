"""How models in processes of their own end, and that nothing is left when they do."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import psutil
import pytest

from repository.errors import (
    LoadFailedError,
    WorkerDiedError,
)
from repository.hosts import snapshots
from repository.hosts import zygote as zygotes_own
from repository.hosts.zygotes import Zygote
from repository.tensors import Tensor
from tests import models
from tests.hosting import (
    SLOW,
    Waymark,
    ask,
    children,
    fails,
    forking,
    hosted,
    make,
    one,
    until_gone,
)

ROOT = Path(__file__).parents[2]
X = Tensor.of("x", np.zeros((1, 4), np.float32))


async def test_work_in_flight_on_a_killed_worker_fails_as_worker_died(tmp_path):
    mark = Waymark(tmp_path / "mark")
    source = SLOW.replace("MARK", repr(str(mark.path)))
    spec = models.spec_of(models.python_model(tmp_path / "m/1", source), "python")
    async with forking() as zygotes, hosted(spec, tmp_path / "s", zygotes) as (host, loaded):
        asked = [host.infer(ask(X)) for _ in range(3)]
        await mark.reached()
        (pid,) = loaded.details["pids"]
        os.kill(pid, signal.SIGKILL)
        for each in [*asked, host.infer(ask(X))]:
            with pytest.raises(WorkerDiedError) as caught:
                await each
            assert str(caught.value) == (
                "the worker of 'm' version 1 died: killed by signal 9 (SIGKILL); ask again"
            )
        assert await host.died == "killed by signal 9 (SIGKILL)"


async def test_a_model_that_exits_is_reported_with_its_exit_code(tmp_path):
    source = """
        import os
        class Model:
            def infer(self, inputs):
                os._exit(3)
    """
    spec = models.spec_of(models.python_model(tmp_path / "m/1", source), "python")
    async with forking() as zygotes, hosted(spec, tmp_path / "s", zygotes) as (host, _):
        with pytest.raises(WorkerDiedError, match="exit code 3"):
            await host.infer(ask(X))
        assert await host.died == "exit code 3"


async def test_a_worker_that_dies_while_loading_says_how(tmp_path):
    source = "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)"
    spec = models.spec_of(models.python_model(tmp_path / "m/1", source), "python", instances=2)
    async with forking() as zygotes:
        host = make(spec, tmp_path / "s", zygotes)
        text = await fails(lambda: host.load(spec, ["cpu"] * 2), WorkerDiedError)
        assert "killed by signal 11 (SIGSEGV)" in text
        await host.stop(5.0)


async def test_one_instance_that_cannot_load_fails_all_of_them(tmp_path):
    source = """
        class Model:
            def load(self, context):
                if context.instance == 1:
                    raise ValueError("the second is one too many")
            def infer(self, inputs):
                return inputs
    """
    spec = models.spec_of(models.python_model(tmp_path / "m/1", source), "python", instances=3)
    async with forking() as zygotes:
        await zygotes.warm("python")
        before = children()
        host = make(spec, tmp_path / "s", zygotes)
        text = await fails(lambda: host.load(spec, ["cpu"] * 3), LoadFailedError)
        assert text == "ValueError: the second is one too many"
        await host.stop(5.0)
        assert children() == before
        assert not list((tmp_path / "s/snapshots").iterdir())


async def test_a_cancelled_load_leaves_no_process(tmp_path):
    mark = Waymark(tmp_path / "mark")
    source = f"""
        import pathlib, time
        pathlib.Path({str(mark.path)!r}).write_text("importing")
        time.sleep(600)
    """
    spec = models.spec_of(models.python_model(tmp_path / "m/1", source), "python")
    async with forking() as zygotes:
        await zygotes.warm("python")
        before = children()
        host = make(spec, tmp_path / "s", zygotes)
        loading = asyncio.create_task(host.load(spec, ["cpu"]))
        await mark.reached()
        loading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loading
        await host.stop(60.0)
        assert children() == before
        assert not host.died.done()


async def test_a_load_cancelled_before_its_worker_exists_leaves_no_process(tmp_path):
    spec = models.spec_of(models.add_onnx(tmp_path / "m/1/model.onnx"))
    before = children()  # of other tests: a tracker of shared memory stays
    async with forking() as zygotes:
        host = make(spec, tmp_path / "s", zygotes)
        loading = asyncio.create_task(host.load(spec, ["cpu"]))
        await asyncio.sleep(0)
        loading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loading
        await host.stop(5.0)
        zygote = await zygotes.warm("onnx")
        assert children() - before == {zygote.pid}


async def test_what_is_in_flight_when_stop_is_called_may_finish(tmp_path):
    source = """
        import time
        class Model:
            def infer(self, inputs):
                time.sleep(0.2)
                return inputs
    """
    spec = models.spec_of(models.python_model(tmp_path / "m/1", source), "python")
    async with forking() as zygotes, hosted(spec, tmp_path / "s", zygotes) as (host, _):
        asked = host.infer(ask(X))
        await host.stop(30.0)
        assert one(await asked).shape == (1, 4)


async def test_a_model_that_hangs_is_killed_with_the_children_that_it_made(tmp_path):
    mark = Waymark(tmp_path / "mark")
    source = f"""
        import pathlib, signal, subprocess, time
        class Model:
            def __init__(self):
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                self.child = subprocess.Popen(["sleep", "600"])
            def infer(self, inputs):
                pathlib.Path({str(mark.path)!r}).write_text(str(self.child.pid))
                time.sleep(600)
    """
    spec = models.spec_of(models.python_model(tmp_path / "m/1", source), "python")
    async with forking() as zygotes:
        host = make(spec, tmp_path / "s", zygotes)
        await host.load(spec, ["cpu"])
        asked = host.infer(ask(X))
        grandchild = int(await mark.reached())
        await host.stop(0.05)
        with pytest.raises(WorkerDiedError):
            await asked
        assert not until_gone({grandchild})


async def test_children_of_a_model_that_died_by_itself_go_with_it(tmp_path):
    source = """
        import os, subprocess
        class Model:
            def __init__(self):
                self.child = subprocess.Popen(["sleep", "600"])
            def infer(self, inputs):
                if "x" in inputs:
                    os._exit(1)
                import numpy as np
                return {"pid": np.array([self.child.pid])}
    """
    spec = models.spec_of(models.python_model(tmp_path / "m/1", source), "python")
    async with forking() as zygotes, hosted(spec, tmp_path / "s", zygotes) as (host, _):
        grandchild = int(one(await host.infer(ask()))[0])
        with pytest.raises(WorkerDiedError):
            await host.infer(ask(X))
        assert not until_gone({grandchild})


async def test_a_dead_zygote_takes_its_workers_along_and_the_next_load_starts_another(tmp_path):
    spec = models.spec_of(models.add_onnx(tmp_path / "m/1/model.onnx"))
    async with forking() as zygotes:
        async with hosted(spec, tmp_path / "s", zygotes) as (host, loaded):
            zygote = await zygotes.warm("onnx")
            os.kill(zygote.pid, signal.SIGKILL)
            assert "forked from" in await host.died
            assert not until_gone(set(loaded.details["pids"]))
            with pytest.raises(WorkerDiedError):
                await host.infer(ask(X))
        async with hosted(spec, tmp_path / "s", zygotes) as (host, _):
            assert one(await host.infer(ask(X))).tolist() == [[1.0] * 4]


def test_a_killed_server_leaves_no_process(tmp_path):
    models.add_onnx(tmp_path / "m/1/model.onnx")
    source = """
        import subprocess
        class Model:
            def __init__(self):
                self.child = subprocess.Popen(["sleep", "600"])
            def infer(self, inputs):
                return inputs
    """
    models.python_model(tmp_path / "p/1", source)
    program = f"""
        import asyncio, pathlib
        from tests import models
        from tests.hosting import make
        from repository.hosts.zygotes import Zygotes
        async def main():
            home = pathlib.Path({str(tmp_path)!r})
            zygotes = Zygotes()
            specs = (models.spec_of(home / "m/1/model.onnx", instances=2),
                     models.spec_of(home / "p/1", "python"))
            for spec in specs:
                await make(spec, home / "s", zygotes).load(spec, ["cpu"] * spec.config.instances)
            print("ready", flush=True)
            await asyncio.Event().wait()
        asyncio.run(main())
    """
    server = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, stdout=subprocess.PIPE
    )
    with server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        below = {p.pid for p in psutil.Process(server.pid).children(recursive=True)}
        assert len(below) == 6
        server.kill()
        server.wait()
    assert not until_gone(below)
    left = list((tmp_path / "s/snapshots").iterdir())
    assert left
    assert snapshots.sweep(tmp_path / "s") == len(left)
    assert not list((tmp_path / "s/snapshots").iterdir())


async def test_a_worker_that_breaks_the_protocol_is_ended(tmp_path):
    source = """
        import os, stat, struct
        class Model:
            def infer(self, inputs):
                for fd in range(3, 64):
                    try:
                        if stat.S_ISSOCK(os.fstat(fd).st_mode):
                            os.write(fd, struct.pack("<IIQB15x", 2**32 - 1, 8, 1, 6))
                    except OSError:
                        pass
                return inputs
    """
    spec = models.spec_of(models.python_model(tmp_path / "m/1", source), "python")
    async with forking() as zygotes, hosted(spec, tmp_path / "s", zygotes) as (host, _):
        with pytest.raises(WorkerDiedError, match="broke the protocol"):
            await host.infer(ask(X))
        assert "broke the protocol" in await host.died


async def test_answers_sent_before_the_end_arrive_even_if_its_report_is_first(tmp_path):
    source = """
        import time
        class Model:
            def infer(self, inputs):
                time.sleep(0.1)
                return inputs
    """
    spec = models.spec_of(models.python_model(tmp_path / "m/1", source), "python")
    sent = Tensor.of("x", np.zeros(20_000, np.float32))
    async with forking() as zygotes:
        for _ in range(5):
            async with hosted(spec, tmp_path / "s", zygotes) as (host, loaded):
                asked = [host.infer(ask(sent)) for _ in range(2)]
                stopping = asyncio.create_task(host.stop(30.0))
                for _ in range(20):
                    await asyncio.sleep(0)
                # The loop stands still while the worker answers, exits and is reported.
                assert not until_gone(set(loaded.details["pids"]))
                await stopping
                assert len(await asyncio.gather(*asked)) == 2


async def test_a_zygote_that_cannot_start_fails_the_load_and_not_the_server():
    async with forking():
        zygote = Zygote("no such framework")
        with pytest.raises(LoadFailedError, match="did not start"):
            await zygote.up
        await zygote.close()


def test_a_server_that_was_killed_before_it_read_what_its_zygote_told_is_gone_and_no_error():
    control, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    wakeup, poke = os.pipe()
    with control, ours:
        control.send(b"a worker ended")
        ours.close()
        zygotes_own.Zygote(control, wakeup).run()
    os.close(wakeup)
    os.close(poke)


async def test_a_worker_whose_device_is_lost_ends_so_that_another_can_take_over(tmp_path):
    source = """
        class AcceleratorError(RuntimeError):  # as torch's
            pass
        class Model:
            def infer(self, inputs):
                raise AcceleratorError("device-side assert triggered")
    """
    spec = models.spec_of(models.python_model(tmp_path / "m/1", source), "python")
    async with forking() as zygotes, hosted(spec, tmp_path / "s", zygotes) as (host, _):
        with pytest.raises(WorkerDiedError):
            await host.infer(ask(X))
        await host.died
