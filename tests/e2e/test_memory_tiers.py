"""Models that sleep, wake, and are replaced where there is no room for two: on a real server with a
device of 1 GiB and a host tier of 700 MiB, each rule by its name.

What sleeps here says of itself that it can; the bytes are declared. Real ones: `test_memory_bytes`.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cli import run
from tests.e2e.rooms import DEVICE, EXPLICIT, GOOD, MIB, Ground, Room, add, ground_in, put
from tests.e2e.server import gone, open_gate, reached

pytestmark = pytest.mark.e2e

SIZE, TIER = 300 * MIB, 700 * MIB
ROUTES = ("/v2/models/{}/infer", "/v2//models/{}/infer")  # by the protocol, and over ASGI
FLAGS = (*EXPLICIT, *DEVICE, "--min-residency", "0", "--host-tier", str(TIER))


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    """s..v sleep when others need their room; `plain` cannot."""
    home = tmp_path_factory.mktemp("tiers")
    repo = home / "models"
    for name in "stuv":
        add(repo, name, more="evict_to: host", sleeps=True)
    add(repo, "plain")
    add(repo, "dozes", more="sleep_s: 0.2", sleeps=True)
    add(repo, "wide", 800, sleeps=True)
    add(repo, "whole", 1024)
    add(repo, "asked", infer="hold('asked')", sleeps=True)
    for name in ("torn", "turned", "still", "straight"):
        add(repo, name, 600, f"reload: {RELOADS.get(name, 'auto')}", sleeps=name != "straight")
    with ground_in(home, *FLAGS) as found:
        yield found


RELOADS = {"still": "overlap", "straight": "replace"}


async def status_of(room: Room, path: str, model: str) -> int:
    return (await room.client.post(path.format(model), json=GOOD)).status_code


# by call ----------------------------------------------------------------------------------------


async def test_a_model_sleeps_by_call_until_it_is_woken_by_call(ground: Ground) -> None:
    async with ground.room() as room:
        await room.load("s")
        before, worker = await room.reserved(), room.worker("s")
        page = await room.page("s")
        assert page["can_sleep"] is True and page["asleep"] is False
        slept = await room.done("sleep", "s")
        assert slept["asleep"] and slept["generations"] == 1 and slept["unloaded"] == 0
        after = await room.reserved()
        assert slept["freed"] == {"cpu": before["cpu"] - after["cpu"]}
        assert slept["freed_bytes"] > 0.8 * SIZE and slept["host_bytes"] == after["host"] > 0
        page = await room.page("s")
        assert (page["state"], page["asleep"]) == ("unloaded", True)
        assert page["memory"]["devices"]["host"]["reserved"] == after["host"]
        assert await room.asleep() == {"s"} and await room.loaded() == set()
        for route in ROUTES:  # nobody has asked that requests wake what somebody put to sleep
            assert await status_of(room, route, "s") in (404, 503)
        assert (await room.done("sleep", "s"))["freed_bytes"] == 0
        assert (await room.foretold("s"))["would_wake"]

        woken = await room.done("wake", "s")
        assert woken["woken"] and not woken["already"] and woken["versions"] == [1]
        assert woken["reserved"] == {"cpu": SIZE}
        assert (await room.done("wake", "s"))["already"]
        assert room.worker("s") == worker and await room.value("s") == 1.0
        assert await room.reserved() == {"cpu": SIZE, "host": 0}
        assert "model.woken" in room.told.kinds("s") and "model.asleep" in room.told.kinds("s")


async def test_a_load_wakes_and_an_unload_ends_what_sleeps(ground: Ground) -> None:
    async with ground.room() as room:
        await room.load("s", "t")
        for name in "st":
            await room.done("sleep", name)
        worker = room.worker("t")
        await room.load("s")
        assert await room.loaded() == {"s"}
        ended = await room.done("unload", "t")
        assert ended["freed_bytes"] > 0 and ended["leaked_bytes"] == 0 and ended["confirmed"]
        assert gone([worker]) and await room.asleep() == set()
        assert await room.reserved() == {"cpu": SIZE, "host": 0}


async def test_what_cannot_sleep_or_does_not_run_is_told_so_and_serves_on(ground: Ground) -> None:
    async with ground.room() as room:
        await room.load("plain", "s")
        assert (await room.page("plain"))["can_sleep"] is False
        for name, word in (("plain", "cannot"), ("t", "not loaded")):
            got = await room.ask("sleep", name)
            assert got.status_code == 409 and word in got.json()["detail"], got.text
        assert await room.loaded() == {"plain", "s"}


async def test_what_the_host_tier_could_never_hold_is_507_and_serves_on(ground: Ground) -> None:
    async with ground.room() as room:
        await room.load("wide")
        got = await room.ask("sleep", "wide")
        error = got.json()["error"]
        assert got.status_code == 507 and error["device"] == "host"
        assert error["needed"] == 800 * MIB and "--host-tier" in error["message"]
        assert await room.value("wide") == 1.0


async def test_a_model_answers_what_it_has_before_it_sleeps(ground: Ground) -> None:
    async with ground.room() as room:
        await room.load("asked")
        asking = asyncio.create_task(room.client.post("/v2/models/asked/infer", json=GOOD))
        await reached(ground.gates, "asked")
        sleeping = asyncio.create_task(room.done("sleep", "asked"))
        await room.step("asked", "draining")
        assert not sleeping.done()
        open_gate(ground.gates, "asked")
        assert (await asking).status_code == 200
        assert (await sleeping)["asleep"]


# by policy --------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES)
async def test_an_idle_model_sleeps_by_itself_and_a_request_wakes_it(
    ground: Ground, route: str
) -> None:
    async with ground.room() as room:
        await room.load("dozes")
        worker = room.worker("dozes")
        slept = await room.step("dozes", "asleep")
        assert [m for m, _ in room.evicted()] == [] and await room.asleep() == {"dozes"}
        statuses = await asyncio.gather(*[status_of(room, route, "dozes") for _ in range(8)])
        assert statuses == [200] * 8 and room.worker("dozes") == worker
        again = await room.told.until(lambda e: e.data.get("state") == "asleep", slept.id)
        assert again.generation > slept.generation


async def test_who_makes_room_sleeps_and_a_request_brings_it_back(ground: Ground) -> None:
    async with ground.room() as room:
        await room.load("s", "t", "v")
        worker = room.worker("s")
        would = await room.foretold("u")
        assert would["would_evict"] == ["s"]
        await room.load("u")
        assert await room.asleep() == {"s"} and await room.loaded() == {"t", "u", "v"}
        (event,) = [e for e in room.told.events if e.kind == "model.evicted"]
        assert (event.model, event.data["reason"], event.data["to"]) == ("s", "memory", "asleep")
        assert await room.value("s") == 1.0 and room.worker("s") == worker
        assert "s" in await room.loaded()


async def test_the_host_tier_is_bounded_and_the_longest_asleep_make_way(ground: Ground) -> None:
    async with ground.room() as room:
        await room.load("s", "t")
        for name in "st":
            await room.done("sleep", name)
        assert await room.asleep() == {"s", "t"}
        first = room.worker("s")
        await room.load("u")
        slept = await room.done("sleep", "u")
        assert slept["asleep"] and await room.asleep() == {"t", "u"}
        assert gone([first]) and (await room.reserved())["host"] <= TIER
        assert (await room.page("s"))["memory"]["reserved"] == 0


async def test_those_who_sleep_are_the_first_to_leave_a_device_that_is_short(
    ground: Ground,
) -> None:
    async with ground.room() as room:
        await room.load("s")
        await room.done("sleep", "s")
        assert (await room.reserved())["cpu"] > 0  # what its process still has there
        would = await room.foretold("whole")
        assert would["would_evict"] == ["s"]
        await room.load("whole")
        assert await room.loaded() == {"whole"} and await room.asleep() == set()
        assert await room.reserved() == {"cpu": 1024 * MIB, "host": 0}


# a reload that does not fit twice ---------------------------------------------------------------


async def test_a_broken_overwrite_is_seen_before_anything_leaves(ground: Ground) -> None:
    async with ground.room() as room:
        await room.load("torn")
        (serves,) = room.told.generations("torn")
        put(ground.repo / "torn" / "model.py", "class Model:\n    def infer(self:\n")
        failed = await room.told.failed("torn", after=serves)
        assert room.states("torn", serves) == ["queued", "loading", "warming", "ready"]
        page = await room.page("torn")
        assert page["state"] == "loaded" and page["last_error"] and not page["rolled_back"]
        assert await room.value("torn") == 1.0
        add(ground.repo, "torn", 600, "reload: auto", sleeps=True, value=2.0)
        await room.told.ready("torn", after=failed.generation)
        assert await room.value("torn") == 2.0
        assert (await room.page("torn"))["last_error"] is None


async def test_what_fails_after_the_old_one_left_is_rolled_back(ground: Ground) -> None:
    async with ground.room() as room:
        await room.load("turned")
        (serves,) = room.told.generations("turned")
        worker = room.worker("turned")
        broken = "raise RuntimeError('no such weights')"
        add(ground.repo, "turned", 600, "reload: auto", sleeps=True, load=broken)
        failed = await room.told.failed("turned", after=serves)
        back = await room.told.ready("turned", after=failed.generation)
        assert await room.value("turned") == 1.0 and room.worker("turned") == worker
        page = await room.page("turned")
        assert page["rolled_back"] and page["state"] == "loaded" and page["wanted"]
        assert "no such weights" in page["last_error"]["message"]
        assert room.told.generations("turned")[-1] == back.generation  # and it is not tried again
        add(ground.repo, "turned", 600, "reload: auto", sleeps=True, value=3.0)
        await room.told.ready("turned", after=back.generation)
        page = await room.page("turned")
        assert await room.value("turned") == 3.0
        assert not page["rolled_back"] and page["last_error"] is None


async def test_overlap_refuses_and_serves_on(ground: Ground) -> None:
    async with ground.room() as room:
        await room.load("still")
        (serves,) = room.told.generations("still")
        would = await room.ask("load", "still", force_reload=True)
        assert would.status_code == 507
        assert room.states("still", serves) == ["queued", "loading", "warming", "ready"]
        assert await room.value("still") == 1.0


async def test_replace_goes_straight_and_does_not_come_back(ground: Ground) -> None:
    async with ground.room() as room:
        await room.load("straight")
        (serves,) = room.told.generations("straight")
        add(ground.repo, "straight", 600, "reload: replace", load="raise RuntimeError('no')")
        await room.told.ended(serves)
        await room.told.failed("straight", after=serves)
        page = await room.page("straight")
        assert page["state"] == "failed" and not page["rolled_back"]
        add(ground.repo, "straight", 600, "reload: replace")
        await room.told.ready("straight", after=serves)


# the command ------------------------------------------------------------------------------------


async def test_the_command_shows_and_does_all_of_it(ground: Ground) -> None:
    async with ground.room() as room:

        async def command(*args: str, exit_code: int = 0) -> str:
            said = await asyncio.to_thread(run, *args, "--url", str(room.client.base_url))
            assert said.exit_code == exit_code, said.output
            return said.output

        await room.load("s", "t", "u")
        plan = await command("load", "v", "--dry-run")
        assert "needs 300MiB on cpu (as its config says)" in plan and "make room: s" in plan
        assert "sleeps with 300MiB in host memory" in await command("sleep", "s")
        assert "unloaded (asleep)" in await command("status", "s")
        assert "Model t is pinned" in await command("pin", "t")
        assert "loaded (pinned)" in await command("status")
        rows = {line.split()[0]: line for line in (await command("devices")).splitlines()}
        assert "1GiB" in rows["cpu"] and "700MiB" in rows["host"] and "300MiB" in rows["host"]
        assert "is not pinned" in await command("unpin", "t")
        assert "woken" in await command("wake", "s")
        assert "not loaded" in await command("sleep", "v", exit_code=1)
        assert "nobody" in await command("pin", "nobody", exit_code=3)


# after a death ----------------------------------------------------------------------------------


async def test_a_worker_that_is_killed_asleep_gives_all_back_and_the_model_loads_anew(
    ground: Ground,
) -> None:
    async with ground.room() as room:
        await room.load("s")
        worker = room.worker("s")
        await room.done("sleep", "s")
        worker.kill()
        await room.told.ended(room.told.generations("s")[0])
        assert await room.asleep() == set()
        assert set((await room.reserved()).values()) == {0}
        woken = await room.done("wake", "s")
        assert not woken["woken"] and await room.value("s") == 1.0


async def test_what_slept_when_the_server_was_killed_stays_away_until_somebody_asks(
    ground: Ground,
) -> None:
    home = ground.repo.parent / "killed"
    for name in "st":
        add(home / "models", name, sleeps=True)
    everything = (*DEVICE, "--host-tier", str(TIER))
    with ground_in(home, *everything) as first:
        async with first.room() as room:
            await room.load("s", "t")
            await room.done("sleep", "s")
            workers: list[Any] = [room.worker(name) for name in "st"]
            first.server.process.send_signal(signal.SIGKILL)
            assert gone(workers)
    with ground_in(home, *everything) as again:
        async with again.room(empty=False) as room:
            assert await room.loaded() == {"t"} and await room.asleep() == set()
            assert await room.reserved() == {"cpu": SIZE, "host": 0}
            woken = await room.done("wake", "s")
            assert not woken["woken"] and await room.loaded() == {"s", "t"}
