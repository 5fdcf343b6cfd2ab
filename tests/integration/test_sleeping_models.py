"""Sleep and wake through the facade, with real workers."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import asynccontextmanager

import numpy as np
import pytest

from repository.errors import (
    ConflictError,
    ModelNotFoundError,
    ModelNotReadyError,
    NoRoomError,
    SupersededError,
)
from repository.lifecycle.placement import HOST
from repository.lifecycle.states import State
from repository.messages import InferRequest
from repository.repository import Options, Repository
from repository.tensors import Tensor
from tests.models import python_model

pytestmark = pytest.mark.timeout(60)

# Counts its requests: what it knows has to be there again after a sleep.
COUNTS = """
    import os
    import numpy as np
    class Model:
        inputs = [("x", "FP32", (2,))]
        outputs = [("y", "FP32", (2,))]
        def __init__(self):
            self.n = 0
        def infer(self, inputs):
            self.n += 1
            return {"y": inputs["x"] * 0 + np.array([self.n, os.getpid()], np.float32)}
"""
SLEEPS = (
    COUNTS
    + """
        def sleep(self):
            self.asleep = True
        def wake(self):
            del self.asleep
"""
)


@pytest.fixture
def root(tmp_path):
    path = tmp_path / "models"
    for name, code in (("m", SLEEPS), ("owl", COUNTS)):
        python_model(path / name / "1", code)
        (path / name / "config.yaml").write_text("memory: 10MiB\n")
    return path


@asynccontextmanager
async def serving(root, **options):
    """Ready: what was wanted at the start serves."""
    options = {"settle_s": 0.0, "watch": "off", "host_tier": 1 << 30, **options}
    models = Repository(Options(root, trust_code=True, state_dir=root.parent / "state", **options))
    async with models.running():
        async with asyncio.timeout(30):
            with models.events.subscribe(after=0) as events:
                while not models.ready:
                    await anext(events)
        yield models
    assert all(ledger.held == 0 for ledger in models._models.ledgers.values())


async def ask(models, lease=None):
    x = Tensor.of("x", np.zeros((2,), np.float32))
    lease = lease or models.lease("m")
    with lease as gen:
        response = await models.infer(gen, InferRequest([x]))
    return [int(v) for v in response.outputs[0].array()]


@pytest.mark.parametrize("host", ["process", "inline"])
async def test_it_sleeps_by_call_and_wakes_with_all_that_it_knew(root, host):
    async with serving(root, default_host=host) as models:
        assert (await ask(models))[0] == 1
        _, pid = await ask(models)
        report = await models.sleep("m")
        assert (report.generations, report.unloaded, report.why) == (1, 0, "")
        status = models.status("m")
        assert status.asleep and status.state == "unloaded" and not status.wanted
        with pytest.raises(ModelNotReadyError, match="sleeps; wake it"):
            models.lease("m").begin()
        assert (await models.sleep("m")).generations == 1  # again: it sleeps already
        found = await models.wake("m")
        assert found.woken and not found.already and found.versions == (1,)
        assert await ask(models) == [3, pid] and not models.status("m").asleep
        assert not (await models.wake("m")).woken  # it is awake


async def test_what_was_put_to_sleep_is_not_loaded_at_the_next_start(root):
    async with serving(root) as models:
        await models.sleep("m")
    async with serving(root) as models:
        status = models.status("m")
        assert status.state == "unloaded" and not status.asleep and not status.wanted
        assert not models.loads_on_request("m")
        assert not (await models.wake("m")).woken
    async with serving(root) as models:
        assert models.status("m").state == "loaded"


async def test_who_cannot_sleep_is_refused_and_serves_on(root):
    async with serving(root) as models:
        with pytest.raises(ConflictError, match="cannot sleep, and serves on: backend 'python'"):
            await models.sleep("owl")
        assert models.status("owl").state == "loaded" and models.status("owl").wanted
        with pytest.raises(ModelNotFoundError):
            await models.sleep("nobody")
        await models.unload("owl")
        with pytest.raises(ConflictError, match="not loaded, so there is nothing to put to sleep"):
            await models.sleep("owl")


@pytest.mark.parametrize("tier", [0, 1000])
async def test_a_tier_that_is_too_small_refuses_with_numbers_and_nothing_has_changed(root, tier):
    (root / "m" / "config.yaml").write_text("memory: 10MiB\n")
    async with serving(root, host_tier=tier) as models:
        (gen,) = models.status("m").generations
        gen.measured = {"cpu": {"weights": 2000}}
        with pytest.raises(NoRoomError, match="--host-tier") as refused:
            await models.sleep("m")
        assert (refused.value.device, refused.value.needed) == (HOST, 2000)
        assert models.status("m").state == "loaded" and models.status("m").wanted


async def test_whoever_says_something_else_overtakes_the_sleep(root):
    async with serving(root) as models:
        lease = models.lease("m")
        lease.begin()
        going = asyncio.create_task(models.sleep("m"))
        await asyncio.sleep(0)
        unloading = asyncio.create_task(models.unload("m"))
        await asyncio.sleep(0)
        lease.end()
        with pytest.raises(SupersededError, match="overtaken"):
            await going
        assert (await unloading).generations == 1 and models.status("m").state == "unloaded"


async def test_idle_it_falls_asleep_by_itself_and_a_request_wakes_it(root):
    (root / "m" / "config.yaml").write_text("memory: 10MiB\nsleep_s: 0.2\n")
    async with serving(root) as models, asyncio.timeout(20):
        with models.events.subscribe(after=0) as events:
            while (await anext(events)).kind != "model.asleep":
                pass
        assert models.loads_on_request("m") and not models.on_demand
        leases = []
        await models.demand("m", None, leases.append)
        assert leases[0].generation.woken
        leases[0].end()


async def test_a_worker_that_is_killed_asleep_leaves_nothing_and_the_model_loads_again(root):
    async with serving(root) as models, asyncio.timeout(20):
        _, pid = await ask(models)
        await models.sleep("m")
        (gen,) = [g for g in models.status("m").generations if g.state is State.ASLEEP]
        os.kill(pid, signal.SIGKILL)
        await gen.ended.wait()
        assert models.status("m").last_error is None
        assert not (await models.load("m")).woken
        assert (await ask(models))[0] == 1
