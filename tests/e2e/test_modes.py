"""Who decides what is loaded: the mode, the watcher and the API, alone and all at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from tests import models
from tests.e2e.changes import Told, answer, shell, shown, status_of, told_by
from tests.e2e.server import add_model, open_gate, reached, serving

pytestmark = pytest.mark.e2e


class Depot(NamedTuple):
    told: Told
    client: httpx.AsyncClient

    async def load(self, model: str, **more: bool) -> httpx.Response:
        return await self.client.post("/v1/models/load", json={"model_name": model, **more})

    async def unload(self, model: str) -> httpx.Response:
        return await self.client.post("/v1/models/unload", json={"model_name": model})

    async def loaded(self) -> list[str]:
        found: list[str] = (await self.client.get("/v1/models/status")).json()["loaded"]
        return found

    async def changed(self, model: str, after: int) -> None:
        """The watcher has seen it and believes it; `after` is an event's id."""
        await self.told.until(
            lambda e: e.model == model and e.kind in ("model.changed", "model.added"), after
        )

    def begun(self, model: str) -> int:
        """How many generations there have been."""
        return len(self.told.generations(model))


@asynccontextmanager
async def depot(repo: Path, *flags: str) -> AsyncIterator[Depot]:
    """Ready: what was wanted at the start has been loaded."""
    async with (
        serving(repo, "--settle", "0.2", *flags) as server,
        server.client() as client,
        told_by(server) as told,
    ):
        await told.until(lambda event: event.kind == "server.ready")
        yield Depot(told, client)


def add(repo: Path, name: str, value: float = 1, version: int = 1, config: str = "") -> None:
    models.add_onnx(repo / name / str(version) / "model.onnx", value)
    if config:
        (repo / name / "config.yaml").write_text(config)


# calls -------------------------------------------------------------------------------------------


async def test_loads_of_one_model_at_once_are_one_load_and_a_loaded_one_stays(
    repo: Path, gates: Path
) -> None:
    add_model(repo, gates, "m", load="load")
    async with depot(repo, "--model-control-mode=explicit") as d:
        assert await d.loaded() == []
        calls = [asyncio.create_task(d.load("m")), asyncio.create_task(d.load("m"))]
        await reached(gates, "load")
        calls.append(asyncio.create_task(d.load("m")))
        calls.append(asyncio.create_task(d.load("m", force_reload=True)))
        await asyncio.gather(*(d.load("m", dry_run=True) for _ in range(2)))
        open_gate(gates, "load")
        assert [found.status_code for found in await asyncio.gather(*calls)] == [200] * 4
        assert (await d.load("m")).status_code == 200
        assert d.begun("m") == 1


async def test_loads_of_one_model_at_once_fail_together_and_say_why(
    repo: Path, gates: Path
) -> None:
    add_model(repo, gates, "m", load="load")
    source = (repo / "m" / "model.py").read_text()
    (repo / "m" / "model.py").write_text(
        source.replace("hold('load')", "hold('load'); raise ValueError('no weights today')")
    )
    async with depot(repo, "--model-control-mode=explicit") as d:
        calls = [asyncio.create_task(d.load("m")), asyncio.create_task(d.load("m"))]
        await reached(gates, "load")
        calls.append(asyncio.create_task(d.load("m")))
        await d.load("m", dry_run=True)
        open_gate(gates, "load")
        for found in await asyncio.gather(*calls):
            assert found.status_code == 500 and "no weights today" in found.text
        assert d.begun("m") == 1
        assert (await d.load("m")).status_code == 500
        assert d.begun("m") == 2, "asked again, it is tried again"


async def test_a_forced_reload_makes_a_new_generation_of_unchanged_files(repo: Path) -> None:
    add(repo, "m")
    async with depot(repo) as d:
        assert (await d.load("m")).status_code == 200
        assert d.begun("m") == 1
        assert (await d.load("m", force_reload=True)).status_code == 200
        assert await answer(d.client, "m") == 1
        await d.told.ended(1)
        assert d.told.generations("m") == [1, 2]


async def test_a_load_right_after_a_change_serves_what_was_changed(repo: Path) -> None:
    """It waits for the settle time by itself: nobody gets the old model for the new order."""
    add(repo, "m", 1)
    async with depot(repo, "--watch=off") as d:
        for value in (2, 3):
            add(repo, "m", value)
            assert (await d.load("m")).status_code == 200
            assert await answer(d.client, "m") == value
        add(repo, "new", 5)
        assert (await d.load("new")).status_code == 200
        assert await answer(d.client, "new") == 5
        assert (await d.load("absent")).status_code == 404


async def test_two_versions_serve_side_by_side_and_the_higher_one_by_default(repo: Path) -> None:
    add(repo, "m", 1, version=1, config="version_policy: all\n")
    add(repo, "m", 2, version=2)
    async with depot(repo) as d:
        assert await answer(d.client, "m") == 2
        assert await answer(d.client, "m", 1) == 1
        assert await answer(d.client, "m", 2) == 2
        found = await shown(d.client, "m")
        assert found["serving_version"] == 2 and found["versions"] == [1, 2]
        metadata = (await d.client.get("/v2/models/m")).json()
        assert metadata["versions"] == ["1", "2"]


async def test_an_alias_is_as_good_as_the_name(repo: Path) -> None:
    add(repo, "m", 1, config="aliases: [best]\n")
    async with depot(repo) as d:
        assert await answer(d.client, "best") == 1
        assert (await shown(d.client, "best"))["name"] == "m"
        assert (await d.unload("best")).status_code == 200
        assert await d.loaded() == [] and await status_of(d.client, "m") != 200
        assert (await d.load("best")).status_code == 200
        assert await answer(d.client, "m") == 1

        # It moves to another model without a moment in which it stands for none.
        add(repo, "n", 7, config="aliases: [other]\n")
        last = (await d.told.ready("n")).generation
        swap = "printf 'aliases: [best]' > n/config.yaml; printf 'aliases: [other]' > m/config.yaml"
        await shell(swap, repo)
        await d.told.ready("n", after=last)
        assert await answer(d.client, "best") == 7


# modes -------------------------------------------------------------------------------------------


async def test_explicit_mode_loads_what_is_named_and_follows_only_that(repo: Path) -> None:
    for name in ("a", "b", "c"):
        add(repo, name, 1)
    flags = ("--model-control-mode=explicit", "--load-model", "a", "--load-model", "b")
    async with depot(repo, *flags, "--load-model", "later") as d:
        assert await d.loaded() == ["a", "b"]
        assert await status_of(d.client, "c") != 200

        seen = d.told.events[-1].id
        for name in ("a", "c", "later", "stranger"):
            add(repo, name, 2)
        await d.told.ready("a", after=max(d.told.generations("a")))
        await d.told.ready("later")  # named at the start, and here at last
        await d.changed("c", seen)
        await d.changed("stranger", seen)
        assert (await answer(d.client, "a"), await answer(d.client, "b")) == (2, 1)
        assert d.begun("b") == 1 and d.begun("c") == 0 and d.begun("stranger") == 0

        assert (await d.load("c")).status_code == 200
        assert await answer(d.client, "c") == 2
        add(repo, "c", 3)
        await d.told.ready("c", after=max(d.told.generations("c")))
        assert await answer(d.client, "c") == 3, "once wanted, it is followed"


async def test_explicit_mode_with_a_star_loads_everything(repo: Path) -> None:
    add(repo, "a")
    add(repo, "org/b")
    async with depot(repo, "--model-control-mode=explicit", "--load-model", "*") as d:
        assert await d.loaded() == ["a", "org/b"]


@pytest.mark.parametrize(
    "flags",
    [
        ("--model-control-mode=none",),
        ("--model-control-mode=poll", "--watch=off"),
        ("--model-control-mode=explicit", "--watch=off", "--load-model", "m"),
    ],
    ids=" ".join,
)
async def test_without_a_watcher_a_model_stays_as_it_is_until_somebody_asks_for_it(
    repo: Path, flags: tuple[str, ...]
) -> None:
    add(repo, "m", 1)
    async with depot(repo, *flags) as d:
        add(repo, "m", 2)
        add(repo, "new", 3)
        assert (await d.load("new")).status_code == 200
        assert await answer(d.client, "new") == 3
        assert (await d.load("m", dry_run=True)).json()["would_load"] is True
        assert await answer(d.client, "m") == 1 and d.begun("m") == 1
        assert (await d.load("m")).status_code == 200
        assert await answer(d.client, "m") == 2


async def test_poll_mode_loads_everything_and_whatever_comes(repo: Path) -> None:
    add(repo, "a")
    async with depot(repo, "--model-control-mode=poll") as d:
        assert await d.loaded() == ["a"]
        add(repo, "b", 2)
        await d.told.ready("b")
        assert await answer(d.client, "b") == 2


# both at once ------------------------------------------------------------------------------------


@pytest.mark.parametrize("watch", ["notify", "poll"])
async def test_what_was_unloaded_by_hand_stays_so_until_it_is_loaded_by_hand(
    repo: Path, watch: str
) -> None:
    add(repo, "m", 1)
    async with depot(repo, "--watch", watch, "--poll-secs=0.1") as d:
        assert (await d.unload("m")).status_code == 200
        assert await d.loaded() == [] and await status_of(d.client, "m") != 200
        for value in (2, 3):
            seen = d.told.events[-1].id
            add(repo, "m", value)
            await d.changed("m", seen)
        assert await d.loaded() == [] and d.begun("m") == 1
        assert (await d.unload("m")).status_code == 200, "unloading what is unloaded is no error"

        assert (await d.load("m")).status_code == 200
        assert await answer(d.client, "m") == 3
        last = d.told.generations("m")[-1]
        add(repo, "m", 4)
        await d.told.ready("m", after=last)
        assert await answer(d.client, "m") == 4, "loaded by hand, it is followed again"

        # Its folder goes and comes: what was said of the old one does not hold for the new one.
        assert (await d.unload("m")).status_code == 200
        await shell("rm -r m", repo)
        await d.told.removed("m")
        last = d.told.generations("m")[-1]
        add(repo, "m", 5)
        await d.told.ready("m", after=last)
        assert await answer(d.client, "m") == 5


async def test_the_watcher_and_calls_that_meet_on_one_model_agree_in_the_end(repo: Path) -> None:
    """Files change while loads, forced loads and unloads are under way; the last word is a load."""
    add(repo, "m", 0)
    async with depot(repo) as d:
        for value in range(1, 6):
            add(repo, "m", value)
            answers = await asyncio.gather(
                d.load("m"), d.load("m", force_reload=True), d.unload("m"), d.load("m")
            )
            # Overtaken is an answer; hanging, or a fault of the server's, is none.
            assert {found.status_code for found in answers} <= {200, 409}, answers
            assert (await d.load("m")).status_code == 200
            assert await answer(d.client, "m") == value
        assert d.told.failures() == []
