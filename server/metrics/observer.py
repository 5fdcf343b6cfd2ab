"""Counts what the repository says: loads, transitions, evictions, scans, changes of files.

Counters here are prometheus_client's own, their children bound once. Every series with a model
label is remembered by model, so that `forgotten` leaves nothing of it behind. Reasons and triggers
are words of a fixed list, whatever an error's text says.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Generic, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

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
)
from repository.lifecycle.generation import Generation, Trigger
from repository.lifecycle.states import RISING, TERMINAL, Event, State
from repository.lifecycle.status import PUBLIC
from repository.observer import Observer
from server.metrics import names
from server.metrics.tally import Tallies

M = TypeVar("M", Counter, Gauge, Histogram)

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
OUT_OF_MEMORY = ("out of memory", "bad_alloc", "failed to allocate")
REPLACED = ("replaced by", "overtaken", "makes room for")
REPOSITORY = "repository"  # the label's value while nobody has said otherwise


class Bound(Generic[M]):
    """A metric whose first label is the model."""

    def __init__(self, metric: M) -> None:
        self._metric: M = metric
        self._children: dict[str, dict[tuple[str, ...], M]] = {}

    def of(self, model: str, *rest: str) -> M:
        of_model = self._children.setdefault(model, {})
        child = of_model.get(rest)
        if child is None:
            child = of_model[rest] = self._metric.labels(model, *rest)
        return child

    def forget(self, model: str) -> None:
        for rest in self._children.pop(model, {}):
            self._metric.remove(model, *rest)


class MetricsObserver(Observer):
    def __init__(self, registry: CollectorRegistry, tallies: Tallies) -> None:
        self.repository = REPOSITORY
        self._tallies = tallies
        self._seen: set[str] = set()  # models that may have series
        self._by_model: list[Callable[[str], None]] = [tallies.forget]

        def counter(family: names.Family) -> Counter:
            return Counter(family.full, family.help, family.labels, registry=registry)

        def gauge(family: names.Family) -> Gauge:
            return Gauge(family.full, family.help, family.labels, registry=registry)

        def histogram(family: names.Family) -> Histogram:
            return Histogram(
                family.full, family.help, family.labels, buckets=family.buckets, registry=registry
            )

        def bound(metric: M) -> Bound[M]:
            found = Bound(metric)
            self._by_model.append(found.forget)
            return found

        self._transitions = bound(counter(names.MODEL_TRANSITIONS))
        self._loads = bound(counter(names.MODEL_LOAD))
        self._failures = bound(counter(names.MODEL_LOAD_FAILURES))
        self._last_load = bound(gauge(names.MODEL_LAST_LOAD))
        self._unloads = bound(counter(names.MODEL_UNLOAD))
        self._evictions = bound(counter(names.MODEL_EVICTIONS))
        self._restarts = bound(counter(names.WORKER_RESTARTS))
        self._load_s = histogram(names.MODEL_LOAD_DURATION)
        self._unload_s = histogram(names.MODEL_UNLOAD_DURATION)
        self._scan_s = histogram(names.SCAN_DURATION)
        self._scans = counter(names.SCANS)
        self._models = gauge(names.REPOSITORY_MODELS)
        self._watched = counter(names.WATCH_EVENTS)
        self._lag_s = histogram(names.WATCH_LAG)
        self._watch_up = gauge(names.WATCH_UP)
        self._illegal = counter(names.ILLEGAL_MOVES)

    def stepped(self, gen: Generation, before: State) -> None:
        model, after = gen.spec.model, gen.state
        self._seen.add(model)
        if PUBLIC[before] is not PUBLIC[after]:
            self._transitions.of(model, PUBLIC[before], PUBLIC[after]).inc()
        if after is State.QUEUED and gen.trigger is Trigger.RESTART:
            self._restarts.of(model, gen.device).inc()
        if before in RISING and after not in RISING:
            self._load_ended(gen)
        if after in TERMINAL:
            self._generation_ended(gen)

    def _load_ended(self, gen: Generation) -> None:
        """It serves, or never will."""
        outcome = load_outcome(gen)
        self._loads.of(gen.spec.model, gen.trigger, outcome).inc()
        if outcome == "failure" and gen.error is not None:
            self._failures.of(gen.spec.model, reason_of(gen.error)).inc()
        if gen.ready_at is not None:
            took_s = gen.ready_at - gen.born_at
            self._load_s.labels(gen.spec.backend, "total").observe(took_s)
            self._last_load.of(gen.spec.model).set(took_s)
            if gen.trigger is Trigger.WATCH and gen.spec.files:
                newest_s = max(f.ctime_ns for f in gen.spec.files) / 1e9
                self.watch_lag(gen.spec.model, max(0.0, gen.story[-1].at - newest_s))

    def _generation_ended(self, gen: Generation) -> None:
        key = gen.spec.key
        if gen.batcher is not None:
            self._tallies.ran(*key, gen.work.executions, gen.work.samples)
        if gen.ready_at is not None and gen.retire_asked.is_set():
            outcome = "success" if gen.error is None else "failure"
            self._unloads.of(key.model, unload_trigger(gen.retire_why), outcome).inc()
            self._unload_s.labels(gen.spec.backend).observe(leaving_s(gen))

    def phase(self, gen: Generation, name: str, took_s: float) -> None:
        if name != "total":  # counted when it is ready, whoever says so
            self._load_s.labels(gen.spec.backend, name).observe(took_s)

    def evicted(self, gen: Generation, reason: str) -> None:
        self._evictions.of(gen.spec.model, reason).inc()

    def scanned(self, took_s: float, models: int) -> None:
        self._scan_s.labels(self.repository).observe(took_s)
        self._scans.labels(self.repository).inc()
        self._models.labels(self.repository).set(models)

    def watched(self, action: str, model: str) -> None:
        self._watched.labels(self.repository, action).inc()

    def watch_lag(self, model: str, lag_s: float) -> None:
        self._lag_s.observe(lag_s)

    def watcher(self, up: bool) -> None:
        self._watch_up.labels(self.repository).set(up)

    def forgotten(self, model: str) -> None:
        self._seen.discard(model)
        for forget in self._by_model:
            forget(model)

    def keep(self, models: Set[str]) -> None:
        """Forgets all others: one whose folder went after its last generation did is told by nobody."""
        for model in self._seen - models:
            self.forgotten(model)

    def illegal_move(self, gen: Generation) -> None:
        self._illegal.inc()


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
        if type(seen).__name__ == "OutOfMemoryError" or _says_out_of_memory(seen):
            return "oom"
        seen = seen.__cause__
    return "backend"


def _says_out_of_memory(error: BaseException) -> bool:
    """From a worker an error comes as text; the frameworks agree on few words."""
    text = str(error).lower()
    return any(words in text for words in OUT_OF_MEMORY)


def unload_trigger(why: str) -> str:
    if why.startswith("evicted"):
        return "eviction"
    return "reload" if why.startswith(REPLACED) else "unwanted"


def leaving_s(gen: Generation) -> float:
    """From RETIRE to the end, by the story's times."""
    began = next((s.at for s in reversed(gen.story) if s.event is Event.RETIRE), gen.story[-1].at)
    return max(0.0, gen.story[-1].at - began)
