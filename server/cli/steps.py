"""How a load or an unload proceeds, from events: what is known of each generation, and lines of it.

Times are this side's: the server's clock may be another.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from repository.events import Event

ENDED = frozenset({"gone", "failed"})
RISING = ("queued", "loading", "warming")


class Step(NamedTuple):
    state: str
    at: float
    note: str


@dataclass(slots=True)
class Progress:
    """One generation. `name` is "digits:2 #7"."""

    name: str
    steps: list[Step] = field(default_factory=list)

    @property
    def state(self) -> str:
        return self.steps[-1].state

    def took_s(self, index: int, now: float) -> float:
        """How long the step lasted, up to now if it is the last."""
        until = self.steps[index + 1].at if index + 1 < len(self.steps) else now
        return max(0.0, until - self.steps[index].at)

    def line(self, now: float) -> str:
        """`digits:2 #7  queued 0.0s → loading 1.2s → warming`"""
        parts = []
        for index, step in enumerate(self.steps):
            over = step.state in ENDED or step.state == "ready"
            parts.append(step.state if over else f"{step.state} {self.took_s(index, now):.1f}s")
        note = self.steps[-1].note
        return f"{self.name}  {' → '.join(parts)}" + (f"  ({note})" if note else "")


class Steps:
    """`see` an event; `news` says what it changed, None if nothing."""

    def __init__(self, model: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.began = clock()
        self.generations: dict[int, Progress] = {}
        self._model = model

    def see(self, event: Event) -> str | None:
        state = event.data.get("state")
        if event.kind != "model.state" or not isinstance(state, str):
            return None
        if self._model and event.model != self._model:
            return None
        now = self.clock()
        name = f"{event.model}:{event.version} #{event.generation}"
        progress = self.generations.setdefault(event.generation, Progress(name))
        progress.steps.append(Step(state, now, str(event.data.get("note") or "")))
        note = f"  ({progress.steps[-1].note})" if progress.steps[-1].note else ""
        return f"{now - self.began:7.2f}s  {name}  {state}{note}"

    @property
    def rising(self) -> bool:
        return any(g.state in RISING for g in self.generations.values())
