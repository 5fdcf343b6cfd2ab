"""A long random run over simulated devices, in virtual time: whatever happens, memory adds up.

Two GPUs of 1 GiB and a CPU, models of about 300 MiB, strangers who take memory and give it back, hosts
that fail and die. True at every step: reservations never exceed a device; nobody who is busy or pinned
is driven out; nobody is driven out in vain. At the end everything is given back.
"""

import asyncio
import random
from dataclasses import replace

import pytest

from repository import housing
from repository.admission import Evict, decide
from repository.errors import NoRoomError, RepositoryError
from repository.lifecycle.ledger import MemoryLedger
from repository.lifecycle.pins import Pins
from repository.lifecycle.placement import HOST
from repository.lifecycle.states import TERMINAL, State
from repository.lifecycle.wishes import Wishes
from repository.messages import Loaded
from repository.observer import Observer
from repository.reconciler import Reconciler
from tests.extent import drawn
from tests.fakes.heart import folder, means, spec
from tests.fakes.host import FakeHost

pytestmark = [pytest.mark.looptime, pytest.mark.timeout(300)]

MIB, GIB = 1 << 20, 1 << 30
GPUS = ("cuda:0", "cuda:1")
CONTEXT = 20 * MIB  # what a process keeps of its GPU asleep
NAMES = "abcdefghijkl"
PATIENCE_S = 5000.0
PLACES = [(*GPUS, "cpu"), GPUS, ("cuda:0",), ("cuda:1",), ("cpu",)]


class Worker(FakeHost):
    """It has what it was estimated to need, where it was put."""

    async def load(self, spec, devices):
        each = spec.bytes_needed // len(devices)
        self.measured = {d: {"weights": each * devices.count(d)} for d in devices}
        self.asleep = {HOST: {"weights": each * len(devices)}}
        self.asleep |= {d: {"context": CONTEXT} for d in devices if d != "cpu"}
        return await super().load(spec, devices)


class World(Observer):
    """What happens, and what must be true of it."""

    def __init__(self, seed, monkeypatch, *, requests_load):
        self.rng = random.Random(seed)
        self.requests_load = requests_load
        self.hosts, self.tasks = [], set()
        self.evictions = []  # (who left, for whom, how often strangers had taken more by then)
        self.decided = {}  # who leaves -> for whom, as it was decided last
        self.faults = []
        self.taken = 0  # how often strangers have taken more
        self.counts = dict.fromkeys(["evicted", "slept", "woken", "admitted", "refused"], 0)
        monkeypatch.setattr(housing, "decide", self.decide)
        self.ledgers = {
            device: MemoryLedger(device, GIB, total=GIB + 200 * MIB, margin=64 * MIB)
            for device in GPUS
        }
        self.ledgers["cpu"] = MemoryLedger("cpu", GIB)
        self.ledgers[HOST] = MemoryLedger(HOST, 700 * MIB)
        self.models = Reconciler(
            means(self.make_host, rehearse=self.rehearse),
            self.ledgers,
            Wishes(everything=False),
            observer=self,
            load_slots=3,
            pins=Pins({"": 0.6}),
        )
        self.folders = {name: self.content(name) for name in NAMES}

    # the world --------------------------------------------------------------------------------------

    def content(self, name):
        rng = self.rng
        one = spec(
            name,
            1,
            str(rng.random()),
            rng.choice([300, 300, 300, 300, 150, 600]) * MIB,
            reload=rng.choice(["auto", "auto", "overlap", "replace"]),
            pin=rng.random() < 0.1,
            ttl_s=rng.choice([None, None, None, 60.0]),
            sleep_s=rng.choice([None, None, 40.0]),
            evict_to=rng.choice(["auto", "auto", "disk", "host"]),
            priority=rng.randrange(3),
            instances=rng.choice([1, 1, 1, 2, 3]),
            device_share=rng.choice([None, None, 0.7]),
        )
        return folder(replace(one, devices=rng.choice(PLACES)))

    def make_host(self, what):
        rng = self.rng
        self.hosts.append(
            Worker(
                load_s=rng.uniform(0.1, 8),
                load_error=OSError("bad weights") if rng.random() < 0.05 else None,
                sleep_error=OSError("no pinned memory") if rng.random() < 0.05 else None,
                wake_error=OSError("the driver is tired") if rng.random() < 0.05 else None,
                validate_error=OSError("not a model") if rng.random() < 0.05 else None,
                sleep_s=rng.uniform(0, 0.5),
                wake_s=rng.uniform(0, 0.5),
                stop_s=rng.uniform(0, 1),
                loaded=Loaded(abilities=frozenset({"sleep"} if rng.random() < 0.7 else ())),
            )
        )
        return self.hosts[-1]

    async def rehearse(self, host, what, loaded):
        if self.rng.random() < 0.03:
            raise ValueError("a check disagrees")
        return ""

    def do(self, work):
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def step(self):
        name = self.rng.choice(NAMES)
        if self.rng.random() < 0.25:
            self.around()
        elif name in self.models.folders:
            self.said(name)

    def around(self):
        """What nobody says by call."""
        rng, name = self.rng, self.rng.choice(NAMES)
        match rng.randrange(8):
            case 0:
                self.folders[name] = self.content(name)
                self.models.observe(dict(self.folders))
            case 1:
                if self.folders.pop(name, None) is None:
                    self.folders[name] = self.content(name)
                self.models.observe(dict(self.folders))
            case 2 | 3:
                alive = [h for h in self.hosts[-30:] if h.calls and "stop" not in h.calls]
                if alive:
                    rng.choice(alive).kill("killed by signal 9")
            case _:
                self.strangers(rng.choice(GPUS), max(0, rng.randrange(-300, 500)) * MIB)

    def said(self, name):
        rng, models = self.rng, self.models
        match rng.randrange(18):
            case 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7:
                self.do(self.load(name, force=rng.random() < 0.1))
            case 8:
                models.pin(name, rng.random() < 0.2)
            case 9 if rng.random() < 0.5:
                models.unwant(name)
            case 9:
                models.put_to_sleep(name)
            case 10 | 11 if self.requests_load:
                self.do(self.wait_for(name))
            case _:
                gen = models.routes.find(name)
                if gen is not None:
                    self.do(self.use(gen.lease()))

    def strangers(self, device, n_bytes):
        ledger = self.ledgers[device]
        before, ledger.foreign = ledger.foreign, n_bytes
        self.taken += n_bytes > before
        if n_bytes < before:
            self.models.room_came()

    async def load(self, name, *, force):
        try:
            gens = self.models.want(name, force=force, trigger=housing.Trigger.API)
        except RepositoryError:
            return
        async with asyncio.timeout(PATIENCE_S):  # nobody waits for ever
            for gen in gens:
                await gen.settled.wait()

    async def use(self, lease):
        with lease:
            await asyncio.sleep(self.rng.uniform(0, 8))

    async def wait_for(self, name):
        leases = []
        try:
            async with asyncio.timeout(self.rng.choice([5, PATIENCE_S])):
                await self.models.wait_for(name, None, leases.append)
            await asyncio.sleep(self.rng.uniform(0, 15))
        except (TimeoutError, RepositoryError):
            pass
        finally:
            for lease in leases:
                lease.end()

    # what must be true --------------------------------------------------------------------------------

    def decide(self, *args, **rest):
        found = decide(*args, **rest)
        self.decided = {d.gen: d.room_for for d in found.todo if isinstance(d, Evict)}
        return found

    def evicted(self, gen, reason):
        """What is raised in here nobody hears: it is kept for `check`."""
        if reason == "manual":
            return
        room_for = self.decided.get(gen) if reason == "memory" else None
        self.counts["evicted"] += reason == "memory"
        if gen.pinned:
            self.faults.append(f"{gen} is pinned, and left: {reason}")
        fenced = room_for is not None and room_for.spec.model in self.models.demand.models
        if gen.leases and not fenced:
            self.faults.append(f"{gen} is busy, and left: {reason}")
        if room_for is not None:
            self.evictions.append((gen, room_for, self.taken))
        elif reason == "memory" and gen.state is not State.ASLEEP:
            self.faults.append(f"{gen} left for nobody")

    def stepped(self, gen, before):
        self.counts["slept"] += gen.state is State.ASLEEP
        self.counts["admitted"] += gen.state is State.LOADING
        self.counts["refused"] += isinstance(gen.error, NoRoomError) and gen.state is State.FAILED
        self.counts["woken"] += gen.state is State.READY and gen.woken

    def check(self):
        assert not self.faults
        gens = [g for of in self.models.generations.values() for g in of]
        for device, ledger in self.ledgers.items():
            assert 0 <= ledger.held <= ledger.capacity
            assert ledger.held == sum(g.held.get(device, 0) for g in gens)
        assert all(g.placement.devices for g in gens if g.held)
        for device in (*GPUS, "cpu"):
            pinned = sum(g.held.get(device, 0) for g in gens if g.pinned)
            assert pinned <= 0.6 * GIB
        self.evictions = [e for e in self.evictions if not self.was_useful(*e)]

    def was_useful(self, gone, room_for, taken):
        """False: not known yet."""
        if room_for.admitted_at or room_for.state is State.GONE:
            return True
        if room_for.state is State.FAILED:
            in_vain = isinstance(room_for.error, NoRoomError) and self.taken == taken
            assert not in_vain, f"{gone} left for {room_for} in vain: {room_for.error}"
            return True
        return False


@pytest.mark.parametrize(
    ("seed", "steps", "requests_load"),
    [
        (1, drawn(4_000, long=10_000), False),
        (2, drawn(1_500, long=2_500), True),
        (3, drawn(1_500, long=2_500), True),
    ],
)
async def test_memory_adds_up_whatever_happens(seed, steps, requests_load, monkeypatch, caplog):
    world = World(seed, monkeypatch, requests_load=requests_load)
    models = world.models
    async with models.running():
        models.observe(dict(world.folders))
        for _ in range(steps):
            world.step()
            world.check()
            await asyncio.sleep(world.rng.expovariate(1.0))
            world.check()
        world.strangers("cuda:0", 0)
        world.strangers("cuda:1", 0)
        while world.tasks:
            await asyncio.wait(set(world.tasks))
    world.check()
    assert not world.evictions  # of each it is known what came of it
    assert all(ledger.held == 0 for ledger in world.ledgers.values())
    assert all(h.calls.count("stop") == 1 and h.calls[-1] == "stop" for h in world.hosts)
    assert all(g.state in TERMINAL for of in models.generations.values() for g in of)
    assert not models._lives and not models._queue and not models._beds
    assert not [r for r in caplog.records if r.exc_info]
    assert min(world.counts.values()) > 0, world.counts  # all of it has happened
