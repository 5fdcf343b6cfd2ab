"""The reconciler in odd hours: faults while somebody asks, memory that is short, ghosts, the end.

Against fake hosts in virtual time. Devices have 100 bytes.
"""

import asyncio

import pytest

from repository.dry_run import foresee
from repository.errors import DrainingError, NoRoomError, WorkerDiedError
from repository.lifecycle.generation import Trigger
from repository.lifecycle.register import HISTORY
from repository.lifecycle.states import State
from repository.observer import Observer
from tests.fakes.heart import folder, folders, load, reconciler, spec, unload
from tests.fakes.host import FakeHost
from tests.unit.test_reconciler import Hosts, public, sized, states

pytestmark = pytest.mark.looptime


def fails_for(*prints):
    return lambda s: OSError("bad magic") if s.fingerprint in prints else None


class SlowToStop(Hosts):
    def __call__(self, what):
        self.made.append(FakeHost(load_s=1, load_error=self.error_of(what), stop_s=5))
        return self.made[-1]


# what is asked while something fails -------------------------------------------------------------


async def test_a_load_beside_a_dying_worker_restarts_that_version_only():
    hosts = SlowToStop()
    models = reconciler(hosts)
    async with models.running():
        models.observe({"a": folder(spec("a", 1), spec("a", 2))})
        await load(models, "a")
        one, two = models.generations["a"]
        hosts.made[1].kill("killed by signal 9")
        await asyncio.sleep(1)
        assert two.state is State.FAILING
        gens = models.want("a", trigger=Trigger.API)
        await asyncio.gather(*[g.settled.wait() for g in gens])
        assert one in gens and two not in gens and len(hosts.made) == 3
        assert {g.state for g in gens} == {State.READY}


async def test_a_load_beside_a_dying_worker_has_the_rights_of_one_that_was_asked_for():
    hosts = SlowToStop()
    models = reconciler(hosts)
    async with models.running():
        models.observe(sized(a=50))
        await load(models, "a")
        hosts.made[0].kill("killed by signal 9")
        await asyncio.sleep(1)
        assert (await load(models, "a")).trigger is Trigger.API


async def test_a_forced_load_during_a_failure_is_a_try_of_its_own():
    hosts = SlowToStop(error_of=fails_for("f1"))
    models = reconciler(hosts)
    async with models.running():
        models.observe(sized(a=10))
        (failing,) = models.want("a", trigger=Trigger.API)
        await asyncio.sleep(2)
        assert failing.state is State.FAILING
        hosts.error_of = lambda s: None
        assert (await load(models, "a", force=True)).state is State.READY


async def test_what_was_unloaded_while_it_failed_is_unloaded_and_not_failed():
    hosts = SlowToStop(error_of=fails_for("f1"))
    models = reconciler(hosts)
    async with models.running():
        models.observe(sized(a=10))
        models.want("a", trigger=Trigger.API)
        await asyncio.sleep(2)
        await unload(models, "a")
        assert public(models, "a").state == "unloaded" and public(models, "a").last_error is None


async def test_files_that_changed_under_a_load_and_came_back_are_tried_again():
    answers = [False, True]

    async def unchanged(what):
        return answers.pop(0)

    models = reconciler(Hosts(), everything=True, lives={"unchanged": unchanged})
    async with models.running():
        models.observe(sized(a=10))
        await asyncio.sleep(60)
        assert public(models, "a").state == "loaded" and not answers


# ghosts ------------------------------------------------------------------------------------------


async def test_a_failed_model_whose_folder_is_removed_is_forgotten():
    told = []

    class Counting(Observer):
        def forgotten(self, model):
            told.append(model)

    models = reconciler(Hosts(error_of=fails_for("f1")), everything=True, observer=Counting())
    async with models.running():
        models.observe(sized(a=10))
        await asyncio.sleep(5)
        assert public(models, "a").state == "failed"
        models.observe({})
        assert models.generations == {} and models.history == {} and told == ["a"]


async def test_an_unloaded_model_whose_folder_is_removed_is_forgotten():
    models = reconciler(Hosts(), everything=True)
    async with models.running():
        models.observe(sized(a=10))
        await asyncio.sleep(5)
        await unload(models, "a")
        await asyncio.sleep(1)
        assert len(models.history["a"]) == 1
        models.observe({})
        assert models.history == {}


async def test_the_fault_of_a_version_that_is_gone_is_history():
    models = reconciler(Hosts(error_of=fails_for("bad")), everything=True)
    async with models.running():
        models.observe(folders(spec("a", 1)))
        await asyncio.sleep(5)
        models.observe(folders(spec("a", 2, "bad")))
        await asyncio.sleep(5)
        assert "bad magic" in public(models, "a").last_error.message
        models.observe(folders(spec("a", 1)))
        await asyncio.sleep(5)
        assert public(models, "a").last_error is None and states(models, "a") == ["ready"]


async def test_a_worker_that_crashes_for_weeks_grows_no_list():
    hosts = Hosts(load_s=0.1)
    models = reconciler(hosts, everything=True)
    async with models.running():
        models.observe(sized(a=10))
        for _ in range(200):
            await asyncio.sleep(40)
            hosts.made[-1].kill("killed by signal 9")
        await asyncio.sleep(60)
        assert public(models, "a").state == "loaded"
        assert len(models.generations["a"]) <= 10 and len(models.history["a"]) <= HISTORY
        assert not any(g.batcher for g in models.history["a"])


# memory ------------------------------------------------------------------------------------------


async def test_an_idle_version_does_not_take_its_busy_sister_away():
    models = reconciler(Hosts(load_s=0), room_wait_s=5)
    async with models.running():
        models.observe(
            {"a": folder(spec("a", 1, n_bytes=40), spec("a", 2, n_bytes=40)), **sized(b=50)}
        )
        await load(models, "a")
        with models.routes.find("a", 2).lease():
            refused = await load(models, "b")
            assert isinstance(refused.error, NoRoomError)
            assert states(models, "a") == ["ready", "ready"]
        assert (await load(models, "b")).state is State.READY
        assert public(models, "a").state == "unloaded"


async def test_a_version_past_its_ttl_waits_for_its_sister():
    models = reconciler(Hosts(load_s=0))
    async with models.running():
        models.observe({"a": folder(spec("a", 1, ttl_s=60.0), spec("a", 2, ttl_s=60.0))})
        await load(models, "a")
        for _ in range(10):
            await asyncio.sleep(30)
            with models.routes.find("a").lease():
                pass
        assert states(models, "a") == ["ready", "ready"]
        await asyncio.sleep(61)
        assert public(models, "a").state == "unloaded"


async def test_a_new_version_that_does_not_fit_beside_the_old_one_replaces_it():
    models = reconciler(Hosts(), everything=True)
    async with models.running():
        models.observe(folders(spec("a", 1, n_bytes=60)))
        await asyncio.sleep(5)
        models.observe(folders(spec("a", 2, n_bytes=60)))
        await asyncio.sleep(30)
        assert models.routes.find("a").spec.version == 2 and states(models, "a") == ["ready"]


async def test_a_dry_run_knows_that_a_new_version_replaces_the_old_one():
    models = reconciler(Hosts())
    async with models.running():
        models.observe(folders(spec("a", 1, n_bytes=60)))
        await load(models, "a")
        told = foresee(models, folder(spec("a", 2, "f2", n_bytes=60)))
        assert told.would_load and told.would_evict == ("a",)


async def test_each_refused_version_is_made_up_for_when_memory_comes_free():
    models = reconciler(Hosts(), everything=True)
    pinned = folders(spec("x", n_bytes=50, pin=True))
    async with models.running():
        models.observe(pinned)
        await asyncio.sleep(5)
        both = folder(spec("a", 1, n_bytes=60), spec("a", 2, n_bytes=10))
        models.observe({**pinned, "a": both})
        await asyncio.sleep(60)
        assert models.routes.find("a", 1) is None and models.routes.find("a", 2) is not None
        await unload(models, "x")
        await asyncio.sleep(5)
        assert models.routes.find("a", 1) is not None


async def test_the_refused_are_tried_again_when_who_came_before_them_is_refused_too():
    models = reconciler(Hosts(load_s=1), room_wait_s=5)
    models.wishes.named = frozenset({"late"})
    async with models.running():
        models.observe(sized(x=40, busy=30))
        busy = (await load(models, "busy")).lease()
        busy.begin()
        in_use = (await load(models, "x")).lease()
        in_use.begin()
        models.observe(sized(x=40, busy=30, late=60, huge=90))
        await asyncio.sleep(6)
        assert states(models, "late") == ["failed"]
        huge = asyncio.create_task(load(models, "huge"))
        await asyncio.sleep(1)
        in_use.end()
        await unload(models, "x")  # there is room for it now, and one before it who waits for more
        assert isinstance((await huge).error, NoRoomError)
        await asyncio.sleep(2)
        assert models.routes.find("late") is not None
        busy.end()


async def test_the_refused_are_tried_again_when_the_queue_before_them_is_empty():
    models = reconciler(Hosts(load_s=1), everything=True)
    gone = folders(spec("a", n_bytes=90, pin=True))
    async with models.running():
        models.wishes.unload("b")
        models.observe(gone | sized(b=30))
        await asyncio.sleep(5)
        models.observe(gone | sized(b=30, c=40))
        await asyncio.sleep(60)
        assert public(models, "c").last_error.code == "no_room"
        with models.routes.find("a").lease():
            ended = models.unwant("a")
            models.want("b", trigger=Trigger.API)  # it stands in the queue
        await asyncio.gather(*[g.ended.wait() for g in ended])
        await asyncio.sleep(30)
        assert [public(models, m).state for m in "bc"] == ["loaded", "loaded"]


async def test_asking_in_vain_does_not_make_a_model_unwanted():
    models = reconciler(Hosts(), everything=True, room_wait_s=1)
    async with models.running():
        models.observe({"a": folder(spec("a", n_bytes=60, pin=True)), **sized(b=60)})
        await asyncio.sleep(5)
        assert isinstance((await load(models, "b")).error, NoRoomError)
        assert public(models, "b").wanted
        await unload(models, "a")
        await asyncio.sleep(5)
        assert public(models, "b").state == "loaded"


async def test_a_reload_that_was_refused_does_not_happen_by_surprise_later():
    hosts = Hosts()
    models = reconciler(hosts, room_wait_s=1)
    async with models.running():
        models.observe(
            folders(spec("a", n_bytes=40, reload="overlap"), spec("x", n_bytes=30, pin=True))
        )
        await load(models, "a")
        await load(models, "x")
        assert isinstance((await load(models, "a", force=True)).error, NoRoomError)
        await unload(models, "x")
        await asyncio.sleep(60)
        assert len(hosts.made) == 2 and public(models, "a").state == "loaded"


async def test_a_refused_reload_is_made_up_for_when_it_could_replace_its_own():
    models = reconciler(Hosts(), everything=True)
    pinned = spec("x", n_bytes=30, pin=True)
    async with models.running():
        models.observe(folders(spec("a", n_bytes=60), pinned))
        await asyncio.sleep(5)
        models.observe(folders(spec("a", 1, "f2", n_bytes=90), pinned))
        await asyncio.sleep(60)
        assert public(models, "a").last_error.code == "no_room"
        await unload(models, "x")
        await asyncio.sleep(10)
        assert models.routes.find("a").spec.fingerprint == "f2"


# bugs of others ----------------------------------------------------------------------------------


async def test_an_observer_that_raises_stops_nothing():
    class Broken(Observer):
        def stepped(self, gen, before):
            raise KeyError("no such label")

    models = reconciler(Hosts(), everything=True, observer=Broken())
    async with models.running():
        models.observe(sized(a=10))
        await asyncio.sleep(5)
        assert public(models, "a").state == "loaded"


async def test_the_planner_outlives_a_bug_in_a_decision():
    hosts = Hosts(load_s=0.1)
    models = reconciler(hosts, everything=True)
    async with models.running():
        models.observe(sized(a=10, b=10))
        await asyncio.sleep(1)
        models.wishes.wanted, good = None, models.wishes.wanted  # every plan raises from now on
        hosts.made[0].kill("killed by signal 9")
        hosts.made[1].kill("killed by signal 9")
        await asyncio.sleep(5)
        assert public(models, "a").state == "failed"
        models.wishes.wanted = good
        models._mark("a")
        await asyncio.sleep(5)
        assert public(models, "a").state == "loaded"


async def test_a_life_whose_memory_cannot_be_given_back_still_ends():
    models = reconciler(Hosts(), everything=True)
    async with models.running():
        models.observe(sized(a=10))
        await asyncio.sleep(5)
        models.ledgers["cpu"].held = 0  # a bug elsewhere
        await unload(models, "a")
        models.ledgers["cpu"].held = 10


# the end -----------------------------------------------------------------------------------------


async def test_nothing_starts_once_the_end_has_begun():
    models = reconciler(Hosts())
    running = models.running()
    await running.__aenter__()
    models.observe(sized(a=10, b=10))
    gen = await load(models, "a")
    with gen.lease():
        closing = asyncio.create_task(running.__aexit__(None, None, None))
        await asyncio.sleep(1)
        with pytest.raises(DrainingError):
            models.want("b", trigger=Trigger.API)
    await closing
    assert models.ledgers["cpu"].held == 0


@pytest.mark.parametrize("after_s", [0, 0.5, 1, 5, 12])
async def test_a_second_signal_during_the_end_leaves_no_life_behind(after_s):
    hosts = SlowToStop(error_of=lambda s: WorkerDiedError("x") if s.model == "c" else None)
    models = reconciler(hosts, everything=True, load_slots=2)

    async def serve():
        async with models.running():
            models.observe(sized(a=30, b=30, c=30, d=10))
            await asyncio.sleep(3600)

    server = asyncio.create_task(serve())
    await asyncio.sleep(2.5)
    server.cancel()
    await asyncio.sleep(after_s)
    server.cancel()
    await asyncio.wait([server])
    assert models.ledgers["cpu"].held == 0 and not models._lives
    assert all(g.ended.is_set() for of in models.generations.values() for g in of)
