"""A histogram that is counted on the loop, and what its buckets remember of single requests."""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

from server.metrics.names import Family


class Exemplar(NamedTuple):
    """One request that a bucket counted. `label`, `value`: how to find it elsewhere; both are of us, or
    checked (`traces`). `at`: seconds since 1970."""

    label: str
    value: str
    amount: float
    at: float

    @property
    def text(self) -> str:
        """As OpenMetrics has it behind a bucket's line."""
        return f' # {{{self.label}="{self.value}"}} {self.amount!r} {self.at:.3f}'


class Buckets:
    """`counts` is per bucket, not cumulative; the last is what exceeds them all. `exemplars`: the last
    of each bucket, None until there is one."""

    __slots__ = ("bounds", "counts", "exemplars", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0
        self.exemplars: dict[int, Exemplar] | None = None

    @classmethod
    def of(cls, family: Family) -> Buckets:
        return cls(family.buckets)

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def remember(self, exemplar: Exemplar) -> None:
        if self.exemplars is None:
            self.exemplars = {}
        self.exemplars[bisect_left(self.bounds, exemplar.amount)] = exemplar

    def copy(self) -> Buckets:
        twin = Buckets(self.bounds)
        twin.counts, twin.total = self.counts.copy(), self.total
        twin.exemplars = dict(self.exemplars) if self.exemplars else None
        return twin

    def plus(self, other: Buckets) -> Buckets:
        both = Buckets(self.bounds)
        both.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        both.total = self.total + other.total
        both.exemplars = {**(self.exemplars or {}), **(other.exemplars or {})} or None
        return both
