"""`pb_utils.MetricFamily`: a model's own counters, gauges and histograms, kept in its worker.

They count, and the model reads them back; the server's own metrics page does not show them.
"""

from __future__ import annotations

import enum
import threading
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import ClassVar

from repository.backends.triton.errors import TritonModelException


class MetricKind(enum.IntEnum):
    COUNTER = 0
    GAUGE = 1
    HISTOGRAM = 2


class Metric:
    """From `MetricFamily.Metric`; any thread may use it. Every method raises TritonModelException where
    its kind of metric does not have it."""

    def __init__(self, kind: MetricKind, buckets: Sequence[float] = ()) -> None:
        self._kind = kind
        self._lock = threading.Lock()
        self._value = 0.0
        self._bounds = list(buckets)
        self._counts = [0] * (len(buckets) + 1)

    def increment(self, value: float) -> None:
        self._allow("increment", MetricKind.COUNTER, MetricKind.GAUGE)
        if self._kind is MetricKind.COUNTER and value < 0:
            raise TritonModelException(f"a counter only grows; increment({value}) would shrink it")
        with self._lock:
            self._value += value

    def set(self, value: float) -> None:
        self._allow("set", MetricKind.GAUGE)
        with self._lock:
            self._value = float(value)

    def observe(self, value: float) -> None:
        self._allow("observe", MetricKind.HISTOGRAM)
        with self._lock:
            self._value += value
            self._counts[bisect_left(self._bounds, value)] += 1

    def value(self) -> float:
        self._allow("value", MetricKind.COUNTER, MetricKind.GAUGE)
        return self._value

    def _allow(self, what: str, *kinds: MetricKind) -> None:
        if self._kind not in kinds:
            raise TritonModelException(f"a {self._kind.name.lower()} has no {what}()")


class MetricFamily:
    """Metrics of one name, told apart by their labels."""

    COUNTER: ClassVar = MetricKind.COUNTER
    GAUGE: ClassVar = MetricKind.GAUGE
    HISTOGRAM: ClassVar = MetricKind.HISTOGRAM

    def __init__(self, name: str, description: str, kind: MetricKind) -> None:
        if not name:
            raise TritonModelException("a metric family needs a name")
        self.name, self.description, self.kind = name, description, MetricKind(kind)
        self._metrics: dict[tuple[tuple[str, str], ...], Metric] = {}

    def Metric(  # noqa: N802 - its name is public
        self, labels: Mapping[str, str] | None = None, buckets: Sequence[float] | None = None
    ) -> Metric:
        """The one with these labels: the same for every call. `buckets`: upper bounds, ascending; a
        histogram needs them, nothing else has them."""
        bounds = list(buckets or ())
        if (self.kind is MetricKind.HISTOGRAM) != bool(bounds):
            raise TritonModelException(
                "a histogram needs buckets" if not bounds else "only a histogram has buckets"
            )
        if bounds != sorted(set(bounds)):
            raise TritonModelException(f"buckets must ascend; they are {bounds}")
        key = tuple(sorted((str(k), str(v)) for k, v in (labels or {}).items()))
        return self._metrics.setdefault(key, Metric(self.kind, bounds))
