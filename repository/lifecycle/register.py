"""Which generations are remembered: those that a plan looks at, and a few that only people do.

Rule: what has ended stays only as long as it says something about what is wanted now; else a model
that fails now and then would grow a list for ever, and an old fault would be told as a new one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence

from repository.lifecycle.generation import Generation
from repository.lifecycle.plan import Fallback, counting
from repository.lifecycle.states import TERMINAL, State
from repository.lifecycle.wishes import Wanted
from repository.snapshot import ModelFolder

HISTORY = 8  # ended generations of one model kept for people to read
CAUSES = 4  # errors behind an error that are looked at


class Register:
    """`living` has lists that are never empty, oldest first. `fallback`: by model and version, what left
    for a newer one that does not serve yet. It does not end anything."""

    def __init__(self, *, crash_limit: int) -> None:
        self.living: dict[str, list[Generation]] = {}
        self.history: dict[str, deque[Generation]] = {}
        self.fallback: dict[str, dict[int, Fallback]] = {}
        self._crash_limit = crash_limit

    def add(self, gen: Generation) -> None:
        self.living.setdefault(gen.spec.model, []).append(gen)

    def of(self, model: str) -> list[Generation]:
        return self.living.get(model, [])

    def forgive(self, model: str, *, of: type[BaseException] = BaseException) -> None:
        """Somebody has asked: faults until now count for nothing, also of what is still stopping.
        `of`: only these faults."""
        for gen in self.of(model):
            if gen.state in (State.FAILING, State.FAILED) and isinstance(gen.error, of):
                gen.forgiven = True
        self._drop(model, [g for g in self.of(model) if g.state is State.FAILED and g.forgiven])

    def leaves(self, old: Generation, heir: Generation) -> None:
        """It will be back if `heir` fails."""
        back = Fallback(Wanted(old.spec, old.epoch, back=True), heir.spec.version)
        self.fallback.setdefault(old.spec.model, {})[old.spec.version] = back

    def serves(self, gen: Generation) -> None:
        """Nothing comes back any more in place of what serves."""
        found = self.fallback.get(gen.spec.model)
        if found is None or gen.rolled_back:
            return
        left = {v: back for v, back in found.items() if back.heir != gen.spec.version}
        self.fallback[gen.spec.model] = left
        if not left:
            del self.fallback[gen.spec.model]

    def bury(self, model: str, folder: ModelFolder | None, wanted: Mapping[int, Wanted]) -> None:
        """Lets go of what no plan and no status looks at any more."""
        gens = self.of(model)
        if not any(gen.state in TERMINAL for gen in gens):
            return
        kept = [*self._telling(gens, folder, wanted), *self._standing_back(gens, folder)]
        self._drop(
            model,
            [
                g
                for g in gens
                if g.state is State.GONE or (g.state is State.FAILED and g not in kept)
            ],
        )

    def forget(self, model: str) -> None:
        """Its folder is gone, and nothing of it is left."""
        self.history.pop(model, None)
        self.fallback.pop(model, None)

    def _telling(
        self,
        gens: Iterable[Generation],
        folder: ModelFolder | None,
        wanted: Mapping[int, Wanted],
    ) -> list[Generation]:
        """Of each version that exists, and is wanted if any is: its last outcome, and the faults that
        count towards the next try."""
        versions = set(folder.versions) if folder is not None else set()
        versions &= wanted.keys() or versions
        kept: list[Generation] = []
        for version in versions:
            of_version = [g for g in gens if g.spec.version == version and not g.forgiven]
            kept += [g for g in of_version if g.settled.is_set()][-1:]
            if version in wanted:
                kept += counting(of_version, wanted[version], crash_limit=self._crash_limit)
        return kept

    def _standing_back(
        self, gens: Sequence[Generation], folder: ModelFolder | None
    ) -> list[Generation]:
        """The faults for which something older serves in place of what is wanted, and those of the
        older one: as long as there is one, also while nothing of the model is wanted."""
        found = self.fallback.get(gens[0].spec.model, {})
        kept: list[Generation] = []
        for version, back in found.items():
            spec = folder.specs.get(back.heir) if folder is not None else None
            wants = [(version, back.wanted), *([(back.heir, Wanted(spec))] if spec else [])]
            for at, want in wants:
                of_version = [g for g in gens if g.spec.version == at and not g.forgiven]
                kept += counting(of_version, want, crash_limit=self._crash_limit)
        return kept

    def _drop(self, model: str, gone: list[Generation]) -> None:
        if not gone:
            return
        kept = [g for g in self.living[model] if g not in gone]
        self.history.setdefault(model, deque(maxlen=HISTORY)).extend(gone)
        for gen in gone:
            _let_go(gen)
        if kept:
            self.living[model] = kept
        else:
            del self.living[model]


def _let_go(gen: Generation) -> None:
    """What a past generation is shown with is small; its host and the frames of its error are not."""
    if not gen.leases:
        gen.batcher = gen.streams = gen.signature = None
    error = gen.error
    for _ in range(CAUSES):
        if error is not None:
            error.__traceback__ = None
            error = error.__cause__ or error.__context__
