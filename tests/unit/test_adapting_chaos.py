"""Random mishaps to adapters in virtual time: afterwards every host has what the book says."""

import asyncio
import random

import pytest

from repository.errors import RepositoryError
from repository.lifecycle.states import TERMINAL, State
from repository.reconciler import log as planner
from tests.adapters import source
from tests.extent import drawn
from tests.fakes.adapting import AdaptingHost, Calls

pytestmark = pytest.mark.looptime

PATIENCE_S = 3600.0
MISFITS = frozenset({"f0", "x0"})  # what no host takes


class World:
    def __init__(self, seed, tmp_path):
        self.rng = random.Random(seed)
        self.calls = Calls(tmp_path, load_timeout_s=300)
        self.calls.make = self.host
        self.model = 0
        self.lying = {}

    def host(self):
        return AdaptingHost(
            load_s=self.rng.uniform(0, 5), adapt_s=self.rng.uniform(0, 3), refuses=MISFITS
        )

    def look(self):
        self.calls.drop(
            *self.lying.values(),
            print_=f"m{self.model}",
            versions=self.rng.choice([(1,), (1,), (2, 1)]),
        )

    async def client(self, names):
        calls = self.calls
        for _ in range(25):
            await asyncio.sleep(self.rng.expovariate(0.3))
            name = self.rng.choice(names)
            try:
                async with asyncio.timeout(PATIENCE_S) as limit:
                    await self.one_thing(calls, name)
            except RepositoryError:
                pass
            except TimeoutError:
                assert not limit.expired(), "somebody waits for ever"

    async def one_thing(self, calls, name):
        pin = self.rng.random() < 0.3
        src = self.rng.choice(["bad1", "x0", "x1", "x2", "x3"])
        match self.rng.randrange(9):
            case 0 | 1:
                await calls.register_adapter("m", name, src, pin=pin)
            case 2:
                await calls.update_adapter("m", name, src=self.rng.choice([None, src]), pin=pin)
            case 3:
                await calls.unregister_adapter("m", name)
            case 4:
                self.lying[name] = source(name, f"f{self.rng.randrange(4)}")
                self.look()
            case 5:
                broken = self.rng.random() < 0.5
                self.lying.pop(name, None)
                if broken:
                    self.lying[name] = source(name, "half", problem="half")
                self.look()
            case 6:
                self.model += self.rng.random() < 0.3
                self.look()
            case 7:
                alive = [h for h in calls.hosts if h.calls == ["load"] and not h.died.done()]
                if alive and self.rng.random() < 0.4:
                    self.rng.choice(alive).kill("killed by signal 9")
            case _:
                leaving = asyncio.create_task(calls.register_adapter("m", name, src))
                await asyncio.sleep(self.rng.uniform(0, 3))
                leaving.cancel()

    def check(self):
        """What is applied is what is wanted; what is refused is told."""
        entries = self.calls.shelf.entries("m")
        wanted = {n: e.source.fingerprint for n, e in entries.items() if e.usable}
        good = {n: f for n, f in wanted.items() if f not in MISFITS}
        gens = [g for g in self.calls._of("m") if g.state is State.READY]
        assert gens
        for gen in gens:
            host = gen.fitting._host
            assert good.items() <= host.has.items()
            assert host.has.keys() <= wanted.keys()  # an old one stays where the new does not fit
            for name, order in host.applied.items():
                if name in good:
                    assert (order.pin, order.preload) == (entries[name].pin, entries[name].preload)
            assert set(gen.fitting.failed) == wanted.keys() - good.keys()
        assert not self.calls.shelf.book("m").trying


@pytest.mark.parametrize("seed", range(drawn(12, long=30)))
async def test_chaos_of_adapters(seed, tmp_path, caplog):
    world = World(seed, tmp_path)
    calls = world.calls
    planner.setLevel("ERROR")
    async with calls.models.running():
        world.look()
        await asyncio.gather(*[world.client("abc") for _ in range(4)])
        await asyncio.sleep(2000)  # restarts and their pauses
        world.check()
        for name, state in calls.states().items():
            assert state in ("loaded", "failed"), name
    assert not calls.shelf._fittings and not calls._desk._turns._running
    assert all(g.state in TERMINAL for of in calls.models.generations.values() for g in of)
    assert not [r for r in caplog.records if r.levelname == "ERROR"]
