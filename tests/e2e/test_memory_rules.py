"""The rules of memory, each by its name, on a real server: a device of 1 GiB, models of 300 MiB.

One server for all of these tests; each begins with an empty device. The sizes are those that configs
declare: `test_memory_bytes` has models of real ones. Tiers and reloads are in `test_memory_tiers`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import pairwise

import pytest

from repository.lifecycle import worth
from tests.e2e.rooms import DEVICE, EXPLICIT, GOOD, MIB, Ground, add, ground_in
from tests.e2e.server import open_gate, reached

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    """a..d are alike."""
    home = tmp_path_factory.mktemp("rules")
    repo = home / "models"
    for name in "abcd":
        add(repo, name)
    add(repo, "small", 100)
    add(repo, "large", 800)
    add(repo, "huge", 2000)
    add(repo, "dear", more="priority: 1")
    add(repo, "slow", load="hold('slow')")
    add(repo, "fills", 600, load="hold('fills')")
    add(repo, "busy", infer="hold('busy')")
    add(repo, "brief", more="ttl_s: 0.2")
    with ground_in(home, *EXPLICIT, *DEVICE, "--room-wait", "30", "--min-residency", "0") as found:
        yield found


# what a load would do ---------------------------------------------------------------------------


async def test_a_dry_run_tells_who_leaves_and_then_exactly_that_happens(ground: Ground) -> None:
    async with ground.room() as room:
        await room.load("a", "b", "c")
        assert await room.value("a") == 1.0  # so b is the longest unused
        would = await room.foretold("d")
        assert would["would_load"] and would["would_evict"] == ["b"] and not would["would_replace"]
        assert (would["bytes_needed"], would["bytes_free"]) == (300 * MIB, 124 * MIB)
        assert (would["device"], would["devices"]) == ("cpu", ["cpu"])
        assert would["needs"] == {"cpu": 300 * MIB} and would["source"] == "config"
        before = await room.books()
        await room.load("d")
        after = await room.books()
        assert room.evicted() == [("b", "memory")]
        assert after == before | {"b": ("unloaded", 0), "d": ("loaded", 300 * MIB)}
        assert (await room.reserved())["cpu"] == 900 * MIB


async def test_a_dry_run_of_what_fits_or_is_loaded_costs_nobody_anything(ground: Ground) -> None:
    async with ground.room() as room:
        would = await room.foretold("a")
        assert would["would_load"] and would["would_evict"] == []
        assert not (would["would_wait"] or would["would_wake"] or would["would_replace"])
        await room.load("a")
        again = await room.foretold("a")
        assert not again["would_load"] and again["bytes_needed"] == 0


async def test_what_can_never_fit_is_507_with_the_numbers_and_nobody_leaves(ground: Ground) -> None:
    async with ground.room() as room:
        await room.load("a", "b")
        would = await room.foretold("huge")
        assert not would["would_load"] and would["would_evict"] == []
        got = await room.ask("load", "huge")
        error = got.json()["error"]
        assert got.status_code == 507 and error["code"] == "no_room"
        assert (error["needed"], error["free"], error["device"]) == (
            2000 * MIB,
            424 * MIB,
            "cpu",
        )
        assert sorted(error["residents"].values()) == [300 * MIB] * 2
        assert error["asleep"] == {} and error["foreign"] == 0 and error["pinned"] == []
        assert error["message"] == would["message"] == got.json()["detail"]
        assert await room.loaded() == {"a", "b"} and room.evicted() == []


# who leaves -------------------------------------------------------------------------------------


async def test_all_or_nothing_nobody_leaves_where_all_together_would_not_be_enough(
    ground: Ground,
) -> None:
    async with ground.room() as room:
        await room.load("a", "b", "c")
        assert (await room.done("pin", "a"))["honoured"]
        got = await room.ask("load", "large")  # b and c would make 724 MiB
        assert got.status_code == 507
        assert [name.split(":")[0] for name in got.json()["error"]["pinned"]] == ["a"]
        assert await room.loaded() == {"a", "b", "c"} and room.evicted() == []
        await room.done("pin", "a", pinned=False)
        await room.load("large")
        assert await room.loaded() == {"large"}
        assert sorted(room.evicted()) == [(name, "memory") for name in "abc"]


async def test_nobody_leaves_whose_room_the_others_make_needless(ground: Ground) -> None:
    async with ground.room() as room:
        await room.load("small", "a", "b", "c")
        await room.load("d")  # small is the longest unused, and one of the large ones is enough
        assert len(room.evicted()) == 1 and "small" in await room.loaded()


async def test_low_priority_leaves_before_high_whoever_was_used_last(ground: Ground) -> None:
    async with ground.room() as room:
        await room.load("dear", "a", "b")
        for name in ("a", "b"):
            assert await room.value(name) == 1.0
        assert (await room.foretold("c"))["would_evict"] == ["a"]
        await room.load("c")
        assert room.evicted() == [("a", "memory")] and "dear" in await room.loaded()


async def test_what_is_dear_to_bring_back_for_its_bytes_stays(ground: Ground) -> None:
    async with ground.room() as room:
        slowly = asyncio.create_task(room.load("slow"))
        await reached(ground.gates, "slow")
        clock = asyncio.get_running_loop().time
        dear = clock() + 1.5 * worth.LEAST_S  # quicker ones are all alike
        while clock() < dear:
            await room.load("a", "b")
            await room.done("unload", "a")
            await room.done("unload", "b")
        open_gate(ground.gates, "slow")
        await slowly
        await room.load("a", "b")
        for name in ("slow", "a", "b"):
            assert await room.value(name) == 1.0
        assert (await room.foretold("c"))["would_evict"] == ["a"]
        await room.load("c")
        assert await room.loaded() == {"slow", "b", "c"}


async def test_a_model_whose_time_is_over_leaves_but_not_where_it_is_pinned(
    ground: Ground,
) -> None:
    async with ground.room() as room:
        await room.load("brief")
        over = await room.told.until(lambda e: e.kind == "model.evicted")
        assert (over.model, over.data["reason"]) == ("brief", "idle_ttl")
        await room.told.ended(over.generation)
        assert (await room.done("pin", "brief"))["why"]  # it is not loaded; it is pinned once it is
        await room.load("brief", "a", "b")
        await room.load("c")  # by now its time is over, and others leave
        page = await room.page_with("brief", lambda page: page["pinned"])
        assert page["state"] == "loaded" and page["pin_refused"] is None
        assert [model for model, _ in room.evicted()] == ["brief", "a"]
        await room.done("pin", "brief", pinned=False)
        await room.told.until(lambda e: e.kind == "model.evicted" and e.model == "brief", over.id)


async def test_a_load_by_call_does_not_wait_until_anothers_load_is_paid_back(
    ground: Ground,
) -> None:
    async with ground.room() as room:
        loading = asyncio.create_task(room.load("fills"))
        await reached(ground.gates, "fills")
        for _ in range(3):
            await room.load("a")
            await room.done("unload", "a")
        open_gate(ground.gates, "fills")
        await loading
        would = await room.foretold("large")
        assert would["would_load"] and not would["would_wait"]
        assert would["would_evict"] == ["fills"]
        await room.load("large")
        told = [await room.step("fills", state) for state in ("loading", "ready", "draining")]
        loads, serves = (b.at - a.at for a, b in pairwise(told))
        assert serves < loads
        assert room.evicted() == [("fills", "memory")]


# who waits --------------------------------------------------------------------------------------


async def test_a_busy_model_stays_and_what_waits_for_it_is_not_overtaken(ground: Ground) -> None:
    async with ground.room() as room:
        await room.load("busy")
        asked = asyncio.create_task(room.client.post("/v2/models/busy/infer", json=GOOD))
        await reached(ground.gates, "busy")
        would = await room.foretold("large")
        assert would["would_load"] and would["would_wait"] and would["would_evict"] == []
        large = asyncio.create_task(room.load("large"))
        await room.step("large", "queued")
        small = asyncio.create_task(room.load("small"))  # there would be room for it at once
        await room.step("small", "queued")
        assert await room.loaded() == {"busy"} and room.states("small") == ["queued"]
        assert (await room.reserved())["cpu"] == 300 * MIB
        open_gate(ground.gates, "busy")
        assert (await asked).status_code == 200
        await large
        await small
        first, second = await room.step("large", "loading"), await room.step("small", "loading")
        assert first.id < second.id
        assert room.evicted() == [("busy", "memory")]
        assert await room.loaded() == {"large", "small"}


async def test_who_waits_too_long_is_507_with_the_numbers(ground: Ground) -> None:
    home = ground.repo.parent / "impatient"
    add(home / "models", "rests", infer="hold('rests')")
    add(home / "models", "large", 800)
    with ground_in(home, *EXPLICIT, *DEVICE, "--room-wait", "0.3") as hasty:
        async with hasty.room() as room:
            await room.load("rests")
            asked = asyncio.create_task(room.client.post("/v2/models/rests/infer", json=GOOD))
            await reached(hasty.gates, "rests")
            got = await room.ask("load", "large")
            error = got.json()["error"]
            assert got.status_code == 507 and error["code"] == "no_room"
            assert (error["needed"], error["free"]) == (800 * MIB, 724 * MIB)
            assert list(error["residents"].values()) == [300 * MIB]
            queued, failed = await room.step("large", "queued"), await room.step("large", "failed")
            assert 0.25 < failed.at - queued.at < 5
            open_gate(hasty.gates, "rests")
            assert (await asked).status_code == 200
            await room.load("large")  # asked again, there is room
            assert await room.loaded() == {"large"}


# pins -------------------------------------------------------------------------------------------


async def test_pins_hold_up_to_the_operators_cap_and_outlive_the_server(ground: Ground) -> None:
    home = ground.repo.parent / "capped"
    for name in "abcd":
        add(home / "models", name)
    flags = (*EXPLICIT, *DEVICE, "--pin-cap", "0.5")
    with ground_in(home, *flags) as capped:
        async with capped.room() as room:
            await room.load("a", "b", "c")
            assert (await room.done("pin", "a"))["honoured"]
            refused = await room.done("pin", "b")  # 600 MiB of 512
            assert refused["pinned"] and not refused["honoured"] and "--pin-cap" in refused["why"]
            a, b = await room.page("a"), await room.page("b")
            assert a["pinned"] and not b["pinned"] and "--pin-cap" in b["pin_refused"]
            assert (await room.status())["pinned"] == ["a"]
            assert await room.value("c") == 1.0
            await room.load("d")
            assert room.evicted() == [("b", "memory")]
    with ground_in(home, *flags) as again:
        async with again.room(empty=False) as room:
            assert (await room.client.post("/v1/models/unload-all")).status_code == 200
            await room.load("a", "c", "d")
            assert (await room.page("a"))["pinned"]
            await room.load("b")
            assert room.evicted() == [("c", "memory")]
            assert (await room.done("pin", "a", pinned=False))["pinned"] is False
            await room.load("c")
            assert room.evicted()[1:] == [("a", "memory")]
