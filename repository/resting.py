"""The part of the writer that lets models sleep and wake (`repository.reconciler` is the whole).

    by call, after `sleep_s` of idleness, evicted, or replaced with a way back
      → it drains, finds a place in the host tier (`bed`) and sleeps; without a place it is unloaded
      → somebody wants it: a new generation is queued as any other, and takes over its host and memory

Who has to leave the tier for another is decided where memory is given and taken (`housing`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable

from repository.life import bytes_asleep
from repository.lifecycle.drowsy import drowsy
from repository.lifecycle.generation import Generation
from repository.lifecycle.placement import HOST
from repository.lifecycle.plan import asleep_for
from repository.lifecycle.states import RISING, State
from repository.lifecycle.wishes import Wanted, Word
from repository.replacing import Replacing
from repository.sizes import human


class Resting(Replacing):
    @abstractmethod
    def _tick(self) -> None:
        """Plans what is due."""

    # who may sleep --------------------------------------------------------------------------------

    def sleepless(self, gen: Generation) -> str:
        """Why it could not sleep, or ""."""
        if gen.loaded is None or "sleep" not in gen.loaded.abilities:
            return f"backend '{gen.spec.backend}' cannot let a model sleep"
        tier = self.ledgers.get(HOST)
        if tier is None or not tier.capacity:
            return "there is no host tier (--host-tier is 0)"
        n_bytes = bytes_asleep(gen)
        if n_bytes > tier.capacity:
            return (
                f"it needs {human(n_bytes)} of host memory asleep, and the host tier has "
                f"{human(tier.capacity)} (--host-tier)"
            )
        return ""

    def loads_on_request(self, model: str) -> bool:
        """A request brings it back: it sleeps, or is on its way to that or back, and nobody said so."""
        if model in self.demand.models:
            return True
        if self.wishes.said(model) is Word.SLEEP:
            return False
        if self.wishes.wants(model) and self.away(model):
            return any(self.loads_on_request(part) for part in self.parts(model))
        return any(
            g.sleeps or (g.state in RISING and g.wakes is not None) for g in self.register.of(model)
        )

    # falling asleep -------------------------------------------------------------------------------

    def put_to_sleep(self, model: str) -> list[Generation]:
        """Somebody says so. Returns the generations that are to sleep, and those that do."""
        self.wishes.sleep(model)
        going = [
            g
            for g in self.register.of(model)
            if g.sleeps or (g.state is State.READY and not g.retire_asked.is_set())
        ]
        for gen in going:
            if not gen.sleeps:
                gen.retire("put to sleep", sleeps=True)
                self.observer.evicted(gen, "manual")
        self._mark(model)
        self._tick()
        return going

    def _doze(self, gens: Iterable[Generation], now: float) -> float | None:
        """Those who have idled long enough go to sleep. Returns when to look again."""
        over, at = drowsy(list(gens), now=now, may_sleep=lambda gen: not self.sleepless(gen))
        for gen in over:
            self.wishes.evict(gen.spec.model)
            gen.retire(f"idle for {gen.spec.config.sleep_s:g} s", sleeps=True)
            self.observer.evicted(gen, "idle_ttl")
            self._mark(gen.spec.model)
        return at

    # waking ---------------------------------------------------------------------------------------

    def _call_sleepers(self, gens: Iterable[Generation]) -> None:
        """Who is queued wakes whoever sleeps for the same files by now; else it loads as any other."""
        found = list(gens)
        for gen in found:
            if gen.state is State.QUEUED:
                want = Wanted(gen.spec, gen.epoch, back=gen.rolled_back)
                gen.wakes = asleep_for(want, found)
