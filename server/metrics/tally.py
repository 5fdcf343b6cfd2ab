"""Counts inference: the InferMeter that the faces call, made to cost about a microsecond.

Plain numbers in plain objects, one per (model, version), because every call comes from the event
loop's thread and so nothing needs a lock; prometheus_client's own counters take one for each of the
seven numbers of a request. A scrape copies what has changed (`copied`) and formats the copy elsewhere.

Rule: no label value is made of what a client sent. A model that the repository does not know (any
more) is counted as UNKNOWN_MODEL, and what went with it is not measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TypeAlias

from repository.reports import Lookups
from server.metrics import names
from server.metrics.buckets import Buckets, Exemplar
from server.metrics.meter import UNKNOWN_MODEL, Outcome, Times, Traced, Tracer
from server.metrics.traces import Trace

# How a request ended: protocol, outcome; with the model and the version the labels of the request
# counter. (A plain tuple: one with names costs a third of a microsecond more, at every request.)
Ended: TypeAlias = tuple[str, str]


MOST_ANSWERS = 63  # of one request that are counted apart; all later ones count as one more
NO_BATCHES: Mapping[int, Sequence[float]] = MappingProxyType({})


@dataclass(slots=True)
class Answers:
    """The answers of one index. `took_s`: since the request, or the answer before."""

    success: int = 0
    empty: int = 0
    fail: int = 0
    took_s: float = 0.0


class Tally:
    """One version of one model. `executions` and `samples` are those of generations that have
    ended; a living one counts its own. `queue` and `batch` stay None until the model batches, `first`
    until it writes a text, `lookups` until a generation has ended whose answers were kept; `tokens`: by
    kind. `changed`: since it was last copied.

    Not on the metrics' page, but in Triton's statistics: `failed_s`, all that failed together;
    `idle`, those that succeeded though their model was not run, and of `input_s` and `output_s` their
    parts; `last_at`, seconds since 1970; `batches` of generations that have ended (rows -> executions,
    seconds); `answers` of models with any number of them, by their place in the row.
    """

    __slots__ = (
        "answers", "batch", "batches", "changed", "compute_s", "duration", "executions", "failed_s",
        "first", "idle", "idle_input_s", "idle_output_s", "input_s", "last_at", "lookups", "output_s",
        "queue", "queue_s", "requests", "samples", "tokens",
    )  # fmt: skip

    def __init__(self) -> None:
        self.requests: dict[Ended, int] = {}
        self.duration = Buckets(names.DURATION_S)
        self.queue: Buckets | None = None
        self.batch: Buckets | None = None
        self.first: Buckets | None = None
        self.tokens: dict[str, int] = {}
        self.queue_s = self.input_s = self.compute_s = self.output_s = 0.0
        self.executions = 0
        self.samples = 0
        self.idle = 0
        self.idle_input_s = self.idle_output_s = 0.0
        self.lookups: Lookups | None = None
        self.failed_s = self.last_at = 0.0
        self.batches: dict[int, list[float]] = {}
        self.answers: dict[int, Answers] = {}
        self.changed = True

    def all_lookups(self, living: Iterable[Lookups | None]) -> Lookups | None:
        """With those of generations that live; None: no answers were kept."""
        found = [one for one in (self.lookups, *living) if one is not None]
        total = Lookups()
        for one in found:
            total.add(one)
        return total if found else None

    def copy(self) -> Tally:
        twin = Tally()
        twin.requests = self.requests.copy()
        twin.duration = self.duration.copy()
        twin.queue = self.queue.copy() if self.queue else None
        twin.batch = self.batch.copy() if self.batch else None
        twin.first = self.first.copy() if self.first else None
        twin.tokens = self.tokens.copy()
        twin.queue_s, twin.input_s = self.queue_s, self.input_s
        twin.compute_s, twin.output_s = self.compute_s, self.output_s
        twin.executions, twin.samples = self.executions, self.samples
        twin.idle_input_s, twin.idle_output_s = self.idle_input_s, self.idle_output_s
        twin.lookups = replace(self.lookups) if self.lookups else None
        return twin


Frozen: TypeAlias = Mapping[int, Tally]  # of one model, by version


class Tallies:
    """The InferMeter. `knows` says whether the repository has a model of that name; `tracer` is told of
    every request that held a lease, while it is active."""

    def __init__(self, knows: Callable[[str], bool] = lambda _: True) -> None:
        self.knows = knows
        self.tracer: Tracer | None = None
        self._found: dict[tuple[str, int], Tally] = {}
        self._frozen: dict[str, Frozen] = {}

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
        input_s: float = 0.0,
        compute_s: float = 0.0,
        output_s: float = 0.0,
        samples: int = 0,
        batch_size: int = 0,
        protocol: str = "http",
        trace: Trace | None = None,
        of: Traced | None = None,
    ) -> None:
        tracer = self.tracer
        if tracer is not None and tracer.active and model != UNKNOWN_MODEL:
            times = Times(duration_s, input_s, queue_s, compute_s, output_s)
            tracer.ended(model, version, outcome, times, protocol=protocol, parent=trace, of=of)
        tally = self._found.get((model, version)) or self.of(model, version)
        ended = (protocol, outcome)
        tally.requests[ended] = tally.requests.get(ended, 0) + 1
        tally.changed = True
        if outcome != "success":
            tally.failed_s += duration_s
            return
        tally.last_at = time.time()
        tally.duration.observe(duration_s)
        tally.queue_s += queue_s
        tally.input_s += input_s
        tally.compute_s += compute_s
        if not compute_s:
            tally.idle += 1
            tally.idle_input_s += input_s
            tally.idle_output_s += output_s
        tally.output_s += output_s
        if trace is not None:
            tally.duration.remember(Exemplar(trace.label, trace.value, duration_s, tally.last_at))
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
        tally.changed = True
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

    def answered(
        self, model: str, version: int, index: int, *, good: bool, empty: bool, took_s: float
    ) -> None:
        answers = self.of(model, version).answers
        found = answers.setdefault(min(index, MOST_ANSWERS), Answers())
        found.took_s += took_s
        if not good:
            found.fail += 1
        elif empty:
            found.empty += 1
        else:
            found.success += 1

    def find(self, model: str, version: int) -> Tally | None:
        """What was counted of it so far, to be read."""
        return self._found.get((model, version))

    def ran(
        self,
        model: str,
        version: int,
        executions: int,
        samples: int,
        batches: Mapping[int, Sequence[float]] = NO_BATCHES,
        lookups: Lookups | None = None,
    ) -> None:
        """A generation has ended that had counted these."""
        tally = self.of(model, version)
        tally.changed = True
        tally.executions += executions
        tally.samples += samples
        for rows, (count, seconds) in batches.items():
            mine = tally.batches.setdefault(rows, [0, 0.0])
            mine[0] += count
            mine[1] += seconds
        if lookups is not None:
            tally.lookups = tally.lookups or Lookups()
            tally.lookups.add(lookups)

    def forget(self, model: str) -> None:
        self._frozen.pop(model, None)
        for key in [k for k in self._found if k[0] == model]:
            del self._found[key]

    def copied(self, exists: Callable[[str, int], bool]) -> dict[str, Frozen]:
        """All of them by model, frozen; what has not changed since is the very same mapping. Those of
        versions that do not exist any more are dropped for good: a model that is deployed daily must
        not gather series."""
        frozen = self._frozen
        gone: list[tuple[str, int]] = []
        for key, tally in self._found.items():
            model, version = key
            if model != UNKNOWN_MODEL and not exists(model, version):
                gone.append(key)
            elif tally.changed:
                tally.changed = False
                frozen[model] = {**frozen.get(model, {}), version: tally.copy()}
        for model, version in gone:
            del self._found[model, version]
            left = {v: tally for v, tally in frozen.pop(model, {}).items() if v != version}
            if left:
                frozen[model] = left
        return frozen.copy()
