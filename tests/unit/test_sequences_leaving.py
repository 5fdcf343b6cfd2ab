"""Reloads and ends of a model while sequences are open, in virtual time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from repository.config import Sequences
from repository.config import State as Kept
from repository.errors import ModelNotReadyError
from repository.life import Books, live
from repository.lifecycle.generation import Generation
from repository.lifecycle.routes import Routes
from repository.lifecycle.states import Event, State
from repository.messages import Loaded
from repository.sequences.asked import going_on
from tests.fakes.heart import means, newborn, spec
from tests.fakes.host import FakeHost
from tests.sequences import CONTROLS, KNOWN, STATE, adding, say, value_of

pytestmark = [pytest.mark.asyncio, pytest.mark.looptime]


class Two:
    """A generation, and a newer one of the same model as soon as `reload` is called, behind routes."""

    def __init__(self, **rules: Any) -> None:
        said = {"controls": CONTROLS, "states": (STATE,), "idle_us": 5_000_000, **rules}
        self.rules = Sequences(**said)
        self.routes = Routes()
        self.lives: dict[Generation, asyncio.Task[None]] = {}

    def start(self, serial: int) -> Generation:
        clock = asyncio.get_running_loop().time
        gen = newborn(spec(sequences=self.rules), serial, clock=clock)
        gen.on_step = self._stepped
        gen.placement = gen.options[0]
        gen.step(Event.ADMIT)
        loaded = Loaded(inputs=KNOWN, max_batch_size=4)
        host = FakeHost(infer_s=0.1, result=adding, loaded=loaded)
        life = live(gen, means(lambda _: host, drain_s=30, clock=clock), Books(lambda _: None))
        self.lives[gen] = asyncio.create_task(life)
        return gen

    def _stepped(self, gen: Generation, before: State) -> None:
        self.routes.update("m", [*self.lives] or [gen])

    async def ask(self, *args: Any, **flags: Any) -> tuple[int, float]:
        """(which generation, what it answered)"""
        request = say(*args, **flags)
        sequence = going_on(request.parameters)
        gen = self.routes.begun("m", None, sequence) if sequence is not None else None
        late = gen is not None
        gen = gen or self.routes.find("m")
        assert gen is not None and gen.batcher is not None
        with gen.lease(late=late):
            return gen.serial, value_of(await gen.batcher.submit(request))


async def ready(two: Two) -> Generation:
    gen = two.start(1)
    await gen.settled.wait()
    assert gen.state is State.READY
    return gen


async def test_an_open_sequence_goes_on_where_it_began_and_new_ones_begin_in_the_new(looptime):
    two = Two()
    old = await ready(two)
    assert await two.ask(1, 5, start=True) == (1, 1)
    new = two.start(2)
    await new.settled.wait()
    old.retire("a newer one serves")
    await asyncio.sleep(3)
    assert old.state is State.DRAINING
    assert await two.ask(2, 5) == (1, 3)
    assert await two.ask(7, 6, start=True) == (2, 7)
    assert await two.ask(4, 5, end=True) == (1, 7)
    await two.lives[old]
    assert old.state is State.GONE and looptime < 5
    assert await two.ask(1, 6) == (2, 8)


async def test_a_generation_is_gone_when_its_last_sequence_was_silent_too_long(looptime):
    two = Two()
    old = await ready(two)
    await two.ask(1, 5, start=True)
    old.retire("test")
    await two.lives[old]
    assert looptime == pytest.approx(5.1, abs=0.1)
    assert old.leases == 0 and not old.sequences


async def test_draining_ends_though_a_sequence_goes_on():
    two = Two()
    old = await ready(two)
    await two.ask(1, 5, start=True)
    old.retire("test")
    while two.routes.begun("m", None, 5) is old:
        await two.ask(1, 5)
        await asyncio.sleep(1)
    assert asyncio.get_running_loop().time() >= 30
    await two.lives[old]
    assert old.state is State.GONE and old.leases == 0


async def test_a_start_of_an_id_that_is_open_in_the_old_goes_to_the_new():
    two = Two()
    old = await ready(two)
    await two.ask(1, 5, start=True)
    new = two.start(2)
    await new.settled.wait()
    old.retire("a newer one serves")
    await asyncio.sleep(0)
    assert await two.ask(10, 5, start=True) == (2, 10)
    assert await two.ask(1, 5) == (2, 11)


async def test_nobody_else_gets_a_late_lease():
    two = Two()
    old = await ready(two)
    await two.ask(1, 5, start=True)
    old.retire("test")
    await asyncio.sleep(1)
    with pytest.raises(ModelNotReadyError):
        old.lease().begin()
    assert two.routes.find("m") is None and two.routes.begun("m", 2, 5) is None
    assert two.routes.begun("m", 1, 5) is old


async def test_an_open_sequence_is_a_lease_that_counts_for_nothing_else():
    two = Two()
    gen = await ready(two)
    await two.ask(1, 5, start=True)
    assert (gen.leases, gen.served) == (1, 1)
    await two.ask(1, 5, end=True)
    assert (gen.leases, gen.served) == (0, 2)


async def test_a_model_whose_states_are_not_as_its_config_says_is_not_loaded():
    two = Two(states=(Kept(input="x", output="y", datatype="INT64", shape=(1,)),))
    gen = two.start(1)
    await two.lives[gen]
    assert gen.state is State.FAILED and "INT64" in str(gen.error)
