"""Random mishaps in virtual time. Whatever happens, nothing leaks and nobody waits for ever."""

import asyncio
import random
import re
from collections import Counter
from dataclasses import replace

import pytest

from repository.config import Ensemble, EnsembleStep
from repository.demand import Demand
from repository.errors import ModelNotReadyError, RepositoryError
from repository.folder.aliases import settle_aliases
from repository.folder.settle import keeping
from repository.hosts.ensemble import EnsembleHost
from repository.lifecycle.placement import HOST
from repository.lifecycle.plan import staying
from repository.lifecycle.states import HOLDS_MEMORY, TERMINAL, TRANSITIONS, State
from repository.lifecycle.status import describe
from repository.lifecycle.wishes import Word
from repository.messages import InferRequest, InferResponse, Loaded
from repository.observer import Observer
from repository.snapshot import Problem
from repository.tensors import Tensor
from tests.extent import drawn
from tests.fakes.caller import FakeCaller
from tests.fakes.heart import folder, load, reconciler, spec, unload
from tests.fakes.host import FakeHost
from tests.fakes.stage import SLEEPER

pytestmark = pytest.mark.looptime

CAPACITY = 100
DEVICES = ("cuda:0", "cuda:1", "cpu")
# How often a model is a step of an ensemble.
STEPS = {"a": 20, "b": 20, "c": 20, "d": 8, "e": 1, "champion": 1, "nobody": 1}
PATIENCE_S = 3600.0  # nobody may wait longer than this, whatever happens


class Counting(Observer):
    """Counts each generation's births, steps and ends, as a metrics observer relies on them."""

    def __init__(self):
        self.born, self.ended, self.at = Counter(), Counter(), {}

    def stepped(self, gen, before):
        if gen.state is State.QUEUED:
            self.born[gen.serial] += 1
            assert gen.serial == max(self.born)
        else:
            assert self.at[gen.serial] is before
            assert gen.state in TRANSITIONS[before].values()
        self.at[gen.serial] = gen.state
        self.ended[gen.serial] += gen.state in TERMINAL

    def evicted(self, gen, reason):
        assert reason == "manual" or not gen.pinned
        assert gen.state in (State.READY, State.ASLEEP)


class World:
    """Files that change, hosts that fail and die, and what must be true of all of it. `tight`: each
    model has a device of its own, without room for it and its successor."""

    names = "abc"
    capacity = CAPACITY

    def __init__(self, seed, *, tight=False):
        self.rng = random.Random(seed)
        self.tight = tight
        self.hosts, self.counts = [], Counting()
        self.acknowledged = set()  # loads: said until somebody unloads the model
        self.folders = {n: self.content(n) for n in self.names}
        self.models = reconciler(
            self.make_host,
            self.capacity,
            everything=self.rng.random() < 0.5,
            lives={"rehearse": self.rehearse, "unchanged": self.unchanged},
            load_slots=self.rng.choice([1, 2, 4]),
            demand=Demand(most=3, patience_s=self.rng.choice([1.0, 60.0, PATIENCE_S / 2])),
            devices=DEVICES,
            tier=self.rng.choice([0, 30, 60, CAPACITY]),
            observer=self.counts,
        )

    def content(self, name):
        config = {
            "reload": "auto" if self.tight else self.rng.choice(["auto", "overlap", "replace"]),
            "pin": self.rng.random() < 0.1,
            "ttl_s": self.rng.choice([None, None, 30.0]),
            "sleep_s": self.rng.choice([None, None, 10.0]),
            "evict_to": self.rng.choice(["auto", "host", "disk"]),
            "priority": self.rng.randrange(3),
        }
        versions = self.rng.sample([1, 2, 3], self.rng.choice([1, 1, 2]))
        devices = self.rng.choice([("cuda:0", "cpu"), ("cpu",), ("cuda:0",)])
        size = (10, 60)
        if self.tight:
            devices, size = (dict(zip("abc", DEVICES, strict=True))[name],), (51, 90)
            versions = versions[:1]
        specs = [
            spec(name, v, str(self.rng.random()), self.rng.randint(*size), **config)
            for v in versions
        ]
        aliases = self.rng.sample(["champion", "other"], self.rng.choice([0, 0, 1, 2]))
        return folder(*[replace(s, devices=devices) for s in specs], aliases=tuple(aliases))

    def broken(self, name):
        """As the settler gives it: the problem is told, what served goes on serving."""
        old = self.folders.get(name)
        version = self.rng.choice([None, *(old.versions if old else ())])
        problem = Problem(f"{name}/config.yaml:1", "config", "unknown key", version=version)
        new = folder(name=name, problems=(problem,))
        if old is None:
            return new
        if version is not None:
            left = {v: s for v, s in old.specs.items() if v != version}
            new = replace(new, specs=left, versions=old.versions)
        return keeping(replace(new, fingerprint=str(self.rng.random())), old)

    def look(self):
        starting = self.rng.random() < 0.2
        self.models.observe(settle_aliases(dict(self.folders)), starting=starting)

    def make_host(self, what):
        self.hosts.append(
            FakeHost(
                load_s=self.rng.uniform(0, 20),
                load_error=self.perhaps(OSError("bad weights")),
                loaded=self.rng.choice([Loaded(), SLEEPER, SLEEPER, SLEEPER]),
                stop_s=self.rng.choice([0, 0, 5]),
                sleep_s=self.rng.uniform(0, 5),
                sleep_error=self.perhaps(MemoryError("no pages")),
                asleep={what.devices[0]: {"context": 3}, HOST: {"weights": what.bytes_needed // 2}},
                wake_s=self.rng.uniform(0, 5),
                wake_error=self.perhaps(MemoryError("the device is full")),
                validate_s=self.rng.uniform(0, 5),
                validate_error=self.perhaps(OSError("a tensor is missing")),
            )
        )
        return self.hosts[-1]

    def perhaps(self, error):
        return error if self.rng.random() < 0.2 else None

    async def rehearse(self, host, what, loaded):
        await asyncio.sleep(self.rng.uniform(0, 3))
        if self.rng.random() < 0.1:
            raise ValueError("a check disagrees")
        return ""

    async def unchanged(self, what):
        return self.rng.random() > 0.05

    async def client(self, name):
        for _ in range(30):
            await asyncio.sleep(self.rng.expovariate(0.02 if self.tight else 0.2))
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await self.one_thing(name)
            except RepositoryError:
                pass
            await asyncio.sleep(0.001)  # the planner has heard of it too
            self.check()

    async def one_thing(self, name):
        match self.rng.randrange(14):
            case 0 | 1:
                await self.load(name)
            case 2:
                self.acknowledged.discard(name)
                await unload(self.models, name)
            case 3:
                self.folders[name] = self.content(name)
                self.look()
            case 4:
                self.folders.pop(name, None)
                self.look()
            case 5:
                self.folders[name] = self.broken(name)
                self.look()
            case 6:
                self.kill_one()
            case 7 | 8:
                await self.wait_for(self.rng.choice([name, name, "champion"]))
            case 9 | 10:
                await self.put_to_sleep(name)
            case _:
                await self.use(self.rng.choice([name, name, "champion", "other"]))

    def kill_one(self):
        alive = [h for h in self.hosts if "stop" not in h.calls and not h.died.done()]
        if alive:
            self.rng.choice(alive).kill("killed by signal 9")

    async def use(self, name):
        gen = self.models.routes.find(name)
        if gen is None:
            raise ModelNotReadyError(name)
        with gen.lease():
            await asyncio.sleep(self.rng.uniform(0, 40))

    async def load(self, name):
        gen = await load(self.models, name, force=self.rng.random() < 0.3)
        if gen.state is State.READY and self.models.wishes.said(name) is Word.LOAD:
            self.acknowledged.add(name)

    async def put_to_sleep(self, name):
        """Whoever says so hears of it in the end, whatever has become of it."""
        self.acknowledged.discard(name)
        if self.models.known(name) is None:
            raise ModelNotReadyError(name)
        going = self.models.put_to_sleep(name)
        for gen in going:
            await gen.rested.wait()
            assert gen.state in (State.ASLEEP, State.UNLOADING, State.FAILING, *TERMINAL)

    async def wait_for(self, name):
        """A request that waits for the model, or leaves; it has its lease exactly if it was granted."""
        version, leases = self.rng.choice([None, None, 1, 2]), []
        waiter = self.models.wait_for(name, version, leases.append)
        try:
            async with asyncio.timeout(self.rng.choice([0, 5, PATIENCE_S])):
                await waiter
            (lease,) = leases
            assert lease.generation.state in (State.READY, State.DRAINING)
            await asyncio.sleep(self.rng.uniform(0, 40))
        except TimeoutError:
            assert waiter.cancelled() is not bool(leases)
        except RepositoryError:
            assert not leases
            raise
        finally:
            for lease in leases:
                lease.end()

    def check(self):
        """True at every moment, not only at the end."""
        gens = [g for of in self.models.generations.values() for g in of]
        for device, ledger in self.models.ledgers.items():
            assert 0 <= ledger.held <= ledger.capacity
            assert ledger.held == sum(g.held.get(device, 0) for g in gens)
        assert all(g.held == {} for g in gens if g.state not in HOLDS_MEMORY)
        assert all(g.sleeps and g.host is not None for g in gens if g.state is State.ASLEEP)
        assert len(self.models._queue) == sum(g.state is State.QUEUED for g in gens)
        assert {g.serial: g.state for g in gens}.items() <= self.counts.at.items()
        for name in self.names:
            self.check_status(name)
        assert all(self.models.wishes.said(name) is Word.LOAD for name in self.acknowledged)
        serving = [g for g in gens if g.state is State.READY]
        for gen in serving:
            newest = self.models.routes.find(gen.spec.model, gen.spec.version)
            assert newest is not None and newest.serial >= gen.serial

    def check_status(self, name):
        """What is told agrees with what runs, and no list grows."""
        gens, folder_ = self.models.generations.get(name, ()), self.models.folders.get(name)
        wanted = self.models.wishes.wants(name)
        status = describe(name, gens, folder_, wanted=wanted)
        route = self.models.routes.find(name)
        assert (status.state == "loaded") == (route is not None and route.spec.model == name)
        assert status.serving_version == (route.spec.version if route is not None else None)
        if status.state == "failed":
            assert status.last_error is not None
        if folder_ is None:
            assert all(g.state not in TERMINAL for g in gens)
            failing = any(g.state is State.FAILING for g in gens)
            assert failing or not status.last_error
        assert len(gens) <= 3 * 10


class Composed(World):
    """Two of the models are ensembles of the others, and of each other."""

    names = "abcde"
    capacity = 3 * CAPACITY

    def content(self, name):
        if name in "abc":
            return super().content(name)
        chain = self.rng.choices([*STEPS], [*STEPS.values()], k=self.rng.choice([1, 2, 3]))
        tensors = ["x", *map(str, range(1, len(chain))), "y"]
        steps = tuple(
            EnsembleStep(
                model=model,
                version=self.rng.choice([None] * 9 + [1]),
                inputs={"x": tensors[i]},
                outputs={"y": tensors[i + 1]},
            )
            for i, model in enumerate(chain)
        )
        return folder(
            spec(
                name,
                1,
                str(self.rng.random()),
                0,
                ensemble=Ensemble(steps=steps),
                pin=self.rng.random() < 0.05,
                ttl_s=self.rng.choice([None, None, 50.0]),
                priority=self.rng.randrange(3),
            )
        )

    async def one_thing(self, name):
        match self.rng.randrange(6):
            case 0 | 1:
                await self.use(self.rng.choice("dde"))
            case 2:
                await self.load(self.rng.choice("de"))
            case 3:
                await self.wait_for(self.rng.choice("de"))
            case _:
                await super().one_thing(name)

    def make_host(self, what):
        if what.config.ensemble is not None:
            return EnsembleHost(FakeCaller(lambda: self.models))
        host = super().make_host(what)
        host.infer_s = self.rng.uniform(0, 5)
        host.result = lambda request: InferResponse([signed(request.inputs[0], what.model)])
        return host

    async def use(self, name):
        gen = self.models.routes.find(name)
        if gen is None:
            raise ModelNotReadyError(name)
        with gen.lease():
            request = InferRequest([Tensor("x", "UINT8", (0,), b"")])
            response = await gen.batcher.submit(request)
            (answer,) = response.outputs
            self.is_right(gen.spec, bytes(answer.data).decode())

    def is_right(self, what, told):
        """One letter of each model that had a hand in it, in the order of the steps."""
        steps = what.config.ensemble.steps if what.config.ensemble else [what]
        if any(step.model in ("d", "e", "champion") for step in steps):
            assert len(told) >= len(steps)
        else:
            assert told == "".join(step.model for step in steps)

    def check(self):
        super().check()
        for name in "de":
            for gen in staying(self.models.register.of(name)):
                if gen.state is State.READY:
                    assert self.models.footing(gen.spec).firm
                    assert not self.models.away(name)


def signed(tensor, letter):
    data = bytes(tensor.data) + letter.encode()
    return Tensor("y", "UINT8", (len(data),), data)


def lived_well(calls):
    """Loaded or looked at once at the most; asleep and awake in turns; and stopped once, at the end."""
    return (
        re.fullmatch(r"(validate |load (sleep wake )*(sleep )?)?stop", " ".join(calls)) is not None
    )


@pytest.mark.parametrize("seed", range(drawn(20, long=40)))
async def test_chaos(seed):
    await survives(World(seed))


@pytest.mark.parametrize("seed", range(drawn(10, long=20)))
async def test_chaos_where_no_model_fits_beside_its_successor(seed):
    await survives(World(seed, tight=True))


@pytest.mark.parametrize("seed", range(drawn(15, long=30)))
async def test_chaos_of_ensembles(seed):
    await survives(Composed(seed))


async def survives(world):
    models = world.models
    async with models.running():
        world.look()
        await asyncio.gather(*[world.client(name) for name in world.names * 2])
    assert all(ledger.held == 0 for ledger in models.ledgers.values())
    assert [h.calls for h in world.hosts if not lived_well(h.calls)] == []
    assert not models.register.fallback.keys() - world.folders.keys()
    assert all(g.state in TERMINAL for of in models.generations.values() for g in of)
    assert not models._lives and not models._queue and not models.demand.models
    assert not models._beds and not models._examining
    assert all(g.leases == 0 for of in models.generations.values() for g in of)
    assert set(world.counts.born.values()) == set(world.counts.ended.values()) == {1}
    assert world.counts.born.keys() == world.counts.ended.keys()
