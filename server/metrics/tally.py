"""Counts inference: the InferMeter that the faces call, made to cost about a microsecond.

Plain numbers in plain objects, one per (model, version), because every call comes from the event
loop's thread and so nothing needs a lock; prometheus_client's own counters take one for each of the
seven numbers of a request. A scrape copies them there (`copied`) and formats the copy elsewhere.

Rule: no label value is made of what a client sent. A model that the repository does not know (any
more) is counted as UNKNOWN_MODEL, and what went with it is not measured.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Set
from typing import NamedTuple

from server.metrics import names
from server.metrics.meter import UNKNOWN_MODEL, Outcome


class Buckets:
    """A histogram. `counts` is per bucket, not cumulative; the last is what exceeds them all."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def copy(self) -> Buckets:
        twin = Buckets(self.bounds)
        twin.counts, twin.total = self.counts.copy(), self.total
        return twin

    def add(self, other: Buckets) -> None:
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        self.total += other.total


class Ended(NamedTuple):
    """How a request ended; with the model and the version the labels of the request counter."""

    protocol: str
    outcome: str


class Tally:
    """One version of one model. `executions` and `samples` are those of generations that have
    ended; a living one counts its own. `queue` and `batch` stay None until the model batches, `first`
    until it writes a text; `tokens`: by kind."""

    __slots__ = (
        "batch", "compute_s", "duration", "executions", "first", "queue", "queue_s", "requests",
        "samples", "tokens",
    )  # fmt: skip

    def __init__(self) -> None:
        self.requests: dict[Ended, int] = {}
        self.duration = Buckets(names.DURATION_S)
        self.queue: Buckets | None = None
        self.batch: Buckets | None = None
        self.first: Buckets | None = None
        self.tokens: dict[str, int] = {}
        self.queue_s = 0.0
        self.compute_s = 0.0
        self.executions = 0
        self.samples = 0

    def copy(self) -> Tally:
        twin = Tally()
        twin.requests = self.requests.copy()
        twin.duration = self.duration.copy()
        twin.queue = self.queue.copy() if self.queue else None
        twin.batch = self.batch.copy() if self.batch else None
        twin.first = self.first.copy() if self.first else None
        twin.tokens = self.tokens.copy()
        twin.queue_s, twin.compute_s = self.queue_s, self.compute_s
        twin.executions, twin.samples = self.executions, self.samples
        return twin


class Tallies:
    """The InferMeter. `knows` says whether the repository has a model of that name."""

    def __init__(self, knows: Callable[[str], bool] = lambda _: True) -> None:
        self.knows = knows
        self._found: dict[tuple[str, int], Tally] = {}

    def begin(self, model: str, version: int) -> None:
        """What is in flight is read from the leases themselves, at the scrape."""

    def done(
        self,
        model: str,
        version: int,
        outcome: Outcome,
        *,
        duration_s: float,
        queue_s: float = 0.0,
        compute_s: float = 0.0,
        samples: int = 0,
        batch_size: int = 0,
        protocol: str = "http",
    ) -> None:
        tally = self._found.get((model, version)) or self.of(model, version)
        ended = Ended(protocol, outcome)
        tally.requests[ended] = tally.requests.get(ended, 0) + 1
        if outcome != "success":
            return
        tally.duration.observe(duration_s)
        tally.queue_s += queue_s
        tally.compute_s += compute_s
        if batch_size:
            if tally.queue is None or tally.batch is None:
                tally.queue, tally.batch = Buckets(names.QUEUE_S), Buckets(names.BATCH)
            tally.queue.observe(queue_s)
            tally.batch.observe(batch_size)

    def wrote(
        self,
        model: str,
        version: int,
        *,
        prompt_tokens: int,
        completion_tokens: int,
        first_s: float | None = None,
    ) -> None:
        tally = self.of(model, version)
        for kind, count in (("prompt", prompt_tokens), ("completion", completion_tokens)):
            if count:
                tally.tokens[kind] = tally.tokens.get(kind, 0) + count
        if first_s is not None:
            if tally.first is None:
                tally.first = Buckets(names.FIRST_TOKEN_S)
            tally.first.observe(first_s)

    def of(self, model: str, version: int) -> Tally:
        if model != UNKNOWN_MODEL and not self.knows(model):
            model = UNKNOWN_MODEL
        key = (model, 0 if model == UNKNOWN_MODEL else version)
        return self._found.setdefault(key, Tally())

    def ran(self, model: str, version: int, executions: int, samples: int) -> None:
        """A generation has ended that had counted these."""
        tally = self.of(model, version)
        tally.executions += executions
        tally.samples += samples

    def forget(self, model: str) -> None:
        for key in [k for k in self._found if k[0] == model]:
            del self._found[key]

    def copied(self, versions: Mapping[str, Set[int]]) -> dict[tuple[str, int], Tally]:
        """All of them, frozen. Those of versions that are no more (`versions`: by model, those that
        are) are dropped for good: a model that is deployed daily must not gather series."""
        for key in list(self._found):
            model, version = key
            if model != UNKNOWN_MODEL and version not in versions.get(model, ()):
                del self._found[key]
        return {key: tally.copy() for key, tally in self._found.items()}
