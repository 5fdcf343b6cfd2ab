"""Models that fall asleep and wake: by call, idle, evicted; over fake hosts in virtual time."""

import asyncio

import pytest

from repository.demand import Demand
from repository.errors import NoRoomError, RepositoryError, WorkerDiedError
from repository.events import EventBus
from repository.lifecycle.generation import Trigger
from repository.lifecycle.placement import HOST
from repository.lifecycle.states import State
from repository.lifecycle.status import describe
from repository.lifecycle.wishes import Word
from tests.fakes.heart import folder, folders, load, reconciler, spec, unload
from tests.fakes.host import FakeHost
from tests.fakes.stage import SLEEPER

pytestmark = pytest.mark.looptime

LOAD_S = 4.0
WAKE_S = 0.25
CONTEXT = 5


class World:
    """Models on a device of 100 bytes; asleep each holds half of its bytes in the host tier."""

    def __init__(self, *specs, tier=100, load=("a",), **knobs):
        self.specs = specs
        self.knobs = knobs
        self.hosts = {}
        self.events = EventBus()
        self.models = reconciler(
            self.make_host,
            tier=tier,
            demand=Demand(patience_s=3600),
            events=self.events,
            min_residency_s=0.0,
        )
        self.first = load

    def make_host(self, what):
        knobs = {"load_s": LOAD_S, "loaded": SLEEPER, "wake_s": WAKE_S} | self.knobs
        asleep = {"cpu": {"context": CONTEXT}, HOST: {"weights": what.bytes_needed // 2}}
        measured = {"cpu": {"weights": what.bytes_needed // 2, "context": CONTEXT}}
        host = FakeHost(asleep=asleep, memory=measured, **knobs)
        self.hosts.setdefault(what.model, []).append(host)
        return host

    async def __aenter__(self):
        self.block = self.models.running()
        await self.block.__aenter__()
        self.models.observe(folders(*self.specs))
        for name in self.first:
            gen = await load(self.models, name)
            assert gen.state is State.READY
        return self

    async def __aexit__(self, *error):
        await self.block.__aexit__(*error)
        assert all(ledger.held == 0 for ledger in self.models.ledgers.values())
        assert all(h.calls.count("stop") == 1 for of in self.hosts.values() for h in of)

    async def sleep(self, name="a"):
        gens = self.models.put_to_sleep(name)
        for gen in gens:
            await gen.rested.wait()
        return gens

    def states(self, name="a"):
        return [str(g.state) for g in self.models.register.of(name)]

    def calls(self, name="a"):
        return [host.calls for host in self.hosts.get(name, ())]

    def held(self):
        return {device: ledger.held for device, ledger in self.models.ledgers.items()}

    def status(self, name="a"):
        wanted = self.models.wishes.wants(name)
        there = self.models.folders.get(name)
        return describe(name, self.models.register.of(name), there, wanted=wanted)


def big(name, n_bytes=60, **config):
    return spec(name, print_=f"of {name}", n_bytes=n_bytes, **config)


async def settle():
    await asyncio.sleep(0.01)


# by call ------------------------------------------------------------------------------------------


async def test_put_to_sleep_by_call_it_gives_its_device_back_and_is_not_wanted():
    async with World(big("a")) as world:
        await world.sleep()
        assert world.states() == ["asleep"] and world.held() == {"cpu": CONTEXT, HOST: 30}
        assert world.models.wishes.said("a") is Word.SLEEP
        status = world.status()
        assert (status.state, status.asleep, status.wanted) == ("unloaded", True, False)
        await asyncio.sleep(600)
        assert world.states() == ["asleep"] and not world.models.loads_on_request("a")


async def test_a_load_wakes_it_in_the_time_that_waking_takes(looptime):
    async with World(big("a")) as world:
        await world.sleep()
        assert looptime == LOAD_S
        gen = await load(world.models, "a")
        assert looptime == LOAD_S + WAKE_S and gen.woken and gen.state is State.READY
        await settle()
        assert world.states() == ["ready"] and world.calls() == [["load", "sleep", "wake"]]
        assert world.held() == {"cpu": 60, HOST: 0} and not world.status().asleep


async def test_many_who_load_it_at_once_share_one_waking():
    async with World(big("a")) as world:
        await world.sleep()
        gens = await asyncio.gather(*[load(world.models, "a") for _ in range(20)])
        assert len(set(gens)) == 1 and world.calls() == [["load", "sleep", "wake"]]


async def test_it_sleeps_and_wakes_as_often_as_one_likes():
    async with World(big("a")) as world:
        for _ in range(5):
            await world.sleep()
            assert (await load(world.models, "a")).woken
        assert world.calls() == [["load"] + ["sleep", "wake"] * 5]


async def test_nothing_is_kept_of_those_who_have_slept_and_been_woken():
    async with World(big("a")) as world:
        for _ in range(3):
            await world.sleep()
            gen = await load(world.models, "a")
        assert gen.wakes is not None and gen.wakes.state is State.GONE
        assert gen.wakes.wakes is None


async def test_unloaded_asleep_it_ends_for_good():
    async with World(big("a")) as world:
        await world.sleep()
        await unload(world.models, "a")
        await settle()
        assert world.held() == {"cpu": 0, HOST: 0} and world.calls()[0][-1] == "stop"
        assert not (await load(world.models, "a")).woken


@pytest.mark.parametrize("how", ["changed", "gone", "forced"])
async def test_what_sleeps_ends_when_nobody_could_wake_it(how):
    async with World(big("a")) as world:
        await world.sleep()
        if how == "changed":
            world.models.observe(folders(spec("a", print_="other", n_bytes=60)))
        elif how == "gone":
            world.models.observe({})
        else:
            assert not (await load(world.models, "a", force=True)).woken
        await settle()
        assert world.calls()[0] == ["load", "sleep", "stop"]
        assert world.held()[HOST] == 0


async def test_a_load_while_it_falls_asleep_wakes_it_as_soon_as_it_does(looptime):
    async with World(big("a"), sleep_s=2.0) as world:
        going = asyncio.create_task(world.sleep())
        await asyncio.sleep(1)
        gen = await load(world.models, "a")
        assert gen.woken and looptime == LOAD_S + 2 + WAKE_S
        await going


async def test_a_load_that_finds_room_beside_it_does_not_wait_for_its_sleep():
    async with World(big("a", 40)) as world:
        with world.models.routes.find("a").lease():
            going = asyncio.create_task(world.sleep())
            await settle()
            gen = await load(world.models, "a")
            assert gen.state is State.READY and not gen.woken
        await going
        await settle()
        assert world.states() == ["ready"] and world.calls()[0][-1] == "stop"


@pytest.mark.parametrize("when", ["falling asleep", "asleep", "waking"])
async def test_an_unload_ends_it_wherever_it_is(when):
    async with World(big("a"), sleep_s=2.0) as world:
        going = asyncio.create_task(world.sleep())
        await asyncio.sleep(1 if when == "falling asleep" else 3)
        if when == "waking":
            gens = world.models.want("a", trigger=Trigger.API)
            await asyncio.sleep(0.1)
            assert gens[0].state is State.LOADING
        await unload(world.models, "a")
        await going
        await settle()
        assert world.states() == [] and world.held() == {"cpu": 0, HOST: 0}


async def test_a_sleep_that_is_said_while_it_wakes_ends_the_waking():
    async with World(big("a")) as world:
        await world.sleep()
        gens = world.models.want("a", trigger=Trigger.API)
        await asyncio.sleep(0.1)
        assert world.models.put_to_sleep("a") == []
        await gens[0].ended.wait()
        assert gens[0].ready_at is None and world.models.wishes.said("a") is Word.SLEEP


async def test_a_worker_that_dies_asleep_is_gone_and_nothing_has_failed():
    async with World(big("a")) as world:
        await world.sleep()
        world.hosts["a"][0].kill("killed by signal 9")
        await settle()
        assert world.states() == [] and world.status().last_error is None
        assert (await load(world.models, "a")).state is State.READY


async def test_one_that_cannot_be_woken_is_loaded_and_whoever_asked_hears_of_nothing():
    async with World(big("a"), wake_error=MemoryError("the device is full")) as world:
        await world.sleep()
        gen = await load(world.models, "a")
        assert gen.state is State.READY and not gen.woken
        assert world.calls() == [["load", "sleep", "wake", "stop"], ["load"]]
        assert world.held() == {"cpu": 60, HOST: 0}


async def test_all_that_happens_is_told():
    async with World(big("a")) as world:
        with world.events.subscribe() as told:
            await world.sleep()
            await load(world.models, "a")
            kinds = []
            while "model.woken" not in kinds:
                kinds.append((await anext(told)).kind)
        assert "model.asleep" in kinds


# idle ---------------------------------------------------------------------------------------------


async def test_who_idles_for_sleep_s_falls_asleep_and_a_request_wakes_it(looptime):
    async with World(big("a", sleep_s=10.0)) as world:
        await asyncio.sleep(9.9)
        assert world.states() == ["ready"]
        with world.models.routes.find("a").lease():
            await asyncio.sleep(5)
            assert world.states() == ["ready"]
        await asyncio.sleep(10.01)
        assert world.states() == ["asleep"] and world.models.wishes.said("a") is Word.LOAD
        assert world.models.loads_on_request("a")
        leases = []
        await world.models.wait_for("a", None, leases.append)
        assert leases[0].generation.woken
        leases[0].end()


async def test_a_second_request_joins_while_the_first_has_it_woken():
    async with World(big("a", sleep_s=10.0)) as world:
        await asyncio.sleep(11)
        leases = []
        first = world.models.wait_for("a", None, leases.append)
        await asyncio.sleep(0.1)
        assert world.states()[-1] == "loading" and world.models.loads_on_request("a")
        await asyncio.gather(first, world.models.wait_for("a", None, leases.append))
        assert len(leases) == 2 and world.calls() == [["load", "sleep", "wake"]]
        for lease in leases:
            lease.end()


async def test_asleep_it_leaves_when_its_ttl_is_over():
    async with World(big("a", sleep_s=10.0, ttl_s=60.0)) as world:
        await asyncio.sleep(15)
        assert world.states() == ["asleep"]
        await asyncio.sleep(40)
        assert world.states() == ["asleep"]
        await asyncio.sleep(6)
        assert world.states() == [] and not world.models.loads_on_request("a")


@pytest.mark.parametrize("idle", [{"sleep_s": 1.0}, {"ttl_s": 1.0}])
async def test_nothing_of_a_model_idles_while_a_request_waits_for_another_version_of_it(idle):
    first = spec("a", 1, "f1", 10, **idle)
    async with World(first) as world:
        later = spec("a", 2, "f2", 10, **idle)
        world.knobs = {"load_error": WorkerDiedError("it died")}
        world.models.observe({"a": folder(first, later)})
        with pytest.raises(RepositoryError):  # once it has crashed too often
            await world.models.wait_for("a", 2, lambda lease: lease.end())
        assert world.calls()[0] == ["load"]


async def test_who_is_about_to_be_woken_sleeps_on_though_its_ttl_is_over():
    async with World(big("a", ttl_s=18.0), big("b", 80)) as world:
        await world.sleep()
        busy = (await load(world.models, "b")).lease()
        with busy:
            await asyncio.sleep(5)
            waking = asyncio.create_task(load(world.models, "a"))
            await asyncio.sleep(9.5)  # more than 18 s since it was used
            assert world.states() == ["asleep", "queued"]
        assert (await waking).woken


async def test_who_cannot_sleep_stays_awake_and_nobody_looks_for_ever():
    async with World(big("a", sleep_s=10.0), tier=0) as world:
        await asyncio.sleep(100)
        assert world.states() == ["ready"] and not world.models._timers


# evicted ------------------------------------------------------------------------------------------


async def test_evicted_it_sleeps_and_a_request_wakes_it_when_there_is_room():
    async with World(big("a", evict_to="host"), big("b", 80)) as world:
        await load(world.models, "b")
        await settle()
        assert world.states() == ["asleep"] and world.states("b") == ["ready"]
        assert world.models.wishes.word("a") is Word.EVICTED and world.models.loads_on_request("a")
        leases = []
        await world.models.wait_for("a", None, leases.append)
        assert leases[0].generation.woken and world.states("b") != ["ready"]
        leases[0].end()


async def test_what_its_process_keeps_of_the_device_goes_too_where_it_is_needed():
    async with World(big("a", evict_to="host"), big("b", 98)) as world:
        gen = await load(world.models, "b")
        assert gen.state is State.READY and world.states() == []
        assert world.calls() == [["load", "sleep", "stop"]]


async def test_to_disk_means_that_it_is_unloaded():
    async with World(big("a", evict_to="disk"), big("b", 80)) as world:
        await load(world.models, "b")
        assert world.states() == [] and world.calls() == [["load", "stop"]]


async def test_those_asleep_make_room_in_the_tier_for_those_who_come():
    specs = [big(name, 60, evict_to="host") for name in "abcd"]
    async with World(*specs, tier=60, load=()) as world:
        for name in "abcd":
            await load(world.models, name)
            await settle()
        assert [world.states(name) for name in "abcd"] == [[], ["asleep"], ["asleep"], ["ready"]]
        assert world.held()[HOST] == 60


async def test_a_wake_that_finds_no_room_is_refused_and_it_sleeps_on():
    async with World(big("a"), big("b", 80, pin=True)) as world:
        await world.sleep()
        await load(world.models, "b")
        gen = await load(world.models, "a")
        assert isinstance(gen.error, NoRoomError)
        await settle()
        assert world.states() == ["asleep", "failed"] and world.calls() == [["load", "sleep"]]
        assert world.models.wishes.said("a") is Word.SLEEP
        await unload(world.models, "b")
        assert (await load(world.models, "a")).woken


async def test_what_sleeps_ends_at_once_with_the_server(looptime):
    async with World(big("a")) as world:
        await world.sleep()
    assert world.calls() == [["load", "sleep", "stop"]] and looptime == LOAD_S
