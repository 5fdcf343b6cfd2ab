"""`pb_utils.MetricFamily`: a model's own counters, gauges and histograms.

They count in the worker, where the model reads them back; a thread tells the server what has changed,
once a second at most. What the model drops is shown no more, and with the model all of it is gone.
"""

from __future__ import annotations

import contextlib
import enum
import math
import queue
import threading
import time
import weakref
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar

from repository import figures
from repository.backends.triton.errors import TritonModelException
from repository.errors import RepositoryError
from repository.figures import Figures, Labels, Series

EVERY_S = 1.0  # between two times that something is told
T = TypeVar("T")
_Metric: TypeAlias = "Metric"  # MetricFamily has a method of that name
Tell: TypeAlias = Callable[[Sequence[Figures]], None]
WORDS: tuple[Literal["counter", "gauge", "histogram"], ...] = ("counter", "gauge", "histogram")


class MetricKind(enum.IntEnum):
    COUNTER = 0
    GAUGE = 1
    HISTOGRAM = 2

    @property
    def word(self) -> Literal["counter", "gauge", "histogram"]:
        return WORDS[self]


class Book:
    """All that one model counts. `tell`: hears of it, on a thread that begins with the first family;
    None: nobody does."""

    def __init__(self, tell: Tell | None = None) -> None:
        self.lock = threading.Lock()
        self._tell = tell
        self._families: weakref.WeakValueDictionary[str, _Family] = weakref.WeakValueDictionary()
        self._changed = False
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()  # its put may interrupt itself
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def family(self, name: str, help_: str, kind: MetricKind) -> _Family:
        """The one of this name. Raises TritonModelException."""
        if wrong := figures.wrong_family(name, help_):
            raise TritonModelException(wrong)
        with self.lock:
            found = self._families.get(name)
            if found is None:
                if len(self._families) >= figures.MOST_FAMILIES:
                    raise TritonModelException(
                        f"a model has at most {figures.MOST_FAMILIES} metric families"
                    )
                found = self._families[name] = _Family(name, help_, kind)
            elif found.kind is not kind:
                raise TritonModelException(
                    f"the model has a metric family '{name}' already, which is a {found.kind.word}"
                )
        self._begin()
        return found

    def count(self) -> int:
        """Series that there are."""
        return sum([len(family.metrics) for family in _living(self._families)])

    def stir(self) -> None:
        """Something has changed. May be called in the middle of anything."""
        if not self._changed:
            self._changed = True
            self._wake.put(None)

    def close(self) -> None:
        self._closed.set()
        self._wake.put(None)
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()

    def figures(self) -> list[Figures]:
        """As it is now."""
        return [
            Figures(
                family.name,
                family.kind.word,
                family.help,
                tuple([metric.series() for metric in _living(family.metrics)]),
            )
            for family in _living(self._families)
        ]

    def _begin(self) -> None:
        if self._tell is not None and self._thread is None:
            self._thread = threading.Thread(
                target=self._run, args=(self._tell,), name="triton metrics", daemon=True
            )
            self._thread.start()

    def _run(self, tell: Tell) -> None:
        while True:
            self._wake.get()
            if self._closed.is_set():
                return
            self._changed = False  # before it is read: what changes from here on wakes us again
            with contextlib.suppress(OSError, RepositoryError):  # nobody is there any more
                tell(self.figures())
            self._closed.wait(EVERY_S)


class _Family:
    """What the families of one name in a model share. It lives as long as one of them, or a metric."""

    __slots__ = ("__weakref__", "help", "kind", "metrics", "name")

    def __init__(self, name: str, help_: str, kind: MetricKind) -> None:
        self.name, self.help, self.kind = name, help_, kind
        self.metrics: weakref.WeakValueDictionary[Labels, Metric] = weakref.WeakValueDictionary()


class Metric:
    """From `MetricFamily.Metric`; any thread may use it. Every method raises TritonModelException where
    its kind of metric does not have it."""

    def __init__(
        self, book: Book, family: _Family, labels: Labels, bounds: Sequence[float]
    ) -> None:
        self.bounds = tuple(bounds)
        self._book, self._family, self._labels = book, family, labels
        self._lock = threading.Lock()
        self._value = self._changed_at = 0.0
        self._counts = [0] * (len(bounds) + 1)
        book.stir()

    def increment(self, value: float) -> None:
        self._allow("increment", MetricKind.COUNTER, MetricKind.GAUGE)
        if self._family.kind is MetricKind.COUNTER and not 0 <= value < math.inf:
            raise TritonModelException(f"a counter only grows; increment({value}) is no such step")
        with self._lock:
            self._value += value
            self._changed_at = time.monotonic()
        self._book.stir()

    def set(self, value: float) -> None:
        self._allow("set", MetricKind.GAUGE)
        with self._lock:
            self._value = float(value)
            self._changed_at = time.monotonic()
        self._book.stir()

    def observe(self, value: float) -> None:
        self._allow("observe", MetricKind.HISTOGRAM)
        with self._lock:
            self._value += value
            self._counts[bisect_left(self.bounds, value)] += 1
        self._book.stir()

    def value(self) -> float:
        self._allow("value", MetricKind.COUNTER, MetricKind.GAUGE)
        return self._value

    def series(self) -> Series:
        with self._lock:
            counts = tuple(self._counts) if self.bounds else ()
            return Series(self._labels, float(self._value), self._changed_at, self.bounds, counts)

    def _allow(self, what: str, *kinds: MetricKind) -> None:
        if self._family.kind not in kinds:
            raise TritonModelException(f"a {self._family.kind.word} has no {what}()")

    def __del__(self) -> None:
        book = getattr(self, "_book", None)
        if book is not None:
            book.stir()


class MetricFamily:
    """Metrics of one name, told apart by their labels."""

    COUNTER: ClassVar = MetricKind.COUNTER
    GAUGE: ClassVar = MetricKind.GAUGE
    HISTOGRAM: ClassVar = MetricKind.HISTOGRAM
    book: ClassVar[Book] = Book()  # the module that a model imports has a class of its own

    def __init__(self, name: str, description: str, kind: MetricKind) -> None:
        try:
            self.kind = MetricKind(kind)
        except ValueError as error:
            raise TritonModelException("kind is COUNTER, GAUGE or HISTOGRAM") from error
        self.name, self.description = name, description
        self._family = self.book.family(str(name), str(description), self.kind)

    def Metric(  # noqa: N802 - its name is public
        self, labels: Mapping[str, str] | None = None, buckets: Sequence[float] | None = None
    ) -> Metric:
        """The one with these labels: the same for every call, as long as somebody has it. `buckets`:
        upper bounds, ascending; a histogram needs them, nothing else has them."""
        bounds = [float(bound) for bound in buckets or ()]
        if (self.kind is MetricKind.HISTOGRAM) != bool(bounds):
            raise TritonModelException(
                "a histogram needs buckets" if not bounds else "only a histogram has buckets"
            )
        key = tuple(sorted((str(k), str(v)) for k, v in (labels or {}).items()))
        wrong = figures.wrong_bounds(bounds) or figures.wrong_labels(self.kind.word, key)
        if wrong:
            raise TritonModelException(f"metric '{self.name}': {wrong}")
        with self.book.lock:
            return self._made(key, bounds)

    def _made(self, key: Labels, bounds: list[float]) -> _Metric:
        found = self._family.metrics.get(key)
        if found is None:
            if self.book.count() >= figures.MOST_SERIES:
                raise TritonModelException(f"a model has at most {figures.MOST_SERIES} metrics")
            found = self._family.metrics[key] = Metric(self.book, self._family, key, bounds)
        elif found.bounds != tuple(bounds):
            raise TritonModelException(
                f"metric '{self.name}' has these labels already, with other buckets"
            )
        return found


def _living(of: weakref.WeakValueDictionary[Any, T]) -> list[T]:
    """Those that nobody has dropped. Others may come and go meanwhile."""
    return [found for ref in of.valuerefs() if (found := ref()) is not None]
