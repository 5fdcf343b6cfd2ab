"""Counts what the repository says: loads, transitions, evictions, scans, changes of files.

Every series with a model label is on that model's shelf, so that `forgotten` leaves nothing of it
behind. Reasons and triggers are words of a fixed list, whatever an error's text says.
"""

from __future__ import annotations

from collections.abc import Set

from repository.errors import (
    CapacityError,
    CheckFailedError,
    ConflictError,
    FilesChangedError,
    IncompleteFilesError,
    LoadTimeoutError,
    NoDiskError,
    RejectedError,
    UntrustedCodeError,
    is_out_of_memory,
)
from repository.lifecycle.generation import Generation, Trigger
from repository.lifecycle.placement import by_kind
from repository.lifecycle.states import RISING, TERMINAL, Event, State
from repository.lifecycle.status import PUBLIC
from repository.observer import Observer
from server.metrics import names
from server.metrics.counts import Counts, ServerCounts, Values
from server.metrics.tally import Tallies

# The first row that an error is an instance of. Anything else is the backend's.
REASONS: tuple[tuple[type[BaseException], str], ...] = (
    (RejectedError, "config"),
    (IncompleteFilesError, "incomplete"),
    (FilesChangedError, "incomplete"),
    (UntrustedCodeError, "security"),
    (CheckFailedError, "check"),
    (LoadTimeoutError, "timeout"),
    (TimeoutError, "timeout"),
    (NoDiskError, "disk"),
    (CapacityError, "oom"),
    (MemoryError, "oom"),
    (FileNotFoundError, "missing_file"),
)
REPLACED = ("replaced by", "overtaken", "makes room for")
REPOSITORY = "repository"  # the label's value while nobody has said otherwise


class MetricsObserver(Observer):
    """`server`: what is of no model in particular."""

    def __init__(self, tallies: Tallies) -> None:
        self.repository = REPOSITORY
        self.server = ServerCounts()
        self._models: dict[str, Counts] = {}
        self._tallies = tallies
        self.server.count(names.ILLEGAL_MOVES, by=0)
        self.server.buckets(names.WATCH_LAG)

    def models(self) -> dict[str, Values]:
        """What was counted of each, frozen."""
        return {model: counts.frozen() for model, counts in self._models.items()}

    def _of(self, model: str) -> Counts:
        found = self._models.get(model)
        if found is None:
            found = self._models[model] = Counts()
        return found

    def stepped(self, gen: Generation, before: State) -> None:
        model, after = gen.spec.model, gen.state
        counts = self._of(model)
        if PUBLIC[before] is not PUBLIC[after]:
            counts.count(names.MODEL_TRANSITIONS, model, PUBLIC[before], PUBLIC[after])
        if after is State.QUEUED and gen.trigger is Trigger.RESTART:
            counts.count(names.WORKER_RESTARTS, model, gen.device)
        if after is State.ASLEEP:
            counts.count(names.MODEL_SLEEPS, model)
        if before in RISING and after not in RISING:
            self._load_ended(gen, counts)
        if after in TERMINAL:
            self._generation_ended(gen, counts, handed_on=before is State.ASLEEP)

    def _load_ended(self, gen: Generation, counts: Counts) -> None:
        """It serves, or never will."""
        model, outcome = gen.spec.model, load_outcome(gen)
        counts.count(names.MODEL_LOAD, model, gen.trigger, outcome)
        if outcome == "failure" and gen.error is not None:
            counts.count(names.MODEL_LOAD_FAILURES, model, reason_of(gen.error))
        if gen.ready_at is not None:
            if gen.woken:
                counts.count(names.MODEL_WAKES, model)
            took_s = gen.ready_at - gen.born_at
            self.server.observe(names.MODEL_LOAD_DURATION, took_s, gen.spec.backend, "total")
            counts.set(names.MODEL_LAST_LOAD, took_s, model)
            if gen.trigger is Trigger.WATCH and gen.spec.files:
                newest_s = max(f.ctime_ns for f in gen.spec.files) / 1e9
                self.watch_lag(model, max(0.0, gen.story[-1].at - newest_s))

    def _generation_ended(self, gen: Generation, counts: Counts, *, handed_on: bool) -> None:
        """`handed_on`: a newer generation was woken from it, and has all that it had."""
        key = gen.spec.key
        if gen.batcher is not None or gen.streams is not None:
            batches = gen.batcher.batches if gen.batcher is not None else {}
            work = gen.work
            self._tallies.ran(*key, work.executions, work.samples, batches, gen.lookups)
        if handed_on:
            return
        if gen.leaked:
            counts.count(names.MODEL_LEAKED, key.model, by=gen.leaked)
        if gen.ready_at is None:
            return
        ratio = reclaimed(gen)
        if ratio is not None:
            counts.set(names.MODEL_RECLAIMED, ratio, key.model)
        if gen.retire_asked.is_set():
            outcome = "success" if gen.error is None else "failure"
            counts.count(names.MODEL_UNLOAD, key.model, unload_trigger(gen.retire_why), outcome)
            self.server.observe(names.MODEL_UNLOAD_DURATION, leaving_s(gen), gen.spec.backend)

    def phase(self, gen: Generation, name: str, took_s: float) -> None:
        if name != "total":  # counted when it is ready, whoever says so
            self.server.observe(names.MODEL_LOAD_DURATION, took_s, gen.spec.backend, name)

    def evicted(self, gen: Generation, reason: str) -> None:
        self._of(gen.spec.model).count(names.MODEL_EVICTIONS, gen.spec.model, reason)

    def scanned(self, took_s: float, models: int) -> None:
        self.server.observe(names.SCAN_DURATION, took_s, self.repository)
        self.server.count(names.SCANS, self.repository)
        self.server.set(names.REPOSITORY_MODELS, models, self.repository)

    def watched(self, action: str, model: str) -> None:
        self.server.count(names.WATCH_EVENTS, self.repository, action)

    def watch_lag(self, model: str, lag_s: float) -> None:
        self.server.observe(names.WATCH_LAG, lag_s)

    def watcher(self, up: bool) -> None:
        self.server.set(names.WATCH_UP, up, self.repository)
        self.server.count(names.WATCH_OVERFLOWS, self.repository, by=0)

    def missed(self) -> None:
        self.server.count(names.WATCH_OVERFLOWS, self.repository)

    def forgotten(self, model: str) -> None:
        self._models.pop(model, None)
        self._tallies.forget(model)

    def keep(self, models: Set[str]) -> None:
        """Forgets all others: one whose folder went after its last generation did is told by nobody."""
        for model in self._models.keys() - models:
            self.forgotten(model)

    def illegal_move(self, gen: Generation) -> None:
        self.server.count(names.ILLEGAL_MOVES)


def reclaimed(gen: Generation) -> float | None:
    """Freed of what was to come back, 0..1. None: nobody knows how much that was."""
    expected = sum(by_kind(gen.measured).values()) or gen.needed
    if not expected:
        return None
    if not gen.confirmed and not gen.leaked:
        return 0.0  # its workers may still be there
    return max(0.0, 1 - gen.leaked / expected)


def load_outcome(gen: Generation) -> str:
    if gen.ready_at is not None:
        return "success"
    if gen.error is None:
        return "superseded" if gen.retire_why.startswith(REPLACED) else "cancelled"
    if isinstance(gen.error, (ConflictError, FilesChangedError)):
        return "superseded"
    return "failure" if isinstance(gen.error, Exception) else "cancelled"


def reason_of(error: BaseException) -> str:
    """A load's failure as one of eight words. A foreign cause says more than our own wrapping."""
    seen: BaseException | None = error
    while seen is not None:
        for kind, reason in REASONS:
            if isinstance(seen, kind):
                return reason
        if is_out_of_memory(seen):
            return "oom"
        seen = seen.__cause__
    return "backend"


def unload_trigger(why: str) -> str:
    if why.startswith("evicted"):
        return "eviction"
    return "reload" if why.startswith(REPLACED) else "unwanted"


def leaving_s(gen: Generation) -> float:
    """From RETIRE to the end, by the story's times."""
    began = next((s.at for s in reversed(gen.story) if s.event is Event.RETIRE), gen.story[-1].at)
    return max(0.0, gen.story[-1].at - began)
