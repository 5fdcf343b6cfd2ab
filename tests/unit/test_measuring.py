"""Who has worked is asked what it has; what strangers use is handed out to nobody."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repository.errors import DeviceSilentError, LoadFailedError, WorkerDiedError
from repository.estimates import MIB, Estimates
from repository.lifecycle.footprint import Bounds, foreign
from repository.lifecycle.generation import Generation
from repository.lifecycle.ledger import MemoryLedger
from repository.lifecycle.placement import Memory
from repository.lifecycle.states import Event, State
from repository.measuring import LOOK_S, MOST_LOOK_S, STALE_S, Measuring
from repository.messages import Loaded
from repository.reports import GpuProcess, GpuReport, GpuUse
from tests.fakes.heart import at, brought, newborn, spec
from tests.fakes.host import FakeHost

pytestmark = pytest.mark.looptime
GPU = "cuda:0"


class Telling(FakeHost):
    """Counts how often it was asked for its memory."""

    def __init__(self, memory: Memory, **knobs: float) -> None:
        super().__init__(memory=memory)
        self.asked = 0
        self.slow_s = knobs.get("slow_s", 0.0)
        self.error: Exception | None = None

    async def memory(self) -> Memory:
        self.asked += 1
        await asyncio.sleep(self.slow_s)
        if self.error is not None:
            raise self.error
        return dict(self.measured)


@dataclass
class Bench:
    """One GPU of 1000 MiB, of which `used` MiB are in use; the ledger may hand out all of it."""

    gens: list[Generation] = field(default_factory=list)
    used: int = 0
    told: dict[int, int] = field(default_factory=dict)
    silent: bool = False
    told_of_room: int = 0
    estimates: Estimates = field(default_factory=Estimates)

    def __post_init__(self) -> None:
        self.ledger = MemoryLedger(GPU, 1000 * MIB, total=1000 * MIB)
        self.measuring = Measuring(
            lambda: iter(self.gens),
            {"cpu": MemoryLedger("cpu", 1000 * MIB), GPU: self.ledger},
            self.estimates,
            gpus=self.use,
            room=self._room,
        )

    def _room(self) -> None:
        self.told_of_room += 1

    async def use(self) -> GpuUse:
        if self.silent:
            raise DeviceSilentError("the GPUs' driver has not answered for 5 s")
        told = tuple(GpuProcess(pid, None, n * MIB) for pid, n in self.told.items())
        used = self.used * MIB
        return (GpuReport(0, "a GPU", "u", 1000 * MIB, used, 1000 * MIB - used, processes=told),)

    def add(self, state: State, mib: int, *, device: str = GPU, slow_s: float = 0.0) -> Generation:
        serial = len(self.gens) + 1
        gen = at(device, brought(newborn(spec(f"m{serial}", n_bytes=mib * MIB), serial), state))
        gen.host = Telling({device: {"weights": mib * MIB}}, slow_s=slow_s)
        if state is State.READY:
            gen.measured = dict(gen.host.measured)
        self.gens.append(gen)
        return gen

    @property
    def foreign(self) -> float:
        return self.ledger.foreign / MIB


def asked(gen: Generation) -> int:
    assert isinstance(gen.host, Telling)
    return gen.host.asked


def grown(gen: Generation, mib: int) -> None:
    assert isinstance(gen.host, Telling)
    gen.host.measured = {gen.device: {"weights": mib * MIB}}


def work(gen: Generation) -> None:
    with gen.lease():
        pass


# models -------------------------------------------------------------------------------------------


async def test_who_has_worked_is_asked_again_and_who_rests_is_not() -> None:
    bench = Bench()
    busy, idle = bench.add(State.READY, 10, device="cpu"), bench.add(State.READY, 10, device="cpu")
    work(busy)
    grown(busy, 40)
    await bench.measuring.look()
    assert busy.measured == {"cpu": {"weights": 40 * MIB}}
    for _ in range(5):
        await asyncio.sleep(LOOK_S)
        await bench.measuring.look()
    assert (asked(busy), asked(idle)) == (1, 0)


async def test_what_it_was_seen_to_have_is_needed_the_next_time() -> None:
    bench = Bench()
    gen = bench.add(State.READY, 10, device="cpu")
    work(gen)
    grown(gen, 64)
    await bench.measuring.look()
    assert bench.estimates.needs(gen.spec, "cpu") == (66 * MIB, "measured")


async def test_who_takes_no_more_is_asked_ever_less_often() -> None:
    bench = Bench()
    gen = bench.add(State.READY, 10, device="cpu")
    for _ in range(int(600 / LOOK_S)):
        work(gen)
        await bench.measuring.look()
        await asyncio.sleep(LOOK_S)
    assert 600 / MOST_LOOK_S <= asked(gen) <= 600 / MOST_LOOK_S + 7


async def test_who_takes_more_is_asked_again_soon() -> None:
    bench = Bench()
    gen = bench.add(State.READY, 10, device="cpu")
    for n in range(10):
        work(gen)
        grown(gen, 20 + 10 * n)
        await bench.measuring.look()
        await asyncio.sleep(LOOK_S)
    assert asked(gen) == 10


async def test_one_that_computes_and_does_not_answer_holds_up_nobody(looptime: float) -> None:
    bench = Bench()
    slow = [bench.add(State.READY, 10, device="cpu", slow_s=600) for _ in range(16)]
    quick = bench.add(State.READY, 10, device="cpu")
    for gen in (*slow, quick):
        work(gen)
    grown(quick, 20)
    await bench.measuring.look()
    assert looptime < LOOK_S and quick.measured == {"cpu": {"weights": 20 * MIB}}
    assert slow[0].measured == {"cpu": {"weights": 10 * MIB}}  # as it was known before


async def test_one_that_dies_while_it_is_asked_is_left_alone() -> None:
    bench = Bench()
    gen = bench.add(State.READY, 10, device="cpu")
    assert isinstance(gen.host, Telling)
    gen.host.error = WorkerDiedError("gone")
    work(gen)
    await bench.measuring.look()
    assert gen.measured == {"cpu": {"weights": 10 * MIB}}


async def test_one_that_leaves_while_it_is_asked_teaches_nothing() -> None:
    bench = Bench()
    gen = bench.add(State.READY, 10, device="cpu", slow_s=1)
    work(gen)
    grown(gen, 1)
    look = asyncio.create_task(bench.measuring.look())
    await asyncio.sleep(0.5)
    gen.step(Event.RETIRE)
    await look
    assert gen.measured == {"cpu": {"weights": 10 * MIB}}


async def test_a_thousand_idle_models_cost_less_than_a_millisecond_a_round() -> None:
    bench = Bench(silent=True)
    for _ in range(1000):
        bench.add(State.READY, 1, device="cpu")
    took = []
    for _ in range(20):
        began = time.perf_counter()
        await bench.measuring.look()
        took.append(time.perf_counter() - began)
    assert min(took) < 0.002 and not any(map(asked, bench.gens))


async def test_a_model_is_learned_of_when_it_is_ready_and_when_it_ran_out() -> None:
    bench = Bench()
    gen = bench.add(State.LOADING, 50)
    gen.fault(LoadFailedError("OutOfMemoryError: CUDA out of memory"))
    bench.measuring.stepped(gen, State.LOADING)
    assert bench.estimates.needs(gen.spec, GPU) == (int(62.5 * MIB), "measured")
    again = bench.add(State.READY, 50)
    again.spec = gen.spec
    bench.measuring.stepped(again, State.WARMING)
    assert bench.estimates.needs(gen.spec, GPU) == (50 * MIB + 50 * MIB // 32, "measured")


async def test_other_failures_teach_nothing() -> None:
    bench = Bench()
    gen = bench.add(State.LOADING, 50)
    gen.fault(LoadFailedError("no such layer"))
    bench.measuring.stepped(gen, State.LOADING)
    assert bench.estimates.needs(gen.spec, GPU)[1] == "estimate"


# strangers ----------------------------------------------------------------------------------------


async def test_what_is_used_beyond_our_own_is_handed_out_to_nobody() -> None:
    bench = Bench(used=300)
    bench.add(State.READY, 100)
    await bench.measuring.look()
    assert bench.foreign == 200 and bench.measuring.ours()[GPU] == 100 * MIB


async def test_a_load_under_way_is_no_stranger() -> None:
    bench = Bench(used=200)
    await bench.measuring.look()
    assert bench.foreign == 200
    gen = bench.add(State.LOADING, 100)
    for used in (200, 240, 300):  # as it comes in
        bench.used = used
        await bench.measuring.look()
        assert bench.foreign == 200 and bench.measuring.ours()[GPU] == (used - 200) * MIB
    gen.measured = {GPU: {"weights": 100 * MIB}}
    gen.step(Event.LOADED)
    gen.step(Event.WARMED)
    await bench.measuring.look()
    assert bench.foreign == 200


async def test_a_stranger_who_comes_during_a_load_is_seen_as_far_as_it_must_be_one() -> None:
    bench = Bench(used=0)
    await bench.measuring.look()
    bench.add(State.LOADING, 100)
    bench.used = 350
    await bench.measuring.look()
    assert bench.foreign == 250


async def test_strangers_are_never_fewer_than_none() -> None:
    bench = Bench(used=50)
    bench.add(State.READY, 100)  # measured before it gave some back
    await bench.measuring.look()
    assert bench.foreign == 0


async def test_what_the_driver_says_of_our_processes_counts_more_than_what_they_said() -> None:
    bench = Bench(used=300, told={77: 130, 9: 50})
    bench.add(State.READY, 150).loaded = Loaded(details={"pids": [77]})
    await bench.measuring.look()
    assert bench.foreign == 170 and bench.measuring.ours()[GPU] == 130 * MIB
    bench.told = {77: 3}  # in a container: another's number
    await bench.measuring.look()
    assert bench.foreign == 150 and bench.measuring.ours()[GPU] == 150 * MIB


async def test_what_a_model_has_beyond_what_it_reserved_is_free_for_nobody() -> None:
    bench = Bench(used=250)
    gen = bench.add(State.READY, 100)
    gen.measured = {GPU: {"weights": 150 * MIB}}
    bench.ledger.take(100 * MIB)
    await bench.measuring.look()
    assert bench.ledger.free == 750 * MIB and bench.measuring.ours()[GPU] == 150 * MIB


async def test_who_waits_for_room_is_told_when_strangers_give_some_back() -> None:
    bench = Bench(used=500)
    await bench.measuring.look()
    assert bench.told_of_room == 0
    bench.used = 100
    await bench.measuring.look()
    assert bench.told_of_room == 1 and bench.foreign == 100
    await bench.measuring.look()
    assert bench.told_of_room == 1


async def test_what_an_end_left_behind_is_a_strangers_before_it_is_given_away() -> None:
    bench = Bench(used=300)
    gen = bench.add(State.READY, 200)
    await bench.measuring.look()
    assert bench.foreign == 100
    gen.step(Event.RETIRE)
    gen.step(Event.DRAINED)
    bench.used = 250  # only 50 of its 200 came back
    host = FakeHost()
    await host.load(gen.spec, [GPU])
    before = bench.use

    async def leaks() -> GpuUse:
        bench.used = 250 if "stop" in host.calls else 300
        return await before()

    bench.measuring._gpus = leaks
    assert not await bench.measuring.end(gen, host, 1.0)
    assert gen.leaked == 150 * MIB and bench.foreign == 250


async def test_a_driver_that_hangs_keeps_the_last_figure_for_strangers_and_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bench = Bench(used=300)
    await bench.measuring.look()
    bench.silent = True
    for _ in range(3):
        await asyncio.sleep(STALE_S)
        await bench.measuring.look()
    assert bench.foreign == 300 and bench.measuring.gpu_use == ()
    assert len(caplog.records) == 1 and "has not answered" in caplog.text
    bench.silent = False
    await bench.measuring.look()
    assert len(bench.measuring.gpu_use) == 1


async def test_a_mistake_in_it_ends_neither_the_measuring_nor_the_server(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken() -> Iterator[Generation]:
        raise ValueError("a bug")

    measuring = Measuring(broken, {}, Estimates())
    task = asyncio.create_task(measuring.run())
    await asyncio.sleep(3 * LOOK_S)
    assert not task.done() and "measuring stumbled" in caplog.text
    task.cancel()


async def test_host_memory_counts_what_workers_share_with_what_they_were_forked_from() -> None:
    async def bases() -> int:
        return 300 * MIB

    gens: list[Generation] = []
    ledgers = {"cpu": MemoryLedger("cpu", 1000 * MIB)}
    measuring = Measuring(lambda: gens, ledgers, Estimates(), bases=bases)
    await measuring.look()
    assert measuring.ours() == {"cpu": 300 * MIB}


sizes = st.integers(0, 100)


@given(sizes, sizes, sizes, sizes)
def test_what_is_called_foreign_is_always_possible(
    used: int, least: int, more: int, before: int
) -> None:
    ours = Bounds(least, least + more)
    found = foreign(used, ours, before)
    assert max(0, used - ours.most) <= found <= max(0, used - ours.least)
    assert foreign(used, ours, found) == found
