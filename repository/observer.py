"""Who counts. The repository tells an observer what happened; it knows nothing of metrics formats.

Calls come from the event loop's thread, return at once and never raise.
"""

from __future__ import annotations

from repository.lifecycle.generation import Generation
from repository.lifecycle.states import State


class Observer:
    """Listens to nothing. Override what you count. Durations in seconds."""

    def stepped(self, gen: Generation, before: State) -> None:
        """After every step of every generation."""

    def phase(self, gen: Generation, name: str, took_s: float) -> None:
        """A load phase ended: queue, read, warmup, total."""

    def evicted(self, gen: Generation, reason: str) -> None:
        """Told to leave for others: memory or idle_ttl."""

    def unloaded(self, gen: Generation, took_s: float) -> None:
        """A generation that had been asked to retire has given everything back."""

    def scanned(self, took_s: float, models: int) -> None:
        """A whole scan of the repository ended."""

    def watched(self, action: str, model: str) -> None:
        """added, modified, deleted, ignored, settling."""

    def watch_lag(self, model: str, lag_s: float) -> None:
        """From the last change of a file to the new generation serving."""

    def watcher(self, up: bool) -> None:
        """The watcher runs, or has stopped with an error."""

    def forgotten(self, model: str) -> None:
        """The model's folder is gone and nothing of it runs: drop its series."""

    def illegal_move(self, gen: Generation) -> None:
        """A bug: a generation was asked for a step that the table does not have."""
