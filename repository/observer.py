"""Who counts. The repository tells an observer what happened; it knows nothing of metrics formats.

Calls come from the event loop's thread, return at once and never raise.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial

from repository.lifecycle.generation import Generation
from repository.lifecycle.states import State

log = logging.getLogger("modeldepot.observer")


class Observer:
    """Listens to nothing. Override what you count. Durations in seconds."""

    def stepped(self, gen: Generation, before: State) -> None:
        """After every step of every generation."""

    def phase(self, gen: Generation, name: str, took_s: float) -> None:
        """A load phase ended: queue, read, build, warmup; wake in place of read and build. Or it fell
        asleep: sleep."""

    def evicted(self, gen: Generation, reason: str) -> None:
        """Told to leave, or to sleep: memory (for others), idle_ttl, manual (somebody said so)."""

    def scanned(self, took_s: float, models: int) -> None:
        """A whole scan of the repository ended."""

    def watched(self, action: str, model: str) -> None:
        """added, modified, deleted, ignored, settling."""

    def watcher(self, up: bool) -> None:
        """The watcher runs, or has stopped with an error."""

    def missed(self) -> None:
        """A regular look found changes of which the watcher had told nothing: it lost events."""

    def forgotten(self, model: str) -> None:
        """The model's folder is gone and nothing of it runs: drop its series."""

    def illegal_move(self, gen: Generation) -> None:
        """A bug: a generation was asked for a step that the table does not have."""


class Guarded(Observer):
    """Passes everything on to each of them. What one raises all the same is logged and changes nothing:
    a mistake in counting must not stop a model, nor the planner."""

    def __init__(self, *observers: Observer) -> None:
        for name in [n for n in vars(Observer) if not n.startswith("_")]:
            setattr(self, name, partial(_tell, [getattr(one, name) for one in observers]))


def _tell(each: Iterable[Callable[..., None]], *args: object) -> None:
    for what in each:
        try:
            what(*args)
        except Exception:
            log.exception("an observer failed")
