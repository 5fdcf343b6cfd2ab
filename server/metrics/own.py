"""What models count themselves, as lines of the page: Triton's custom metrics, exactly with their own
names and labels.

What several instances or models count under one name and the same labels is one series: counters and
histograms are summed, of a gauge the value that was set last is shown. Who comes with a name that is a
family of another kind already, or a part of one, is left out, and the log says so once.

A counter whose name does not end in `_total` is of the type unknown in OpenMetrics, which would not have
it. It works beside the event loop, and only where something has changed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

from repository import figures
from repository.figures import Figures, Labels, Series
from server.metrics.lines import escaped, number

log = logging.getLogger("modeldepot.metrics")
MOST_SERIES = 20_000  # of all models together
MOST_TOLD = 200  # complaints that are remembered
TOTAL = "_total"


class Told(NamedTuple):
    """`figures`: as an instance of the model told them."""

    model: str
    figures: bytes


class _Family:
    def __init__(self, first: Figures) -> None:
        self.name, self.kind, self.help = first.name, first.kind, first.help
        self.series: dict[Labels, Series] = {}

    @property
    def is_total(self) -> bool:
        return self.kind == "counter" and len(self.name) > len(TOTAL) and self.name.endswith(TOTAL)

    def names(self) -> set[str]:
        """All that a page would say of it."""
        if self.kind == "histogram":
            return {self.name, *(f"{self.name}_{s}" for s in ("bucket", "count", "sum", "created"))}
        if self.is_total:
            base = self.name.removesuffix(TOTAL)
            return {self.name, base, f"{base}_created"}
        return {self.name}

    def take(self, new: Series) -> bool:
        """False: it does not go together with what is there."""
        old = self.series.get(new.labels)
        if old is None:
            self.series[new.labels] = new
        elif old.bounds != new.bounds:
            return False
        elif self.kind == "gauge":
            self.series[new.labels] = max(old, new, key=lambda each: each.changed)
        else:
            counts = tuple([a + b for a, b in zip(old.counts, new.counts, strict=True)])
            value = old.value + new.value
            self.series[new.labels] = Series(new.labels, value, new.changed, new.bounds, counts)
        return True


class Own:
    """Its part of the page, kept as long as it is true."""

    def __init__(self) -> None:
        self._of: tuple[Told, ...] = ()
        self._families: list[_Family] = []
        self._pages: dict[bool, bytes] = {}
        self._said: set[str] = set()

    def write(
        self, told: Sequence[Told], *, openmetrics: bool, rest: Callable[[], None] = lambda: None
    ) -> bytes:
        """`rest` is called now and then: others want the interpreter too."""
        if tuple(told) != self._of:
            self._of = tuple(told)
            self._families = self._merged(rest)
            self._pages.clear()
        if openmetrics not in self._pages:
            texts = []
            for family in self._families:
                texts.append(text(family, openmetrics=openmetrics))
                rest()
            self._pages[openmetrics] = "".join(texts).encode()
        return self._pages[openmetrics]

    def _merged(self, rest: Callable[[], None]) -> list[_Family]:
        found: dict[str, _Family] = {}
        taken: set[str] = set()
        left = MOST_SERIES
        for model, told in self._of:
            for given in figures.read(told):
                rest()
                family = found.get(given.name)
                if family is None:
                    family = _Family(given)
                    if taken & family.names():
                        self._say(model, given, "a metric of that name is there already")
                        continue
                    found[given.name] = family
                    taken |= family.names()
                if family.kind != given.kind:
                    self._say(model, given, f"it is there already as a {family.kind}")
                    continue
                before = len(family.series)
                self._put(family, given.series[:left], model, given)
                left -= len(family.series) - before
        return [family for family in found.values() if family.series]

    def _put(self, family: _Family, series: Iterable[Series], model: str, given: Figures) -> None:
        for one in series:
            if not family.take(one):
                self._say(model, given, "it is there already with other buckets")

    def _say(self, model: str, given: Figures, why: str) -> None:
        said = f"the metric '{given.name}' of model '{model}' is not shown: {why}"
        if said not in self._said and len(self._said) < MOST_TOLD:
            self._said.add(said)
            log.warning("%s", said)


def text(family: _Family, *, openmetrics: bool) -> str:
    """With its header, in one of Prometheus' two formats."""
    name, kind = family.name, family.kind
    help_ = family.help.replace("\\", r"\\").replace("\n", r"\n")
    if openmetrics:
        help_ = help_.replace('"', r"\"")
        if family.is_total:
            name = name.removesuffix(TOTAL)
        elif kind == "counter":
            kind = "unknown"  # type: ignore[assignment]
    lines = [f"# HELP {name} {help_}\n# TYPE {name} {kind}\n"]
    for series in family.series.values():
        if family.kind == "histogram":
            lines += _buckets(family.name, series)
        else:
            lines.append(f"{family.name}{_inside(series.labels)} {number(series.value)}\n")
    return "".join(lines)


def _buckets(name: str, series: Series) -> Iterable[str]:
    edges = [*map(number, series.bounds), "+Inf"]
    counts = list(accumulate(series.counts))
    for edge, count in zip(edges, counts, strict=True):
        labels = tuple(sorted((*series.labels, ("le", edge))))
        yield f"{name}_bucket{_inside(labels)} {number(count)}\n"
    inside = _inside(series.labels)
    yield f"{name}_count{inside} {number(counts[-1])}\n"
    yield f"{name}_sum{inside} {number(series.value)}\n"


def _inside(labels: Labels) -> str:
    pairs = ",".join([f'{name}="{escaped(value)}"' for name, value in labels])
    return f"{{{pairs}}}" if pairs else ""
