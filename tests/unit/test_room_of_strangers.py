"""What strangers use of a GPU, what they give back, and what an end left behind: the whole heart over a
GPU that a test speaks for, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from repository.errors import NoRoomError
from repository.estimates import Estimates
from repository.lifecycle.generation import Generation, Trigger
from repository.lifecycle.states import State
from repository.measuring import LOOK_S, Measuring
from repository.reports import GpuReport, GpuUse
from repository.spec import ModelSpec
from tests.fakes.heart import folders, reconciler, spec, unload
from tests.fakes.host import FakeHost

pytestmark = pytest.mark.looptime
GPU = "cuda:0"
MIB = 1 << 20
TOTAL = 1000 * MIB


class Machine:
    """A GPU of 1000 MiB. Hosts take what their specs need when they are loaded, and give it back when
    they are stopped, but for what `leaks`; `strangers` use the rest."""

    def __init__(self, strangers: int = 0, leaks: int = 0, **rest: float) -> None:
        self.strangers, self.leaks = strangers * MIB, leaks * MIB
        self.hosts: list[FakeHost] = []
        self.models = reconciler(
            self.make_host,
            TOTAL,
            devices=[GPU],
            lives={"end": lambda gen, host, stop_s: self.measuring.end(gen, host, stop_s)},
            **rest,
        )
        self.ledger = self.models.ledgers[GPU]
        self.ledger.total = TOTAL
        self.measuring = Measuring(
            lambda: [gen for of in self.models.generations.values() for gen in of],
            self.models.ledgers,
            Estimates(),
            gpus=self.use,
            room=self.models.room_came,
        )

    def make_host(self, what: ModelSpec) -> FakeHost:
        host = FakeHost(memory={GPU: {"weights": what.bytes_needed}}, load_s=1.0)
        self.hosts.append(host)
        return host

    async def use(self) -> GpuUse:
        used = self.strangers
        for host in self.hosts:
            if "load" in host.calls and host.spec is not None:
                gone = "stop" in host.calls
                used += min(self.leaks, host.spec.bytes_needed) if gone else host.spec.bytes_needed
        return (GpuReport(0, "a GPU", "u", TOTAL, used, TOTAL - used),)

    @asynccontextmanager
    async def running(self, **mib: int) -> AsyncIterator[None]:
        on_gpu = [replace(spec(n, n_bytes=size * MIB), devices=(GPU,)) for n, size in mib.items()]
        async with self.models.running():
            self.models.observe(folders(*on_gpu))
            await self.measuring.look()
            rounds = asyncio.create_task(self.measuring.run())
            yield
            rounds.cancel()

    def want(self, name: str) -> Generation:
        (gen,) = self.models.want(name, trigger=Trigger.API)
        return gen

    async def load(self, name: str) -> Generation:
        gen = self.want(name)
        await gen.settled.wait()
        return gen


async def test_what_strangers_use_is_not_handed_out() -> None:
    machine = Machine(strangers=700, room_wait_s=0.0)
    async with machine.running(m=400):
        gen = await machine.load("m")
        assert isinstance(gen.error, NoRoomError) and machine.hosts == []


async def test_who_waits_for_room_loads_when_strangers_leave() -> None:
    machine = Machine(strangers=300, room_wait_s=60.0)
    async with machine.running(m=400, n=400):
        held = await machine.load("m")
        with held.lease():  # busy, so that it cannot be driven out
            waiting = machine.want("n")
            await asyncio.sleep(2 * LOOK_S)
            assert waiting.state is State.QUEUED
            machine.strangers = 100 * MIB
            await asyncio.sleep(2 * LOOK_S)
            assert waiting.state is State.READY


async def test_what_an_unload_left_behind_is_not_handed_out_twice() -> None:
    machine = Machine(leaks=300, room_wait_s=0.0)
    async with machine.running(m=600, n=800, o=700):
        gen = await machine.load("m")
        await unload(machine.models, "m")
        assert gen.leaked == 300 * MIB and not gen.confirmed
        assert machine.ledger.held == 0 and machine.ledger.foreign == 300 * MIB
        assert isinstance((await machine.load("n")).error, NoRoomError)
        assert (await machine.load("o")).state is State.READY


async def test_an_unload_that_gives_all_back_is_confirmed_and_leaves_no_stranger() -> None:
    machine = Machine(strangers=50)
    async with machine.running(m=600, n=300):
        other = await machine.load("n")
        gen = await machine.load("m")
        await unload(machine.models, "m")
        assert gen.confirmed and gen.leaked == 0 and other.state is State.READY
        assert machine.ledger.foreign == 50 * MIB
        assert machine.measuring.ours()[GPU] == 300 * MIB


async def test_two_that_load_and_leave_at_once_are_never_taken_for_strangers() -> None:
    machine = Machine()
    async with machine.running(a=300, b=300, c=300):
        for _ in range(4):
            await asyncio.gather(*(machine.load(name) for name in "abc"))
            await machine.measuring.look()
            assert machine.ledger.foreign == 0 and machine.ledger.held == 900 * MIB
            await asyncio.gather(*(unload(machine.models, name) for name in "abc"))
            assert machine.ledger.foreign == 0 and machine.ledger.held == 0
