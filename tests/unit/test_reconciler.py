"""Promises of the reconciler, each against fake hosts in virtual time. Devices have 100 bytes."""

import asyncio

import pytest

from repository.errors import NoDiskError, NoRoomError, WorkerDiedError
from repository.lifecycle.generation import Trigger
from repository.lifecycle.states import State
from repository.lifecycle.status import describe
from repository.snapshot import Problem
from tests.fakes.heart import folder, folders, load, reconciler, settled, spec, unload
from tests.fakes.host import FakeHost

pytestmark = pytest.mark.looptime


def sized(**bytes_of):
    return folders(*[spec(name, n_bytes=n) for name, n in bytes_of.items()])


class Hosts:
    """Makes hosts and remembers them; `error_of(spec)` decides which ones fail."""

    def __init__(self, load_s=1.0, error_of=lambda what: None):
        self.made, self.load_s, self.error_of = [], load_s, error_of

    def __call__(self, what):
        self.made.append(FakeHost(load_s=self.load_s, load_error=self.error_of(what)))
        return self.made[-1]


def states(models, name):
    return [str(g.state) for g in models.generations.get(name, ())]


def public(models, name):
    return describe(
        name,
        models.generations.get(name, ()),
        models.folders.get(name),
        wanted=models.wishes.wants(name),
    )


async def test_everything_in_the_repository_starts_when_everything_is_wanted():
    models = reconciler(Hosts(), everything=True)
    async with models.running():
        models.observe(sized(a=10, b=10), starting=True)
        await asyncio.sleep(5)
        assert states(models, "a") == states(models, "b") == ["ready"]
        assert models.generations["a"][0].trigger is Trigger.STARTUP


async def test_nothing_starts_until_it_is_asked_for_in_explicit_mode():
    hosts = Hosts()
    models = reconciler(hosts)
    async with models.running():
        models.observe(sized(a=10))
        await asyncio.sleep(100)
        assert not hosts.made
        assert (await load(models, "a")).state is State.READY


async def test_two_loads_are_one_load():
    hosts = Hosts(load_s=5)
    models = reconciler(hosts)
    async with models.running():
        models.observe(sized(a=10))
        first, second = await asyncio.gather(load(models, "a"), load(models, "a"))
        assert first is second and len(hosts.made) == 1
        assert await load(models, "a") is first and len(hosts.made) == 1


async def test_two_forced_loads_at_once_are_one_load_beside_the_old_one():
    hosts = Hosts(load_s=5)
    models = reconciler(hosts)
    async with models.running():
        models.observe(sized(a=10))
        old = await load(models, "a")
        first, second = await asyncio.gather(
            load(models, "a", force=True), load(models, "a", force=True)
        )
        assert first is second is not old and len(hosts.made) == 2
        await old.ended.wait()


async def test_a_reload_serves_the_old_one_until_the_new_one_is_ready():
    models = reconciler(Hosts(load_s=5), everything=True)
    async with models.running():
        models.observe(folders(spec("a", print_="f1")))
        await asyncio.sleep(10)
        old = models.routes.find("a")
        with old.lease():
            models.observe(folders(spec("a", print_="f2")))
            await asyncio.sleep(4)
            assert models.routes.find("a") is old
            assert public(models, "a").reloading and public(models, "a").state == "loaded"
            await asyncio.sleep(2)
            new = models.routes.find("a")
            assert new is not old and old.state is State.DRAINING
        await old.ended.wait()
        assert new.trigger is Trigger.WATCH


async def test_a_broken_reload_leaves_the_old_one_serving_and_says_why():
    hosts = Hosts(error_of=lambda s: OSError("bad magic") if s.fingerprint == "f2" else None)
    models = reconciler(hosts, everything=True)
    async with models.running():
        models.observe(folders(spec("a", print_="f1")))
        await asyncio.sleep(10)
        models.observe(folders(spec("a", print_="f2")))
        await asyncio.sleep(3600)
        assert len(hosts.made) == 2
        status = public(models, "a")
        assert status.state == "loaded" and "bad magic" in status.last_error.message
        models.observe(folders(spec("a", print_="f3")))
        await asyncio.sleep(10)
        status = public(models, "a")
        assert status.last_error is None and models.routes.find("a").spec.fingerprint == "f3"


async def test_broken_files_are_tried_once_until_somebody_asks():
    hosts = Hosts(error_of=lambda s: OSError("bad magic"))
    models = reconciler(hosts, everything=True)
    async with models.running():
        models.observe(sized(a=10))
        await asyncio.sleep(3600)
        assert len(hosts.made) == 1 and public(models, "a").state == "failed"
        hosts.error_of = lambda s: None
        assert (await load(models, "a")).state is State.READY


async def test_a_dead_worker_is_replaced():
    hosts = Hosts(load_s=0.1)
    models = reconciler(hosts, everything=True)
    async with models.running():
        models.observe(sized(a=10))
        await asyncio.sleep(1)
        hosts.made[0].kill("killed by signal 9")
        await asyncio.sleep(1)
        assert models.routes.find("a").trigger is Trigger.RESTART


async def test_a_worker_that_dies_while_loading_is_given_up_until_asked():
    hosts = Hosts(error_of=lambda s: WorkerDiedError("killed by signal 11"))
    models = reconciler(hosts, everything=True, crash_limit=3)
    async with models.running():
        models.observe(sized(a=10))
        await asyncio.sleep(3600)
        status = public(models, "a")
        assert len(hosts.made) == 3 and status.state == "failed"
        assert "signal 11" in status.last_error.message
        hosts.error_of = lambda s: None
        assert (await load(models, "a")).state is State.READY


async def test_what_found_no_room_on_the_disk_comes_by_itself_once_there_is_some():
    hosts = Hosts(error_of=lambda s: NoDiskError("no room"))
    models = reconciler(hosts, everything=True, crash_limit=3)
    async with models.running():
        models.observe(sized(a=10))
        await asyncio.sleep(3600)
        assert isinstance(models.generations["a"][-2].error, NoDiskError)
        assert 100 < len(hosts.made) < 130  # every half a minute in the end
        hosts.error_of = lambda s: None
        await asyncio.sleep(65)
        assert models.routes.find("a") is not None


async def test_what_was_unloaded_by_hand_stays_unloaded_when_its_files_change():
    models = reconciler(Hosts(), everything=True)
    async with models.running():
        models.observe(folders(spec("a", print_="f1")))
        await asyncio.sleep(5)
        await unload(models, "a")
        models.observe(folders(spec("a", print_="f2")))
        await asyncio.sleep(5)
        assert states(models, "a") == [] and models.ledgers["cpu"].held == 0
        models.observe({})
        models.observe(folders(spec("a", print_="f3")))
        await asyncio.sleep(5)
        assert states(models, "a") == ["ready"]


async def test_a_removed_folder_is_unloaded():
    models = reconciler(Hosts(), everything=True)
    async with models.running():
        models.observe(sized(a=10))
        await asyncio.sleep(5)
        models.observe({})
        await asyncio.sleep(5)
        assert models.generations == {} and models.history == {}


async def test_an_idle_model_leaves_for_one_that_was_asked_for():
    models = reconciler(Hosts(), everything=False)
    async with models.running():
        models.observe(sized(a=40, b=40, c=40))
        await load(models, "a")
        await load(models, "b")
        await asyncio.sleep(1)
        with models.routes.find("a").lease():
            pass  # a is now the more recently used one
        await load(models, "c")
        assert [public(models, m).state for m in "abc"] == ["loaded", "unloaded", "loaded"]


async def test_a_start_evicts_nobody_and_is_made_up_for_when_memory_comes_free():
    models = reconciler(Hosts(), everything=True)
    async with models.running():
        models.observe(sized(a=60), starting=True)
        await asyncio.sleep(5)
        models.observe(sized(a=60, b=60), starting=True)
        await asyncio.sleep(5)
        assert public(models, "a").state == "loaded"
        assert public(models, "b").last_error.code == "no_room"
        await unload(models, "a")
        await asyncio.sleep(5)
        assert public(models, "b").state == "loaded"


async def test_a_busy_model_is_waited_for_and_then_the_load_is_refused(looptime):
    models = reconciler(Hosts(load_s=0), room_wait_s=10)
    async with models.running():
        models.observe(sized(a=60, b=60))
        gen = await load(models, "a")
        began = asyncio.get_running_loop().time()
        with gen.lease():
            refused = await load(models, "b")
            assert isinstance(refused.error, NoRoomError)
            assert asyncio.get_running_loop().time() - began == 10
        assert public(models, "a").state == "loaded"


async def test_the_end_of_a_lease_wakes_the_planner():
    models = reconciler(Hosts(load_s=0), room_wait_s=10)
    async with models.running():
        models.observe(sized(a=60, b=60))
        gen = await load(models, "a")
        lease = gen.lease()
        lease.begin()
        asyncio.get_running_loop().call_later(5, lease.end)
        assert (await load(models, "b")).state is State.READY


async def test_a_reload_bigger_than_half_the_memory_does_not_deadlock():
    models = reconciler(Hosts(), everything=True)
    async with models.running():
        models.observe(folders(spec("a", print_="f1", n_bytes=80)))
        await asyncio.sleep(5)
        models.observe(folders(spec("a", print_="f2", n_bytes=80)))
        await asyncio.sleep(10)
        assert models.routes.find("a").spec.fingerprint == "f2"


async def test_an_idle_model_past_its_ttl_leaves_and_a_used_one_stays():
    models = reconciler(Hosts(load_s=0))
    async with models.running():
        models.observe(folders(spec("a", ttl_s=60.0), spec("b", ttl_s=60.0)))
        await load(models, "a")
        gen = await load(models, "b")
        await asyncio.sleep(50)
        with gen.lease():
            pass
        await asyncio.sleep(20)
        assert public(models, "a").state == "unloaded" and public(models, "b").state == "loaded"
        await asyncio.sleep(60)
        assert public(models, "b").state == "unloaded"


async def test_unload_is_idempotent_and_clears_a_failure():
    models = reconciler(Hosts(error_of=lambda s: OSError("x")))
    async with models.running():
        models.observe(sized(a=10))
        assert (await load(models, "a")).error is not None
        await unload(models, "a")
        await unload(models, "a")
        assert public(models, "a").state == "unloaded"


async def test_a_load_that_is_overtaken_by_an_unload_ends():
    models = reconciler(Hosts(load_s=100))
    async with models.running():
        models.observe(sized(a=10))
        gens = models.want("a", trigger=Trigger.API)
        await asyncio.sleep(1)
        await unload(models, "a")
        await settled(gens)
        assert gens[0].state is State.GONE


async def test_two_versions_serve_beside_each_other_and_the_highest_answers():
    models = reconciler(Hosts(), everything=True)
    async with models.running():
        models.observe({"a": folder(spec("a", 1), spec("a", 2))})
        await asyncio.sleep(5)
        assert models.routes.find("a").spec.version == 2
        assert models.routes.find("a", 1).spec.version == 1
        assert models.routes.find("a", 3) is None


async def test_a_version_that_goes_away_is_replaced_before_it_stops():
    models = reconciler(Hosts(load_s=5), everything=True)
    async with models.running():
        models.observe(folders(spec("a", 2)))
        await asyncio.sleep(6)
        models.observe(folders(spec("a", 1)))
        await asyncio.sleep(4)
        assert models.routes.find("a").spec.version == 2
        await asyncio.sleep(4)
        assert models.routes.find("a").spec.version == 1
        assert models.routes.find("a", 2) is None


async def test_an_alias_leads_to_its_model():
    models = reconciler(Hosts(), everything=True)
    async with models.running():
        models.observe({"a": folder(spec("a"), aliases=("other",))})
        await asyncio.sleep(5)
        assert models.routes.find("other") is models.routes.find("a")


async def test_a_problem_in_the_folder_is_the_last_error():
    problem = Problem("a/config.yaml:3", "config", "unknown key 'x'")
    models = reconciler(Hosts(), everything=True)
    async with models.running():
        models.observe({"a": folder(name="a", problems=(problem,))})
        status = public(models, "a")
        assert status.state == "failed" and "config.yaml:3" in status.last_error.message


async def test_the_end_of_running_unloads_everything_even_what_is_loading():
    hosts = Hosts(load_s=50)
    models = reconciler(hosts, everything=True, load_slots=1)
    async with models.running():
        models.observe(sized(a=10, b=10, c=10))
        await asyncio.sleep(60)
    assert models.ledgers["cpu"].held == 0
    assert all(h.calls == ["load", "stop"] for h in hosts.made)


async def test_a_life_that_breaks_a_rule_fails_alone_and_keeps_its_memory():
    models = reconciler(Hosts(load_s=0), everything=True)
    async with models.running():
        models.observe(sized(a=10, b=10))
        await asyncio.sleep(1)
        broken = models.routes.find("a")
        broken.state = State.QUEUED  # a bug elsewhere
        broken.retire("test")
        await asyncio.sleep(1)
        assert broken.state is State.FAILED and "not allowed" in str(broken.error)
        assert models.ledgers["cpu"].held >= 10 and public(models, "b").state == "loaded"
