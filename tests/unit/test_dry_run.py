"""What a load would do is told before it is done, by the same decision, and nothing changes."""

import asyncio
from dataclasses import replace

import pytest

from repository.dry_run import foresee
from repository.lifecycle.generation import Trigger
from repository.lifecycle.ledger import MemoryLedger
from repository.lifecycle.placement import HOST
from repository.lifecycle.states import State
from repository.lifecycle.wishes import Wishes
from repository.messages import Loaded
from repository.reconciler import Reconciler
from tests.fakes.heart import folder, load, means, spec
from tests.fakes.host import FakeHost

pytestmark = pytest.mark.looptime

MIB, GIB = 1 << 20, 1 << 30
GPUS = ("cuda:0", "cuda:1")


def sized(name, n_mib, version=1, print_="f1", devices=("cuda:0",), **config):
    return replace(spec(name, version, print_, n_mib * MIB, **config), devices=devices)


def machine(*, sleep=False, **rest):
    def host(what):
        return FakeHost(
            load_s=1.0,
            loaded=Loaded(abilities=frozenset({"sleep"} if sleep else ())),
            memory={"cuda:0": {"weights": what.bytes_needed}},
            asleep={HOST: {"weights": what.bytes_needed}, "cuda:0": {"context": 20 * MIB}},
        )

    ledgers = {device: MemoryLedger(device, GIB) for device in (*GPUS, "cpu", HOST)}
    return Reconciler(means(host), ledgers, Wishes(everything=False), **rest)


def lies_there(models, *specs):
    by_name = {}
    for one in specs:
        by_name.setdefault(one.model, []).append(one)
    models.observe({**models.folders, **{name: folder(*of) for name, of in by_name.items()}})


def told(models, name):
    held = {device: ledger.held for device, ledger in models.ledgers.items()}
    found = foresee(models, models.folders[name])
    assert held == {device: ledger.held for device, ledger in models.ledgers.items()}
    assert not models._queue
    return found


async def test_what_fits_says_where_and_what_it_needs():
    models = machine(needs=lambda what, device: (500 * MIB, "measured"))
    async with models.running():
        lies_there(models, sized("a", 300, devices=GPUS, instances=2))
        found = told(models, "a")
        assert found.would_load and not found.would_wait and found.would_evict == ()
        assert found.devices == GPUS and found.needs == dict.fromkeys(GPUS, 250 * MIB)
        assert (found.bytes_needed, found.source) == (250 * MIB, "measured")  # on its first device
        assert found.message == "Model a would be loaded"


async def test_who_would_leave_and_how_much_is_missing():
    models = machine()
    async with models.running():
        lies_there(models, sized("a", 300), sized("b", 600), sized("c", 400))
        for name in "ab":
            await load(models, name)
        await asyncio.sleep(60)
        found = told(models, "c")
        assert found.would_load and not found.would_wait and len(found.would_evict) == 1
        assert found.message == (
            f"Model c would be loaded after {found.would_evict[0]} made room; "
            f"276MiB of cuda:0 are missing now"
        )
        assert not found.would_replace and not found.would_wake


async def test_who_would_sleep_is_said_to_sleep():
    models = machine(sleep=True)
    async with models.running():
        lies_there(models, sized("a", 900), sized("c", 400))
        await load(models, "a")
        await asyncio.sleep(60)
        assert "after a fell asleep" in told(models, "c").message


async def test_one_that_has_only_just_come_is_waited_for():
    models = machine()
    async with models.running():
        lies_there(models, sized("a", 900), sized("c", 400))
        await load(models, "a")
        found = told(models, "c")
        assert found.would_load and found.would_wait and found.would_evict == ("a",)


async def test_busy_ones_are_waited_for_and_pinned_ones_are_not():
    models = machine()
    async with models.running():
        lies_there(models, sized("a", 900), sized("c", 400))
        gen = await load(models, "a")
        await asyncio.sleep(60)
        with gen.lease():
            found = told(models, "c")
            assert found.would_load and found.would_wait and found.would_evict == ()
            assert "276MiB of cuda:0 are missing now; it would wait" in found.message
        models.pin("a", True)
        found = told(models, "c")
        assert not found.would_load and not found.would_wait and "pinned: a:1#1" in found.message


async def test_its_own_older_generation_would_have_to_leave():
    models = machine()
    async with models.running():
        lies_there(models, sized("a", 700))
        await load(models, "a")
        await asyncio.sleep(60)
        models.wishes.unload("a")  # so that the change below starts nothing
        models.folders["a"] = folder(sized("a", 700, print_="f2"))
        found = told(models, "a")
        assert found.would_load and found.would_replace and "there would be a gap" in found.message


async def test_several_versions_are_taken_together():
    models = machine()
    async with models.running():
        lies_there(models, sized("a", 300, 1), sized("a", 200, 2))
        assert told(models, "a").needs == {"cuda:0": 500 * MIB}


async def test_a_sleeper_would_be_woken():
    models = machine(sleep=True)
    async with models.running():
        lies_there(models, sized("a", 900), sized("c", 400))
        gen = await load(models, "a")
        await asyncio.sleep(60)
        gen.retire("test", sleeps=True)
        models.wishes.evict("a")
        await gen.rested.wait()
        assert gen.state is State.ASLEEP
        found = told(models, "a")
        assert found.would_load and found.would_wake and found.devices == ("cuda:0",)
        assert found.message == "Model a would be woken"


async def test_what_is_loaded_already_would_not_be_loaded():
    models = machine()
    async with models.running():
        lies_there(models, sized("a", 300))
        await load(models, "a")
        found = told(models, "a")
        assert not found.would_load and found.devices == ("cuda:0",)
        assert found.message == "Model a is loaded or loading already"


async def test_those_who_wait_already_come_before_it():
    models = machine()
    async with models.running():
        lies_there(models, sized("x", 600), sized("big", 900), sized("a", 300))
        with (await load(models, "x")).lease():
            assert not told(models, "a").would_wait
            (queued,) = models.want("big", trigger=Trigger.API)
            found = foresee(models, models.folders["a"])
            assert found.would_load and found.would_wait and not found.would_evict
            (gen,) = models.want("a", trigger=Trigger.API)
            await asyncio.sleep(1)
            assert queued.state is gen.state is State.QUEUED
