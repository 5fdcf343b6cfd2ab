"""Which models nobody drives out: what their config says, or what somebody said by call, within a cap.

A word by call wins over the config until somebody says otherwise or the model's folder goes. Words
outlive the server: each change is noted in the breath in which it is made.

An operator may cap what pinned models hold of each device: those who came first keep their pin, what
would exceed the cap is loaded all the same, but not pinned, and says why. It is looked at again whenever
somebody comes or leaves (`honour`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from repository.lifecycle.generation import Generation
from repository.lifecycle.ledger import MemoryLedger
from repository.lifecycle.states import State
from repository.sizes import human
from repository.spec import ModelSpec

OTHERS = ""  # of the caps: every device that is not named

Note = Callable[[str, bool | None], None]


class Pins:
    """`caps`: device -> share of its budget, 0..1, that pinned models may hold. `note` is told what was
    said of a model, None: nothing that counts."""

    def __init__(
        self,
        caps: Mapping[str, float] | None = None,
        *,
        note: Note = lambda model, pinned: None,
    ) -> None:
        self.caps = dict(caps or {})
        self._note = note
        self.carried: frozenset[str] = frozenset()  # models that pinned ensembles need
        self._said: dict[str, bool] = {}

    def recall(self, said: Mapping[str, bool]) -> None:
        """What was said before the start."""
        self._said = dict(said)

    def say(self, model: str, pinned: bool) -> None:
        self._said[model] = pinned
        self._note(model, pinned)

    def forget(self, model: str) -> None:
        """Its folder is gone."""
        if self._said.pop(model, None) is not None:
            self._note(model, None)

    def wants(self, spec: ModelSpec) -> bool:
        return self._said.get(spec.model, spec.config.pin) or spec.model in self.carried

    def cap(self, ledger: MemoryLedger) -> int:
        """Bytes of a device that pinned models may hold."""
        share = self.caps.get(ledger.device, self.caps.get(OTHERS, 1.0))
        return int(ledger.capacity * share)

    def honour(
        self, generations: Iterable[Generation], ledgers: Mapping[str, MemoryLedger]
    ) -> list[Generation]:
        """Sets `pinned` and `pin_refused` of all that serve or sleep, in order of birth. What is leaving
        or has a newer one serving in its place is pinned no longer, and what is loading not yet (nobody
        drives that out). Returns those that are refused now and were not before."""
        left = {device: self.cap(ledger) for device, ledger in ledgers.items()}
        gens = sorted(generations, key=lambda g: g.serial)
        newest = {g.spec.key: g for g in gens if g.state is State.READY}
        refused: list[Generation] = []
        for gen in gens:
            before, gen.pin_refused = gen.pin_refused, ""
            stays = gen.state in (State.READY, State.ASLEEP) and not gen.retire_asked.is_set()
            stays = stays and newest.get(gen.spec.key, gen) is gen
            gen.pinned = stays and self.wants(gen.spec)
            if not gen.pinned:
                continue
            over = next((d for d, n_bytes in gen.held.items() if n_bytes > left[d]), None)
            if over is None:
                for device, n_bytes in gen.held.items():
                    left[device] -= n_bytes
                continue
            gen.pinned = False
            gen.pin_refused = (
                f"pinned models may hold {human(self.cap(ledgers[over]))} of {over} (--pin-cap), "
                f"{human(left[over])} of it are left, and this one holds {human(gen.held[over])}"
            )
            if not before:
                refused.append(gen)
        return refused
