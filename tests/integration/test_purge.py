"""Unloading everything: all or, while a request runs or waits, nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from repository.errors import ConflictError, SupersededError
from repository.lifecycle.status import Public
from repository.loading import Ending
from repository.repository import Options, Repository
from tests.e2e.server import add_model, open_gate, reached


class Stumbling(Repository):
    """One model of it cannot be unloaded."""

    def _end(self, name: str) -> Ending:
        if name == "stuck":
            raise RuntimeError("the planner stumbled")
        return super()._end(name)


@asynccontextmanager
async def holding(
    home: Path, kind: type[Repository] = Repository, **options: Any
) -> AsyncIterator[Repository]:
    state = home / "state"
    root = home / "models"
    models = kind(Options(root, settle_s=0.05, state_dir=state, trust_code=True, **options))
    async with models.running():
        with models.events.subscribe(after=0) as events:
            async for event in events:
                if event.kind == "server.ready":
                    break
        yield models


@pytest.fixture
def home(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        add_model(tmp_path / "models", tmp_path, name)
    return tmp_path


def words(models: Repository) -> dict[str, Public]:
    return {s.name: s.state for s in models.statuses()}


async def test_one_lease_keeps_every_model(home: Path) -> None:
    async with holding(home) as models:
        with models.lease("a"):
            with pytest.raises(ConflictError, match=r"1 requests run or wait, of a \(1\)"):
                await models.purge(force=False)
            assert words(models) == {"a": Public.LOADED, "b": Public.LOADED}
        report = await models.purge(force=False)
        assert {r.model for r in report.unloaded} == {"a", "b"} and report.errors == {}
        assert models.devices()[0].reserved == 0


async def test_when_it_is_decided_every_model_has_been_told(home: Path) -> None:
    """A request that comes in the breath after is served to its end, or it is refused: no model is
    kept for it."""
    async with holding(home) as models:
        purging = asyncio.ensure_future(models.purge(force=False))
        await asyncio.sleep(0)  # it has run up to where it first waits
        gens = [g for status in models.statuses() for g in status.generations]
        assert [g.retire_asked.is_set() for g in gens] == [True, True]
        assert not any(status.wanted for status in models.statuses())
        assert len((await purging).unloaded) == 2


async def test_a_request_that_waits_for_its_model_keeps_them_too(home: Path) -> None:
    add_model(home / "models", home, "slow", load="slow")
    async with holding(home, mode="explicit", load=("a",), on_demand=True) as models:
        leases: list[Any] = []
        waiting = models.demand("slow", None, leases.append)
        await reached(home, "slow")
        with pytest.raises(ConflictError, match=r"slow \(1\)"):
            await models.purge(force=False)
        assert words(models)["a"] is Public.LOADED
        open_gate(home, "slow")
        await waiting
        leases[0].end()
        assert len((await models.purge(force=False)).unloaded) == 2


async def test_a_load_in_flight_is_given_up(home: Path) -> None:
    add_model(home / "models", home, "slow", load="slow")
    async with holding(home, mode="explicit") as models:
        load = asyncio.ensure_future(models.load("slow"))
        await reached(home, "slow")
        assert [r.model for r in (await models.purge(force=False)).unloaded] == ["slow"]
        with pytest.raises(SupersededError):
            await load


@pytest.mark.parametrize("force", [False, True])
async def test_one_that_cannot_be_unloaded_is_named_and_the_others_go(
    home: Path, force: bool
) -> None:
    add_model(home / "models", home, "stuck")
    async with holding(home, Stumbling) as models:
        report = await models.purge(force=force)
        assert {r.model for r in report.unloaded} == {"a", "b"}
        assert report.errors == {"stuck": "RuntimeError: the planner stumbled"}
        assert words(models)["stuck"] is Public.LOADED
