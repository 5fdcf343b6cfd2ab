"""A life that falls asleep, and the next one that wakes it; in virtual time."""

import asyncio

import pytest

from repository.errors import LoadFailedError, WorkerDiedError
from repository.life import BED_WAIT_S, examine
from repository.lifecycle.placement import HOST
from repository.lifecycle.states import State
from tests.fakes.heart import means, newborn
from tests.fakes.host import FakeHost
from tests.fakes.stage import SLEEPER, Stage

pytestmark = pytest.mark.looptime

ASLEEP = {"cpu": {"context": 2}, HOST: {"weights": 6}}


def sleeper(**knobs):
    knobs = {"memory": {"cpu": {"weights": 6, "context": 2}}, "asleep": ASLEEP} | knobs
    return FakeHost(loaded=SLEEPER, **knobs)


async def fallen_asleep(host=None, **rest):
    stage = Stage(host or sleeper(), **rest)
    await asyncio.sleep(1)
    stage.gen.retire("idle", sleeps=True)
    await stage.gen.rested.wait()
    return stage


async def test_asleep_it_keeps_its_host_and_only_what_that_still_has():
    stage = await fallen_asleep()
    assert stage.gen.state is State.ASLEEP and stage.gen.held == {"cpu": 2, HOST: 6}
    assert stage.free == (8, 4) and stage.host.calls == ["load", "sleep"]
    assert stage.note() == "6B in host memory" and "sleep" in stage.noted
    stage.gen.retire("unloaded")
    await stage.life
    assert stage.path()[-4:] == ["draining", "asleep", "unloading", "gone"]
    assert stage.free == (10, 10) and stage.host.calls == ["load", "sleep", "stop"]


async def test_it_sleeps_only_when_its_last_request_has_ended(looptime):
    stage = Stage(sleeper())
    await asyncio.sleep(1)
    with stage.gen.lease():
        stage.gen.retire("idle", sleeps=True)
        await asyncio.sleep(9)
        assert stage.gen.state is State.DRAINING and stage.host.calls == ["load"]
    await stage.gen.rested.wait()
    assert looptime == 10 and stage.gen.state is State.ASLEEP
    stage.gen.retire("test")
    await stage.life


async def test_what_had_to_be_cut_off_cannot_sleep_and_is_unloaded():
    stage = Stage(sleeper(), drain_s=5)
    await asyncio.sleep(1)
    with stage.gen.lease():
        stage.gen.retire("idle", sleeps=True)
        await stage.life
    assert stage.host.calls == ["load", "stop"] and stage.free == (10, 10)
    assert stage.gen.story[-2].note == "1 leases cut off" and not stage.gen.sleeps


@pytest.mark.parametrize(
    ("knobs", "rest", "note"),
    [
        ({"sleep_error": OSError("no pages")}, {}, "could not sleep: OSError: no pages"),
        ({"sleep_s": 1e6}, {"load_timeout_s": 60}, "had not fallen asleep after 60 s"),
        ({}, {"tier": 5}, "the host tier has no place for 6B"),
        ({"asleep": {HOST: {"weights": 11}}}, {}, "the host tier has no place for 11B"),
    ],
)
async def test_who_cannot_sleep_is_unloaded_and_its_story_says_why(knobs, rest, note):
    stage = await fallen_asleep(sleeper(**knobs), **rest)
    await stage.life
    assert stage.gen.state is State.GONE and stage.gen.error is None
    assert note in stage.gen.story[-2].note
    assert stage.free == (10, stage.ledgers[HOST].capacity)
    assert stage.host.calls[-1] == "stop" and stage.host.calls.count("stop") == 1


async def test_a_place_is_waited_for_two_seconds(looptime):
    stage = await fallen_asleep(bed_s=BED_WAIT_S + 1)
    await stage.life
    assert looptime == 1 + BED_WAIT_S and stage.host.calls == ["load", "stop"]
    assert stage.free == (10, 10)


@pytest.mark.parametrize("during", ["bed_s", "sleep_s", "drain"])
async def test_told_to_end_on_its_way_to_bed_it_does_so_at_once(during, looptime):
    knobs = {"sleep_s": 50.0} if during == "sleep_s" else {}
    stage = Stage(sleeper(**knobs), bed_s=1.0 if during == "bed_s" else 0.0)
    await asyncio.sleep(1)
    lease = stage.gen.lease()
    lease.begin()
    stage.gen.retire("idle", sleeps=True)
    if during != "drain":
        lease.end()
    await asyncio.sleep(0.5)
    stage.gen.retire("unloaded")
    if during == "drain":
        lease.end()
    await stage.life
    assert looptime == 1.5 and stage.gen.state is State.GONE and stage.free == (10, 10)
    assert stage.host.calls[-1] == "stop" and not stage.gen.sleeps


async def test_a_worker_that_dies_asleep_is_no_failure_of_the_model():
    stage = await fallen_asleep()
    stage.host.kill("killed by signal 9")
    await stage.life
    assert stage.gen.state is State.GONE and stage.gen.error is None
    assert "its worker died asleep: killed by signal 9" in stage.gen.story[-2].note
    assert stage.free == (10, 10) and stage.host.calls == ["load", "sleep", "stop"]


async def test_the_server_that_ends_without_patience_ends_what_sleeps_too():
    stage = await fallen_asleep()
    stage.life.cancel()
    await asyncio.wait({stage.life})
    assert stage.gen.state is State.GONE and stage.free == (10, 10)
    assert stage.host.calls == ["load", "sleep", "stop"]


async def test_the_next_one_wakes_the_very_host_and_has_its_memory(looptime):
    old = await fallen_asleep(sleeper(load_s=0.5, wake_s=0.25))
    tried = []

    async def rehearse(host, what, loaded):
        tried.append(what)
        return ""

    new = Stage(heir_of=old, rehearse=rehearse)
    assert (
        old.gen.state is State.GONE and old.gen.held == {} and new.gen.held == {"cpu": 10, HOST: 6}
    )
    await old.life
    await new.gen.settled.wait()
    assert looptime == 1.25 and new.gen.woken and not tried and "wake" in new.noted
    assert (
        new.made == [] and new.gen.host is old.host and old.host.calls == ["load", "sleep", "wake"]
    )
    assert old.free == (0, 10) and new.gen.measured == {"cpu": {"weights": 6, "context": 2}}
    assert [s.note for s in new.gen.story if s.state is State.WARMING] == ["woken"]
    with new.gen.lease():
        assert new.gen.batcher is not None
    new.gen.retire("test")
    await new.life
    assert old.free == (10, 10) and old.host.calls[-1] == "stop"


@pytest.mark.parametrize("knobs", [{"wake_error": MemoryError("oom")}, {"wake_s": 1e6}])
async def test_one_that_cannot_be_woken_is_stopped_and_loaded_anew(knobs):
    old = await fallen_asleep(sleeper(**knobs))
    new = Stage(FakeHost(load_s=3), heir_of=old, load_timeout_s=60)
    await new.gen.settled.wait()
    assert new.gen.state is State.READY and not new.gen.woken
    assert old.host.calls == ["load", "sleep", "wake", "stop"] and new.host.calls == ["load"]
    assert old.free == (0, 10)
    assert any("could not be woken" in step.note for step in new.gen.story)
    new.gen.retire("test")
    await new.life
    assert old.free == (10, 10) and new.host.calls == ["load", "stop"]


async def test_one_that_died_just_before_it_was_woken_is_loaded_anew():
    old = await fallen_asleep()
    old.host.kill("killed by signal 9")
    new = Stage(FakeHost(), heir_of=old)
    await asyncio.gather(old.life, new.gen.settled.wait())
    assert new.gen.state is State.READY and old.host.calls[-1] == "stop"
    new.gen.retire("test")
    await new.life
    assert old.free == (10, 10)


async def test_retired_while_it_wakes_it_stops_the_host_once():
    old = await fallen_asleep(sleeper(wake_s=5))
    new = Stage(heir_of=old)
    await asyncio.sleep(1)
    new.gen.retire("unloaded")
    await new.life
    assert new.gen.state is State.GONE and old.free == (10, 10)
    assert old.host.calls == ["load", "sleep", "wake", "stop"] and new.made == []


async def test_one_that_comes_back_is_not_loaded_from_files_of_another():
    async def overwritten(what):
        return False

    stage = Stage(rolled_back=True, unchanged=overwritten)
    await stage.life
    assert isinstance(stage.gen.error, LoadFailedError) and stage.host.calls == ["stop"]
    assert "overwritten" in str(stage.gen.error)


async def test_what_is_examined_takes_no_memory_and_its_host_is_stopped():
    host = FakeHost(validate_s=1)
    assert await examine(newborn(), means(lambda what: host)) is None
    assert host.calls == ["validate", "stop"]


@pytest.mark.parametrize(
    "knobs", [{"validate_error": LoadFailedError("a tensor is missing")}, {"validate_s": 1e6}]
)
async def test_what_is_wrong_with_it_is_told(knobs):
    host = FakeHost(**knobs)
    found = await examine(newborn(), means(lambda what: host, load_timeout_s=60))
    assert isinstance(found, LoadFailedError) and host.calls == ["validate", "stop"]


async def test_a_worker_that_dies_of_the_files_is_told_as_such():
    host = FakeHost(validate_s=10)
    looking = asyncio.create_task(examine(newborn(), means(lambda what: host)))
    await asyncio.sleep(1)
    host.kill("killed by signal 11")
    assert isinstance(await looking, WorkerDiedError) and host.calls == ["validate", "stop"]


async def test_nobody_goes_on_looking_when_it_is_not_wanted_any_more(looptime):
    host, gen = FakeHost(validate_s=100), newborn()
    looking = asyncio.create_task(examine(gen, means(lambda what: host)))
    await asyncio.sleep(1)
    gen.retire("overtaken")
    assert await looking is None and looptime == 1 and host.calls == ["validate", "stop"]
