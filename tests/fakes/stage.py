"""One generation that has just been admitted, its host, its ledgers, and its life as a task."""

import asyncio

from repository.life import Books, live
from repository.lifecycle.ledger import MemoryLedger
from repository.lifecycle.placement import HOST
from repository.lifecycle.states import Event
from repository.messages import Loaded
from tests.fakes.heart import means, newborn, spec
from tests.fakes.host import FakeHost

SLEEPER = Loaded(abilities=frozenset({"sleep"}))


class Stage:
    """`heir_of`: a stage whose generation sleeps; it is woken. `bed_s`: how long a place in the host
    tier takes. `made`: every host that was made, `noted`: each phase that was told."""

    def __init__(self, host=None, *, tier=10, bed_s=0.0, heir_of=None, rolled_back=False, **rest):
        self.made = []
        self.noted = []
        self.bed_s = bed_s
        self.new_host = host
        self.ledgers = {"cpu": MemoryLedger("cpu", 10), HOST: MemoryLedger(HOST, tier)}
        clock = asyncio.get_running_loop().time
        serial = 1 if heir_of is None else heir_of.gen.serial + 1
        self.gen = newborn(spec(n_bytes=10), serial, clock=clock, rolled_back=rolled_back)
        self.gen.placement = self.gen.options[0]
        if heir_of is None:
            self.gen.held = {"cpu": 10}
            self.ledgers["cpu"].take(10)
        else:
            self.ledgers = heir_of.ledgers
            heir_of.gen.hand_over(self.gen)
            more = 10 - self.gen.held.get("cpu", 0)
            self.ledgers["cpu"].take(more)
            self.gen.held["cpu"] = 10
        self.gen.step(Event.ADMIT)
        self.means = means(self.make_host, phase=self.phase, **rest)
        self.life = asyncio.create_task(live(self.gen, self.means, self.books))

    @property
    def host(self):
        return self.made[-1]

    def make_host(self, what):
        self.made.append(self.new_host or FakeHost())
        return self.made[-1]

    def phase(self, gen, name, took_s):
        self.noted.append(name)

    @property
    def books(self):
        return Books(self.give_back, self.keep, self.bed)

    def give_back(self, gen):
        self.keep(gen, {})

    def keep(self, gen, held):
        for device, n_bytes in gen.held.items():
            self.ledgers[device].give(n_bytes - held.get(device, 0))
        gen.held = {device: n for device, n in held.items() if n}

    async def bed(self, gen, n_bytes):
        await asyncio.sleep(self.bed_s)
        if n_bytes > self.ledgers[HOST].free:
            return False
        self.ledgers[HOST].take(n_bytes)
        gen.held[HOST] = gen.held.get(HOST, 0) + n_bytes
        return True

    @property
    def free(self):
        """Bytes of the device and of the host tier."""
        return self.ledgers["cpu"].free, self.ledgers[HOST].free

    def path(self):
        return [str(step.state) for step in self.gen.story][2:]

    def ended(self):
        return self.host.calls, self.ledgers["cpu"].free

    def note(self):
        return self.gen.story[-1].note
