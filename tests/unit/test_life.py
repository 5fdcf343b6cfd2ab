"""One generation against a fake host, in virtual time: seconds here cost nothing."""

import asyncio

import pytest

from repository.errors import CheckFailedError, FilesChangedError, LoadTimeoutError, WorkerDiedError
from repository.life import Books, live
from repository.lifecycle.states import Event, State
from tests.fakes.heart import means, newborn, spec
from tests.fakes.host import FakeHost
from tests.fakes.stage import Stage

pytestmark = pytest.mark.looptime


async def test_happy_life():
    stage = Stage(FakeHost(load_s=3))
    await asyncio.sleep(4)
    assert stage.gen.state is State.READY and stage.free[0] == 0
    assert stage.gen.batcher is not None and stage.gen.signature is not None
    stage.gen.retire("test")
    await stage.life
    assert stage.path() == ["warming", "ready", "draining", "unloading", "gone"]
    assert stage.ended() == (["load", "stop"], 10)


async def test_a_lease_holds_the_host_until_it_ends(looptime):
    stage = Stage()
    await asyncio.sleep(1)
    with stage.gen.lease():
        stage.gen.retire("test")
        await asyncio.sleep(20)
        assert stage.gen.state is State.DRAINING and stage.host.calls == ["load"]
        assert not stage.gen.confirmed
    await stage.life
    assert looptime == 21
    assert stage.gen.drain_s == 20 and stage.gen.confirmed


async def test_draining_has_an_end(looptime):
    stage = Stage(drain_s=30)
    await asyncio.sleep(1)
    with stage.gen.lease():
        stage.gen.retire("test")
        await stage.life
    assert looptime == 31 and stage.gen.story[-2].note == "1 leases cut off"


@pytest.mark.parametrize("retire_at", [0, 1, 2.9])
async def test_retired_while_loading_stops_the_host_once(retire_at, looptime):
    stage = Stage(FakeHost(load_s=3))
    await asyncio.sleep(retire_at)
    stage.gen.retire("test")
    await stage.life
    assert stage.gen.state is State.GONE and looptime == retire_at
    assert stage.ended() in ((["load", "stop"], 10), (["stop"], 10))


async def test_retired_while_warming_never_becomes_ready():
    async def slow(host, what, loaded):
        await asyncio.sleep(5)
        return ""

    stage = Stage(rehearse=slow)
    await asyncio.sleep(1)
    stage.gen.retire("test")
    await stage.life
    assert stage.path() == ["warming", "unloading", "gone"]


async def test_a_check_that_disagrees_fails_the_generation():
    async def disagree(host, what, loaded):
        raise CheckFailedError("label differs")

    stage = Stage(rehearse=disagree)
    await stage.life
    assert stage.path() == ["warming", "failing", "failed"]
    assert "label differs" in str(stage.gen.error) and stage.ended() == (["load", "stop"], 10)


async def test_files_that_change_during_the_load_fail_it():
    async def changed(what):
        return False

    stage = Stage(unchanged=changed)
    await stage.life
    assert isinstance(stage.gen.error, FilesChangedError) and stage.free[0] == 10


async def test_a_load_that_takes_too_long_is_ended(looptime):
    stage = Stage(FakeHost(load_s=1000), load_timeout_s=60)
    await stage.life
    assert isinstance(stage.gen.error, LoadTimeoutError) and looptime == 60
    assert stage.ended() == (["load", "stop"], 10)


async def test_a_warm_up_that_hangs_is_ended_too(looptime):
    async def hang(host, what, loaded):
        await asyncio.sleep(1e6)
        return ""

    stage = Stage(rehearse=hang, load_timeout_s=60)
    await stage.life
    assert isinstance(stage.gen.error, LoadTimeoutError) and looptime == 60
    assert stage.ended() == (["load", "stop"], 10)


async def test_a_host_that_cannot_even_be_made_gives_the_memory_back():
    def never(what):
        raise OSError("no processes left")

    stage = Stage()
    stage.life.cancel()
    await asyncio.wait({stage.life})
    other = newborn(spec(n_bytes=10))
    other.step(Event.ADMIT)
    given = []
    await live(other, means(never), Books(given.append))
    assert other.state is State.FAILED and given == [other]


async def test_a_dead_host_fails_the_generation():
    stage = Stage()
    await asyncio.sleep(1)
    stage.host.kill("exit code -9")
    await stage.life
    assert stage.path()[-2:] == ["failing", "failed"]
    assert isinstance(stage.gen.error, WorkerDiedError) and "exit code -9" in str(stage.gen.error)
    assert stage.ended() == (["load", "stop"], 10)


async def test_shutdown_without_patience_still_gives_the_memory_back():
    stage = Stage()
    await asyncio.sleep(1)
    stage.life.cancel()
    await asyncio.wait({stage.life})
    assert stage.gen.state is State.FAILED and stage.ended() == (["load", "stop"], 10)


async def test_a_host_that_dies_while_draining_ends_it_early(looptime):
    stage = Stage()
    await asyncio.sleep(1)
    with stage.gen.lease():
        stage.gen.retire("test")
        await asyncio.sleep(1)
        stage.host.kill("exit code -9")
        await stage.life
    assert looptime == 2 and stage.gen.state is State.GONE


async def test_a_lease_begins_only_in_ready():
    from repository.errors import ModelNotReadyError

    gen = newborn()
    with pytest.raises(ModelNotReadyError, match="queued"):
        gen.lease().begin()
    assert gen.leases == 0 and gen.idle.is_set()


async def test_a_host_that_dies_after_it_was_told_to_go_has_gone():
    stage = Stage()
    await asyncio.sleep(1)
    stage.gen.retire("test")
    stage.host.kill("exit code -9")
    await stage.life
    assert stage.gen.state is State.GONE and stage.gen.error is None


async def test_a_file_system_that_hangs_when_it_is_asked_again_ends_the_load(looptime):
    async def hang(what):
        await asyncio.sleep(1e6)
        return True

    stage = Stage(unchanged=hang, load_timeout_s=60)
    await stage.life
    assert isinstance(stage.gen.error, LoadTimeoutError) and looptime == 60
