"""Plain numbers by series, for what does not happen a thousand times a second.

`Counts` has the series of one model, which go with it; `ServerCounts` those of no model in particular.
All calls come from the event loop's thread; what is frozen a scrape may take to another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from server.metrics.buckets import Buckets
from server.metrics.names import Family

Labels: TypeAlias = tuple[str, ...]
Values: TypeAlias = Mapping[Family, Mapping[Labels, float]]


class Counts:
    """Counters and gauges. `labels` are all of a series, the model included."""

    def __init__(self) -> None:
        self._values: dict[Family, dict[Labels, float]] = {}
        self._frozen: Values | None = None

    def count(self, family: Family, *labels: str, by: float = 1) -> None:
        found = self._values.setdefault(family, {})
        found[labels] = found.get(labels, 0) + by
        self._frozen = None

    def set(self, family: Family, value: float, *labels: str) -> None:
        self._values.setdefault(family, {})[labels] = value
        self._frozen = None

    def frozen(self) -> Values:
        """As long as nothing changes, the very same."""
        if self._frozen is None:
            self._frozen = {family: dict(found) for family, found in self._values.items()}
        return self._frozen


class ServerCounts(Counts):
    """Beside them, histograms."""

    def __init__(self) -> None:
        super().__init__()
        self._buckets: dict[Family, dict[Labels, Buckets]] = {}

    def observe(self, family: Family, value: float, *labels: str) -> None:
        self.buckets(family, *labels).observe(value)

    def buckets(self, family: Family, *labels: str) -> Buckets:
        """Also those that have counted nothing yet."""
        found = self._buckets.setdefault(family, {})
        if labels not in found:
            found[labels] = Buckets.of(family)
        return found[labels]

    def frozen_buckets(self) -> Mapping[Family, Mapping[Labels, Buckets]]:
        return {
            family: {labels: buckets.copy() for labels, buckets in found.items()}
            for family, found in self._buckets.items()
        }
