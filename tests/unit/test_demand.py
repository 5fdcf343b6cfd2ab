"""Requests that wait for models, in virtual time: one load for all, turns for models that share room,
and nobody waits for ever."""

import asyncio

import pytest

from repository.errors import (
    DrainingError,
    NoDiskError,
    NoRoomError,
    QueueFullError,
    StillLoadingError,
    VersionNotFoundError,
    WorkerDiedError,
)
from repository.lifecycle.generation import Trigger
from repository.lifecycle.plan import BACKOFF_MAX_S, REST_S
from repository.lifecycle.states import State
from repository.lifecycle.wishes import Word
from tests.fakes.demand import LOAD_S, World, big
from tests.fakes.heart import folder, load, spec, unload
from tests.fakes.host import FakeHost

pytestmark = pytest.mark.looptime


async def test_all_who_wait_for_a_model_share_one_load_and_have_their_lease_when_it_serves(
    looptime,
):
    world = World(big("a"))
    async with world.models.running():
        waits = [world.ask("a") for _ in range(20)]
        assert world.models.demand.count("a") == 20
        gen = world.models.register.of("a")[0]
        assert gen.trigger is Trigger.DEMAND
        await gen.settled.wait()
        assert gen.leases == 20 and world.loads["a"] == 1 and looptime == LOAD_S
        await asyncio.gather(*waits)
        assert not world.models.demand.models
        for wait in waits:
            wait.lease().end()
        assert gen.leases == 0


async def test_the_one_that_is_granted_is_safe_from_an_unload_in_the_same_breath():
    world = World(big("a"))
    async with world.models.running():
        wait = world.ask("a")
        gen = world.models.register.of("a")[0]
        await gen.settled.wait()
        gone = asyncio.create_task(unload(world.models, "a"))
        await wait
        await asyncio.sleep(1)
        assert gen.state is State.DRAINING and gen.leases == 1
        wait.lease().end()
        await gone


async def test_no_more_may_wait_than_said_and_the_refusal_says_when_to_come_again():
    world = World(big("a"), most=2)
    async with world.models.running():
        waits = [world.ask("a") for _ in range(2)]
        await asyncio.sleep(1.5)
        with pytest.raises(QueueFullError, match="2 requests") as refused:
            world.ask("a")
        assert refused.value.retry_after_s == 1.5  # it has taken as long until now
        await asyncio.gather(*waits)
        for wait in waits:
            wait.lease().end()


async def test_a_refusal_says_what_is_left_of_as_long_as_it_took_the_last_time():
    world = World(big("a"), most=1)
    async with world.models.running():
        await world.use("a")
        await unload(world.models, "a")
        wait = world.ask("a")
        await asyncio.sleep(0.5)
        with pytest.raises(QueueFullError) as refused:
            world.ask("a")
        assert refused.value.retry_after_s == pytest.approx(LOAD_S - 0.5)
        wait.cancel()


async def test_a_request_waits_no_longer_than_its_time_and_the_load_goes_on(looptime):
    world = World(big("a"), load_s=50, patience_s=10)
    async with world.models.running():
        with pytest.raises(StillLoadingError, match="10 s") as refused:
            await world.ask("a")
        assert looptime == 10 and refused.value.retry_after_s == 10
        await asyncio.sleep(45)
        assert world.models.routes.find("a")


async def test_who_leaves_is_out_at_once_and_what_nobody_wants_any_more_is_not_loaded():
    world = World(big("a"), big("b"))
    async with world.models.running():
        await load(world.models, "a")
        waits = [world.ask("b"), world.ask("b")]
        assert world.state("b") == ["queued"]
        waits[0].cancel()
        assert world.models.demand.count("b") == 1
        waits[1].cancel()
        assert not world.models.demand.models
        await asyncio.sleep(30)
        assert world.loads["b"] == 0 and world.state("a") == ["ready"] and not world.evicted
        assert world.models.wishes.word("b") is None


async def test_a_request_whose_time_is_over_drives_nobody_out_afterwards():
    world = World(big("a"), big("b"), patience_s=1)
    async with world.models.running():
        await load(world.models, "a")
        with pytest.raises(StillLoadingError):
            await world.ask("b")  # a has not had its turn
        await asyncio.sleep(30)
        assert world.state("a") == ["ready"] and world.loads["b"] == 0


async def test_what_waiting_cannot_change_is_said_at_once():
    specs = [big("a"), big("huge", 101), big("broken"), spec("v", 1), spec("v", 2, "f2")]
    world = World(*specs)

    def make_host(what):
        error = ValueError("bad weights") if what.model == "broken" else None
        world.loads[what.model] += 1
        return FakeHost(load_s=1, load_error=error)

    world.models.means = type(world.models.means)(
        make_host, world.models.means.rehearse, world.models.means.unchanged, lambda *_: None
    )
    async with world.models.running():
        for name, version, kind in (
            ("nobody", None, VersionNotFoundError),
            ("a", 7, VersionNotFoundError),
            ("huge", None, NoRoomError),
        ):
            with pytest.raises(kind) as said:
                world.ask(name, version)
        assert said.value.needed == 101 and not world.models.register.of("huge")
        with pytest.raises(VersionNotFoundError):
            await world.ask("broken")
        for _ in range(50):  # no storm of loads
            with pytest.raises(VersionNotFoundError):
                world.ask("broken")
        assert world.loads == {"broken": 1}


async def test_what_does_not_fit_beside_pinned_ones_is_refused_at_once_with_the_numbers():
    world = World(big("a", pin=True), big("b"))
    async with world.models.running():
        await load(world.models, "a")
        with pytest.raises(NoRoomError, match="pinned: a:1") as refused:
            world.ask("b")
        assert (refused.value.needed, refused.value.free) == (60, 40)


async def test_one_that_loads_already_is_waited_for_and_so_is_one_that_comes_again_after_a_crash():
    world = World(big("a"))
    async with world.models.running():
        first = asyncio.create_task(load(world.models, "a"))
        await asyncio.sleep(1)
        (await world.lease("a")).end()
        await first
        assert world.loads["a"] == 1
        world.hosts["a"][0].kill()
        await asyncio.sleep(0.1)
        assert world.models.routes.find("a") is None
        (await world.lease("a")).end()
        assert world.loads["a"] == 2


async def test_one_that_dies_while_it_loads_is_waited_for_until_it_is_given_up():
    world = World(big("a"))
    async with world.models.running():
        wait = world.ask("a")
        for n in range(3):
            await asyncio.sleep(1)
            assert not wait.done()
            world.hosts["a"][n].kill()
        with pytest.raises(VersionNotFoundError):
            await wait
        with pytest.raises(VersionNotFoundError):
            world.ask("a")
        assert world.loads["a"] == 3


async def test_one_that_was_given_up_gets_another_chance_when_it_has_rested():
    world = World(big("a"))
    async with world.models.running():
        world.errors["a"] = WorkerDiedError("killed by signal 9")
        with pytest.raises(VersionNotFoundError):
            await world.ask("a")
        assert world.loads["a"] == 3
        await asyncio.sleep(BACKOFF_MAX_S - 1)
        with pytest.raises(VersionNotFoundError):
            world.ask("a")
        assert world.loads["a"] == 3
        await asyncio.sleep(1)
        del world.errors["a"]
        await world.use("a")
        assert world.loads["a"] == 4


async def test_a_full_disk_is_told_at_once_and_tried_again_by_a_later_request():
    world = World(big("a"))
    async with world.models.running():
        world.errors["a"] = NoDiskError("no room for a private copy")
        for _ in range(10):  # no storm: within the pause nobody tries
            with pytest.raises(VersionNotFoundError):
                await world.lease("a")
        assert world.loads["a"] == 1
        del world.errors["a"]
        await asyncio.sleep(REST_S)
        await world.use("a")
        assert world.loads["a"] == 2


async def test_one_that_was_unloaded_by_hand_comes_back_for_a_request_and_nobody_has_wished_it():
    world = World(big("a"))
    async with world.models.running():
        await load(world.models, "a")
        await unload(world.models, "a")
        assert world.models.wishes.word("a") is Word.UNLOAD
        await world.use("a")
        assert world.models.wishes.word("a") is Word.DEMAND


async def test_nobody_waits_any_longer_once_the_server_goes_down():
    world = World(big("a"), load_s=100)
    async with world.models.running():
        wait = world.ask("a")
        world.models.demand.close()
        with pytest.raises(DrainingError):
            await wait


async def test_a_model_that_is_never_idle_gives_way_after_its_turn_and_its_requests_end_well(
    looptime,
):
    """Its turn is at least as long as its load took."""
    world = World(big("a"), big("b"), load_s=8)
    async with world.models.running():
        a = await world.use("a")  # serves from 8 on
        busy = asyncio.create_task(world.use("a", 20))
        await asyncio.sleep(1)
        waits = [asyncio.create_task(world.use("b")) for _ in range(5)]
        await asyncio.sleep(6.9)
        assert world.state("a") == ["ready"] and looptime < 16
        await asyncio.sleep(0.5)
        assert world.state("a") == ["draining"] and looptime > 16
        again = asyncio.create_task(world.use("a"))  # waits for its own next turn
        await asyncio.gather(busy, *waits)
        assert looptime == 36 and world.loads == {"a": 1, "b": 1}
        assert (await again) is not a
        assert looptime == 52  # the turn of b, and the load
        assert world.evicted == ["a", "b"]


async def test_idle_ones_leave_before_busy_ones_and_the_longest_ready_before_others():
    world = World(big("a", 50), big("b", 50), big("c", 50), big("d", 50), load_s=1)
    async with world.models.running():
        await world.use("a")
        await world.use("b")
        held = await world.lease("a")  # a is older, and busy
        await asyncio.sleep(5)
        await world.use("c")
        assert world.evicted == ["b"]
        other = await world.lease("c")
        await asyncio.sleep(5)
        wait = world.ask("d")
        await asyncio.sleep(0.1)
        assert world.evicted == ["b", "a"]
        held.end()
        await wait
        wait.lease().end()
        other.end()


async def test_nobody_leaves_where_those_who_might_do_not_suffice():
    world = World(big("a", 40), big("b", 40), big("c", 90), load_s=1)
    async with world.models.running():
        held = [await world.lease("a")]
        await asyncio.sleep(5)
        held.append(await world.lease("b"))  # has just begun its turn
        wait = world.ask("c")
        await asyncio.sleep(1.5)
        assert not world.evicted
        await asyncio.sleep(1)
        assert sorted(world.evicted) == ["a", "b"]
        for lease in held:
            lease.end()
        await wait
        wait.lease().end()


async def test_an_explicit_load_takes_idle_ones_after_their_turn_and_never_busy_ones(looptime):
    world = World(big("a"), big("b"), load_s=1, room_wait_s=5)
    async with world.models.running():
        await world.use("a")
        await asyncio.sleep(1)  # it has served as long as it took to load
        await load(world.models, "b")
        assert looptime == 3
        held = await world.lease("b")
        gen = await load(world.models, "a")
        assert isinstance(gen.error, NoRoomError) and looptime == 8
        held.end()


async def test_an_unload_by_hand_does_not_fail_those_who_wait():
    world = World(big("a"))
    async with world.models.running():
        wait = asyncio.create_task(world.use("a"))
        await asyncio.sleep(1)
        await unload(world.models, "a")
        await wait
        assert world.loads["a"] == 2


async def test_who_waits_for_a_folder_that_goes_away_is_told():
    world = World(big("a"), load_s=50)
    async with world.models.running():
        wait = world.ask("a")
        await asyncio.sleep(1)
        world.models.observe({})
        with pytest.raises(VersionNotFoundError):
            await wait
        world.models.observe({"a": folder(big("a"))})
        (await world.lease("a")).end()


async def test_what_nobody_waits_for_any_more_does_not_come_up_with_its_folder():
    world = World(big("a"), load_s=50)
    async with world.models.running():
        wait = world.ask("a")
        await asyncio.sleep(1)
        world.models.observe({})
        with pytest.raises(VersionNotFoundError):
            await wait
        world.models.observe({"a": folder(big("a"))})
        await asyncio.sleep(1)
        assert not world.models.wishes.wants("a") and world.loads["a"] == 1


async def test_a_load_of_what_a_request_had_loaded_is_kept_though_a_later_one_finds_no_room():
    world = World(big("a"))
    async with world.models.running():
        await world.use("a")
        await load(world.models, "a")
        world.models.observe({"a": folder(spec("a", print_="f2", n_bytes=101))})
        assert isinstance((await load(world.models, "a")).error, NoRoomError)
        assert world.models.wishes.word("a") is world.models.wishes.said("a") is Word.LOAD


async def test_a_load_that_joins_what_a_request_had_queued_waits_for_the_same_turn(looptime):
    world = World(big("a"), big("b"), load_s=1)
    async with world.models.running():
        await load(world.models, "a")
        wait = world.ask("b")
        assert world.state("b") == ["queued"]  # a has not had its turn
        await load(world.models, "b")
        assert looptime == 3
        await wait
        wait.lease().end()


async def test_a_load_that_joins_what_a_request_had_queued_outlives_that_request():
    world = World(big("a"), big("b"), load_s=1, room_wait_s=10)
    async with world.models.running():
        held = await world.lease("a")
        wait = world.ask("b")
        await asyncio.sleep(0.5)
        loading = asyncio.create_task(load(world.models, "b"))
        await asyncio.sleep(0.1)
        wait.cancel()
        await asyncio.sleep(9)
        held.end()
        gen = await loading
        assert gen.error is None and gen.state is State.READY
        assert world.models.wishes.said("b") is Word.LOAD
