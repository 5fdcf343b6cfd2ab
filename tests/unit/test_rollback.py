"""Reload where there is no room for two: looked at first, asleep meanwhile, back if it fails."""

import asyncio
from dataclasses import replace

import pytest

from repository.errors import LoadFailedError, WorkerDiedError
from repository.lifecycle.generation import Trigger
from repository.lifecycle.placement import HOST
from repository.lifecycle.states import State
from repository.lifecycle.status import describe
from tests.fakes.heart import folder, folders, load, reconciler, spec, unload
from tests.fakes.host import FakeHost
from tests.fakes.stage import SLEEPER

pytestmark = pytest.mark.looptime

LOAD_S = 4.0
BROKEN = LoadFailedError("a layer is missing")


class World:
    """One model of 60 bytes on a device of 100. `knobs`: fingerprint -> of its hosts."""

    def __init__(self, *, tier=100, unchanged=None, devices=("cpu",), **knobs):
        self.knobs = knobs
        self.hosts = {}  # fingerprint -> those that were made
        self.read = []  # fingerprints that were looked at again on the disk
        self.same = unchanged or {}
        self.models = reconciler(
            self.make_host,
            everything=True,
            tier=tier,
            lives={"unchanged": self.unchanged},
            devices=devices,
        )

    def make_host(self, what):
        knobs = {"load_s": LOAD_S, "loaded": SLEEPER} | self.knobs.get(what.fingerprint, {})
        host = FakeHost(asleep={what.devices[0]: {"context": 5}, HOST: {"weights": 50}}, **knobs)
        self.hosts.setdefault(what.fingerprint, []).append(host)
        return host

    async def unchanged(self, what):
        self.read.append(what.fingerprint)
        return self.same.get(what.fingerprint, True)

    def files(self, print_, version=1, n_bytes=60, **config):
        one = spec("m", version, print_, n_bytes, **config)
        self.models.observe({"m": folder(one)})

    @property
    def gens(self):
        return self.models.register.of("m")

    def serving(self):
        gen = self.models.routes.find("m")
        return gen.spec.fingerprint if gen is not None else None

    def status(self):
        return describe("m", self.gens, self.models.folders.get("m"), wanted=True)

    def calls(self, print_):
        return [host.calls for host in self.hosts.get(print_, ())]

    async def until(self, is_so, limit_s=100.0):
        async with asyncio.timeout(limit_s):
            while not is_so():  # noqa: ASYNC110 - in virtual time
                await asyncio.sleep(0.1)


async def test_files_that_cannot_be_loaded_are_found_out_before_anything_stops(looptime):
    world = World(new={"validate_s": 3, "validate_error": BROKEN})
    async with world.models.running():
        world.files("old")
        await world.until(lambda: world.serving() == "old")
        world.files("new")
        for _ in range(60):
            await asyncio.sleep(0.1)
            assert world.serving() == "old"
        assert world.calls("old") == [["load"]] and world.calls("new") == [["validate", "stop"]]
        status = world.status()
        assert status.state == "loaded" and status.last_error.message == "a layer is missing"
        assert len(world.gens) == 2  # it is not tried again


async def test_the_old_one_sleeps_while_the_new_one_loads_and_leaves_when_it_serves():
    world = World()
    async with world.models.running():
        world.files("old")
        await world.until(lambda: world.serving() == "old")
        world.files("new", n_bytes=90)
        await world.until(lambda: world.gens[-1].state is State.LOADING)
        assert [g.state for g in world.gens] == [State.ASLEEP, State.LOADING]
        assert world.models.ledgers["cpu"].held == 95 and world.models.ledgers[HOST].held == 50
        await world.until(lambda: world.serving() == "new")
        await world.until(lambda: len(world.gens) == 1)
        assert world.calls("old") == [["load", "sleep", "stop"]]
        assert world.calls("new") == [["validate", "stop"], ["load"]]
        assert world.models.ledgers[HOST].held == 0 and not world.models.register.fallback


async def test_the_old_one_is_woken_where_the_new_one_fails(looptime):
    world = World(new={"load_error": BROKEN}, old={"wake_s": 0.5})
    async with world.models.running():
        world.files("old")
        await world.until(lambda: world.serving() == "old")
        world.files("new")
        await world.until(lambda: world.gens[-1].spec.fingerprint == "new")
        await world.until(lambda: world.serving() == "old" and world.gens[-1].rolled_back)
        back = world.gens[-1]
        assert (
            back.woken
            and back.trigger is Trigger.RESTART
            and back.ready_at - back.admitted_at == 0.5
        )
        assert world.calls("old") == [["load", "sleep", "wake"]]
        status = world.status()
        assert status.state == "loaded" and status.serving_version == 1 and not status.reloading
        assert status.last_error.message == "a layer is missing"
        await asyncio.sleep(600)
        assert world.calls("new") == [["validate", "stop"], ["load", "stop"]]  # not tried again


async def test_without_a_place_to_sleep_it_is_loaded_again_from_files_that_are_still_there():
    world = World(tier=None, new={"load_error": BROKEN})
    async with world.models.running():
        world.files("old")
        await world.until(lambda: world.serving() == "old")
        world.files("new")
        await world.until(lambda: world.serving() is None)
        await world.until(lambda: world.serving() == "old")
        assert world.calls("old") == [["load", "stop"], ["load"]]
        assert not world.gens[-1].woken and world.gens[-1].rolled_back


async def test_files_that_were_overwritten_do_not_come_back_and_the_first_error_is_told():
    world = World(tier=None, new={"load_error": BROKEN}, unchanged={})
    async with world.models.running():
        world.files("old")
        await world.until(lambda: world.serving() == "old")
        world.same["old"] = False
        world.files("new")
        await world.until(lambda: world.gens[-1].rolled_back)
        await world.until(lambda: world.gens[-1].state is State.FAILED)
        await asyncio.sleep(600)
        assert [g.spec.fingerprint for g in world.gens] == ["new", "old"]
        status = world.status()
        assert status.state == "failed" and status.last_error.message == "a layer is missing"
        world.files("mended")
        await world.until(lambda: world.serving() == "mended")


async def test_the_old_files_put_back_are_loaded_though_they_could_not_come_back_before():
    world = World(tier=None, new={"load_error": BROKEN})
    async with world.models.running():
        world.files("old")
        await world.until(lambda: world.serving() == "old")
        world.same["old"] = False
        world.files("new")
        await world.until(lambda: world.gens[-1].rolled_back and world.gens[-1].ended.is_set())
        world.same["old"] = True
        world.files("old")
        await world.until(lambda: world.serving() == "old")
        status = world.status()
        assert status.last_error is None and not world.gens[-1].rolled_back


async def test_a_new_version_that_fails_gives_way_to_the_one_before():
    world = World(v2={"load_error": BROKEN})
    async with world.models.running():
        world.files("v1", 1)
        await world.until(lambda: world.serving() == "v1")
        world.files("v2", 2)
        await world.until(lambda: world.serving() is None)
        await world.until(lambda: world.serving() == "v1")
        assert world.status().serving_version == 1 and world.status().last_error.version == 2
        await asyncio.sleep(600)
        assert world.serving() == "v1" and len(world.hosts["v2"]) == 2


async def test_a_worker_that_dies_too_often_while_it_loads_gives_way_too():
    world = World(new={"load_s": 1e6})
    async with world.models.running():
        world.files("old")
        await world.until(lambda: world.serving() == "old")
        world.files("new")
        for _ in range(3):
            await world.until(lambda: world.gens[-1].state is State.LOADING)
            assert world.gens[-1].spec.fingerprint == "new"
            world.hosts["new"][-1].kill("out of memory")
            await asyncio.sleep(0.01)
        await world.until(lambda: world.serving() == "old")
        assert world.calls("old") == [["load", "sleep", "wake"]]
        assert isinstance(world.gens[-2].error, WorkerDiedError)


async def test_one_that_came_back_and_dies_is_started_again_as_such():
    world = World(new={"load_error": BROKEN})
    async with world.models.running():
        world.files("old")
        await world.until(lambda: world.serving() == "old")
        world.files("new")
        await world.until(lambda: world.serving() == "old" and world.gens[-1].rolled_back)
        world.hosts["old"][-1].kill("killed by signal 9")
        await asyncio.sleep(0.01)
        await world.until(lambda: world.serving() == "old")
        assert world.gens[-1].rolled_back and not world.gens[-1].woken
        assert world.status().last_error.message == "a layer is missing"
        assert world.calls("new") == [["validate", "stop"], ["load", "stop"]]


async def test_whoever_asks_has_the_new_one_tried_again_and_mended_files_end_the_matter():
    world = World(new={"load_error": BROKEN})
    async with world.models.running():
        world.files("old")
        await world.until(lambda: world.serving() == "old")
        world.files("new")
        await world.until(lambda: world.serving() == "old" and world.gens[-1].rolled_back)
        gen = await load(world.models, "m")
        assert gen.spec.fingerprint == "new" and gen.error is BROKEN
        await world.until(lambda: world.serving() == "old")
        world.files("mended")
        await world.until(lambda: world.serving() == "mended")
        await world.until(lambda: len(world.gens) == 1)
        assert not world.models.register.fallback and world.status().last_error is None
        assert [c[-1] for c in world.calls("old")] == ["stop"]


async def test_unloaded_it_does_not_come_back():
    world = World(new={"load_error": BROKEN})
    async with world.models.running():
        world.files("old")
        await world.until(lambda: world.serving() == "old")
        world.files("new")
        await world.until(lambda: world.gens[-1].state is State.LOADING)
        await unload(world.models, "m")
        await asyncio.sleep(60)
        assert world.serving() is None and not world.models.register.fallback
        assert world.calls("old") == [["load", "sleep", "stop"]]
        assert all(ledger.held == 0 for ledger in world.models.ledgers.values())


async def test_a_forced_reload_of_the_same_files_has_a_way_back_too():
    world = World()
    async with world.models.running():
        world.files("old")
        await world.until(lambda: world.serving() == "old")
        world.knobs["old"] = {"load_error": BROKEN}
        gen = await load(world.models, "m", force=True)
        assert gen.error is BROKEN
        await world.until(lambda: world.serving() == "old")
        assert world.calls("old") == [
            ["load", "sleep", "wake"],
            ["validate", "stop"],
            ["load", "stop"],
        ]


async def test_the_old_one_comes_back_on_another_gpu_where_its_own_is_busy_by_then():
    crashes = {"load_error": WorkerDiedError("it died")}
    world = World(devices=("cuda:0", "cuda:1"), new=crashes)
    models = world.models

    def files(print_, *others):
        gpus = ("cuda:0", "cuda:1")
        told = [replace(spec("m", 1, print_, 60), devices=gpus)]
        told += [replace(spec(n, 1, n, size), devices=(gpu,)) for n, size, gpu in others]
        models.observe(folders(*told))

    there, busy = ("x", 60, "cuda:1"), ("y", 80, "cuda:0")
    async with models.running():
        files("old", there)
        await world.until(lambda: models.routes.find("x") and world.serving() == "old")
        models.pin("x", True)
        files("new", there)
        await world.until(
            lambda: world.gens[-1].error is not None and world.gens[-1].ended.is_set()
        )
        assert world.gens[0].state is State.ASLEEP
        files("new", there, busy)  # between two tries of the new one it has the old one's GPU
        await world.until(lambda: models.routes.find("y"))
        with models.routes.find("y").lease():
            files("new", busy)
            await world.until(lambda: world.serving() == "old")
            assert models.routes.find("m").device == "cuda:1"
            assert len(world.gens) < 10
        assert world.calls("old") == [["load", "sleep", "stop"], ["load"]]


async def test_replace_asks_nothing_and_has_no_way_back():
    world = World(new={"load_error": BROKEN})
    async with world.models.running():
        world.files("old")
        await world.until(lambda: world.serving() == "old")
        world.files("new", reload="replace")
        await asyncio.sleep(60)
        assert world.serving() is None
        assert world.calls("old") == [["load", "stop"]] and world.calls("new") == [["load", "stop"]]


async def test_where_there_is_room_for_both_nothing_is_looked_at_first():
    world = World(new={"load_error": BROKEN})
    async with world.models.running():
        world.files("old", n_bytes=40)
        await world.until(lambda: world.serving() == "old")
        world.files("new", n_bytes=40)
        await asyncio.sleep(60)
        assert world.serving() == "old" and world.calls("new") == [["load", "stop"]]


async def test_files_that_change_while_they_are_looked_at_are_looked_at_anew():
    world = World(new={"validate_s": 50}, newer={"validate_s": 1})
    async with world.models.running():
        world.files("old")
        await world.until(lambda: world.serving() == "old")
        world.files("new")
        await asyncio.sleep(5)
        world.files("newer")
        await world.until(lambda: world.serving() == "newer", 10)
        assert world.calls("new") == [["validate", "stop"]]


async def test_files_that_are_as_before_again_wake_the_old_one_at_once():
    world = World(new={"load_s": 1000})
    async with world.models.running():
        world.files("old")
        await world.until(lambda: world.serving() == "old")
        world.files("new")
        await world.until(lambda: world.gens[-1].state is State.LOADING)
        world.files("old")
        await world.until(lambda: world.serving() == "old", 5)
        assert world.calls("old") == [["load", "sleep", "wake"]] and not world.gens[-1].rolled_back


async def test_a_request_that_waits_is_answered_by_the_one_that_comes_back():
    world = World(new={"load_error": BROKEN})
    async with world.models.running():
        world.files("old")
        await world.until(lambda: world.serving() == "old")
        world.files("new")
        await world.until(lambda: world.gens[-1].state is State.LOADING)
        leases = []
        await world.models.wait_for("m", None, leases.append)
        assert leases[0].generation.spec.fingerprint == "old"
        leases[0].end()
