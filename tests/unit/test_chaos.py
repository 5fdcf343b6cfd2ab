"""Random mishaps in virtual time. Whatever happens, nothing leaks and nobody waits for ever."""

import asyncio
import random

import pytest

from repository.errors import ModelNotReadyError, RepositoryError
from repository.lifecycle.states import TERMINAL, State
from tests.fakes.heart import folder, load, reconciler, spec, unload
from tests.fakes.host import FakeHost

pytestmark = pytest.mark.looptime

CAPACITY = 100
PATIENCE_S = 3600.0  # nobody may wait longer than this, whatever happens


class World:
    """Files that change, hosts that fail and die, and what must be true of all of it."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.hosts = []
        self.folders = {n: self.content(n) for n in "abc"}
        self.models = reconciler(
            self.make_host,
            CAPACITY,
            everything=self.rng.random() < 0.5,
            lives={"rehearse": self.rehearse, "unchanged": self.unchanged},
            load_slots=self.rng.choice([1, 2, 4]),
        )

    def content(self, name):
        config = {
            "reload": self.rng.choice(["auto", "overlap", "replace"]),
            "pin": self.rng.random() < 0.1,
            "ttl_s": self.rng.choice([None, None, 30.0]),
            "priority": self.rng.randrange(3),
        }
        versions = self.rng.sample([1, 2, 3], self.rng.choice([1, 1, 2]))
        return folder(
            *[
                spec(name, v, str(self.rng.random()), self.rng.randint(10, 60), **config)
                for v in versions
            ]
        )

    def make_host(self, what):
        error = OSError("bad weights") if self.rng.random() < 0.2 else None
        self.hosts.append(FakeHost(load_s=self.rng.uniform(0, 20), load_error=error))
        return self.hosts[-1]

    async def rehearse(self, host, what, loaded):
        await asyncio.sleep(self.rng.uniform(0, 3))
        if self.rng.random() < 0.1:
            raise ValueError("a check disagrees")
        return ""

    async def unchanged(self, what):
        return self.rng.random() > 0.05

    async def client(self, name):
        for _ in range(30):
            await asyncio.sleep(self.rng.expovariate(0.2))
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await self.one_thing(name)
            except RepositoryError:
                pass
            self.check()

    async def one_thing(self, name):
        match self.rng.randrange(8):
            case 0 | 1:
                await load(self.models, name, force=self.rng.random() < 0.3)
            case 2:
                await unload(self.models, name)
            case 3:
                self.folders[name] = self.content(name)
                self.models.observe(dict(self.folders))
            case 4:
                self.folders.pop(name, None)
                self.models.observe(dict(self.folders))
            case 5:
                alive = [h for h in self.hosts if h.calls[-1:] == ["load"] and not h.died.done()]
                if alive:
                    self.rng.choice(alive).kill("killed by signal 9")
            case _:
                gen = self.models.routes.find(name)
                if gen is None:
                    raise ModelNotReadyError(name)
                with gen.lease():
                    await asyncio.sleep(self.rng.uniform(0, 40))

    def check(self):
        """True at every moment, not only at the end."""
        gens = [g for of in self.models.generations.values() for g in of]
        held = self.models.ledgers["cpu"].held
        assert 0 <= held <= CAPACITY
        assert held == sum(g.reserved for g in gens)
        serving = [g for g in gens if g.state is State.READY]
        for gen in serving:
            newest = self.models.routes.find(gen.spec.model, gen.spec.version)
            assert newest is not None and newest.serial >= gen.serial


@pytest.mark.parametrize("seed", range(60))
async def test_chaos(seed):
    world = World(seed)
    models = world.models
    async with models.running():
        models.observe(dict(world.folders))
        await asyncio.gather(*[world.client(name) for name in "abcabc"])
    assert models.ledgers["cpu"].free == CAPACITY
    assert all(h.calls in (["stop"], ["load", "stop"]) for h in world.hosts)
    assert all(g.state in TERMINAL for of in models.generations.values() for g in of)
    assert not models._lives and not models._queue
