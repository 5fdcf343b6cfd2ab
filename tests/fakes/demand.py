"""A reconciler whose models are loaded by requests that wait, over fake hosts in virtual time."""

import asyncio
from collections import Counter

from repository.demand import Demand
from repository.errors import VersionNotFoundError
from repository.lifecycle.states import State
from repository.observer import Observer
from tests.fakes.heart import folders, reconciler, spec
from tests.fakes.host import FakeHost

CAPACITY = 100
LOAD_S = 3.0
RESIDENCY_S = 2.0


def why_not(name, version):
    return VersionNotFoundError(f"nothing of '{name}' serves")


class World:
    """A reconciler over fake hosts. `loads`: model -> how often it was loaded; `left`: in order."""

    def __init__(self, *specs, load_s=LOAD_S, most=256, patience_s=3600.0, lives=None, **rest):
        self.load_s = load_s
        self.hosts = {}
        self.loads = Counter()
        self.errors = {}  # model -> what its load fails with
        self.evicted = []
        world = self

        class Seeing(Observer):
            def evicted(self, gen, reason):
                world.evicted.append(gen.spec.model)

        self.models = reconciler(
            self.make_host,
            CAPACITY,
            lives=lives,
            demand=Demand(most=most, patience_s=patience_s),
            min_residency_s=RESIDENCY_S,
            why_not=why_not,
            observer=Seeing(),
            **rest,
        )
        self.models.observe(folders(*specs))

    def make_host(self, what):
        self.loads[what.model] += 1
        load_s = self.load_s(what) if callable(self.load_s) else self.load_s
        host = FakeHost(load_s=load_s, load_error=self.errors.get(what.model))
        self.hosts.setdefault(what.model, []).append(host)
        return host

    def ask(self, name, version=None):
        """Waits; the future is done when the lease is in `lease`."""
        got = []
        future = self.models.wait_for(name, version, got.append)
        future.lease = lambda: got[0]
        return future

    async def lease(self, name):
        gen = self.models.routes.find(name)
        if gen is not None:
            found = gen.lease()
            found.begin()
            return found
        future = self.ask(name)
        await future
        return future.lease()

    async def use(self, name, for_s=0.0):
        lease = await self.lease(name)
        gen = lease.generation
        assert gen.spec.model == name and gen.state in (State.READY, State.DRAINING)
        await asyncio.sleep(for_s)
        lease.end()
        return gen

    def state(self, name):
        return [str(g.state) for g in self.models.register.of(name)]


def big(name, n_bytes=60, **config):
    return spec(name, n_bytes=n_bytes, **config)
