"""Pinning by call: it holds at once, over a restart, and within what the operator allows."""

from __future__ import annotations

import asyncio
import shutil
from contextlib import asynccontextmanager

import pytest

from repository.errors import DrainingError, ModelNotFoundError, NoRoomError, NotKeptError
from repository.reports import PinReport
from repository.repository import Options, Repository
from repository.statefile import StateFile
from tests.models import python_model

pytestmark = pytest.mark.timeout(60)

DOUBLES = """
    class Model:
        inputs = [("x", "FP32", (2,))]
        outputs = [("y", "FP32", (2,))]
        def infer(self, inputs):
            return {"y": inputs["x"] * 2}
"""
MIB = 1 << 20


@pytest.fixture
def root(tmp_path):
    path = tmp_path / "models"
    for name in "ab":
        python_model(path / name / "1", DOUBLES)
        (path / name / "config.yaml").write_text("memory: 300MiB\n")
    return path


@asynccontextmanager
async def serving(root, **options):
    options = {
        "mode": "explicit",
        "settle_s": 0.0,
        "default_host": "inline",
        "watch": "off",
    } | options
    options.setdefault("memory_budget", {"cpu": 500 * MIB})
    state = root.parent / "state"
    models = Repository(Options(root, trust_code=True, state_dir=state, room_wait_s=0.2, **options))
    async with models.running():
        async with asyncio.timeout(20):
            with models.events.subscribe(after=0) as events:
                while not models.ready:
                    await anext(events)
        yield models


def pinned(models, name):
    return [g.pinned for g in models.status(name).generations if not g.ended.is_set()]


async def test_a_pinned_model_keeps_its_memory_until_it_is_unpinned(root):
    async with serving(root) as models:
        await models.load("a")
        assert await models.pin("a", True) == PinReport("a", pinned=True, honoured=True)
        with pytest.raises(NoRoomError) as refused:
            await models.load("b")
        assert refused.value.pinned == ["a:1#1"] and pinned(models, "a") == [True]
        assert await models.pin("a", False) == PinReport("a", pinned=False, honoured=True)
        await asyncio.sleep(0.5)  # its turn
        await models.load("b")
        assert models.status("a").state == "unloaded"


async def test_a_pin_outlasts_a_restart_and_wins_over_the_config(root):
    (root / "b" / "config.yaml").write_text("memory: 100MiB\npin: true\n")
    async with serving(root) as models:
        assert await models.pin("a", True) == PinReport(
            "a", True, True, "it is not loaded; it will be pinned once it is"
        )
        await models.pin("b", False)
    async with serving(root) as models:
        for name in "ab":
            await models.load(name)
        assert (pinned(models, "a"), pinned(models, "b")) == ([True], [False])
    async with serving(root, forget=True) as models:
        for name in "ab":
            await models.load(name)
        assert (pinned(models, "a"), pinned(models, "b")) == ([False], [True])


async def test_a_pin_goes_with_the_folder_of_its_model(root):
    async with serving(root) as models:
        await models.load("a")
        await models.pin("a", True)
        shutil.move(root / "a", root.parent / "a")
        with pytest.raises(ModelNotFoundError):
            await models.load("a")
        shutil.move(root.parent / "a", root / "a")
        await models.load("a")
        assert pinned(models, "a")[:1] == [False]


async def test_a_pin_beyond_the_cap_is_refused_and_says_why(root):
    async with serving(root, pin_cap={"": 0.5}) as models:
        await models.load("a")
        report = await models.pin("a", True)
        assert report.pinned and not report.honoured and pinned(models, "a") == [False]
        assert "pinned models may hold 250MiB of cpu (--pin-cap)" in report.why


async def test_who_pins_is_told_what_is_not_there_and_what_is_not_kept(root, monkeypatch):
    async with serving(root) as models:
        with pytest.raises(ModelNotFoundError):
            await models.pin("none", True)

        def full(self, facts):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(StateFile, "write", full)
            with pytest.raises(NotKeptError, match="'a' is pinned, but a restart may not know"):
                await models.pin("a", True)
        assert models._models.pins.wants(models._models.folders["a"].specs[1])
        models.drain()
        with pytest.raises(DrainingError):
            await models.pin("a", True)


async def test_the_host_tier_is_a_ledger_beside_the_devices(root):
    async with serving(root, host_tier=64 * MIB) as models:
        tier = {d.device: d for d in models.devices()}["host"]
        assert (tier.budget, tier.reserved) == (64 * MIB, 0)
