"""Samples and their text, in the two formats of Prometheus.

What is written is byte for byte what prometheus_client's encoders write of the same samples; it is
written here because they take 6 µs a line, and a thousand models have fifty thousand lines. A sheet
knows its lines but for the numbers, so that writing it again is little more than these.

It must not know what a series means.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple, TypeAlias

from prometheus_client.utils import floatToGoString

from server.metrics.buckets import Buckets
from server.metrics.names import Family

_HEAD = re.compile(rb"(?m)^([a-z_]+)\{")  # of a line: what is named
Labels: TypeAlias = tuple[str, ...]
Series: TypeAlias = tuple[Family, Labels]


class Text(NamedTuple):
    """Lines by family. `rich`: those that are others in OpenMetrics, because of exemplars."""

    plain: Mapping[Family, bytes]
    rich: Mapping[Family, bytes]


@lru_cache(8192)
def number(value: float) -> str:
    """As Go writes it. (1, 1.0 and True are one key, and are written alike.)"""
    return str(floatToGoString(value))  # type: ignore[no-untyped-call]


@lru_cache(8192)
def escaped(value: str) -> str:
    """What is no Unicode (a folder may be called so) is told with question marks."""
    value = value.encode(errors="replace").decode()
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def pattern(family: Family, labels: Labels) -> str:
    """The lines of one series, fit for `%` with their numbers."""
    form, order = _form(family)
    values = [escaped(value).replace("%", "%%") for value in labels]
    return form % tuple([values[at] for at in order])


@lru_cache(1024)
def _form(family: Family) -> tuple[str, tuple[int, ...]]:
    """With a place for each label's value, and which label's that is."""
    if family.kind == "histogram":
        edges = [*map(number, family.buckets), "+Inf"]
        heads = [_head(family, "_bucket", edge) for edge in edges]
        heads += (_head(family, "_count"), _head(family, "_sum"))
    else:
        heads = [_head(family, "_total" if family.kind == "counter" else "")]
    lines = [f"{head} %%s\n" for head, _ in heads]
    return "".join(lines), tuple(at for _, order in heads for at in order)


def _head(family: Family, suffix: str, le: str = "") -> tuple[str, list[int]]:
    """What stands before the number, labels by name as prometheus_client sorts them."""
    pairs = [(name, "%s", at) for at, name in enumerate(family.labels)]
    if le:
        pairs.append(("le", le, -1))
    pairs.sort()
    inside = ",".join([f'{name}="{value}"' for name, value, _ in pairs])
    order = [at for *_, at in pairs if at >= 0]
    return f"{family.full}{suffix}{{{inside}}}" if inside else f"{family.full}{suffix}", order


def header(family: Family, *, openmetrics: bool) -> bytes:
    """HELP and TYPE. The older format says of a counter the name of its only series."""
    name, kind, help_ = family.full, family.kind, family.help.replace("\\", r"\\")
    if openmetrics:
        help_ = help_.replace('"', r"\"")
    elif kind == "counter":
        name += "_total"
    elif kind == "unknown":
        return f"# HELP {name} {help_}\n# TYPE {name} untyped\n".encode()
    return f"# HELP {name} {help_}\n# TYPE {name} {kind}\n".encode()


def tagged(text: Text, tags: Iterable[tuple[str, str]]) -> Text:
    """Every series with these labels too, each with a '_' before its name, as Triton has them. That
    sorts them before all others, so the lines stay as prometheus_client would write them."""
    inside = ",".join(f'_{name}="{escaped(value)}"' for name, value in sorted(tags))
    head = f"{{{inside},".encode()

    def with_tags(line: re.Match[bytes]) -> bytes:
        return line[1] + head

    return Text(*({f: _HEAD.sub(with_tags, lines) for f, lines in part.items()} for part in text))


class Sheet:
    """Samples by family. What has the same labels is summed: two generations of one version that run
    side by side during a reload are one series. `text` empties it for the next time; as long as the
    same series are put in the same order, only numbers are written then, and only those of families
    that have others."""

    def __init__(self) -> None:
        self._series: list[Series] = []
        self._values: list[Any] = []  # of the same: a number or, of a histogram, Buckets
        self._form = _Form([])

    def add(self, family: Family, value: float, *labels: str) -> None:
        self._series.append((family, labels))
        self._values.append(value)

    def put(self, family: Family, values: Mapping[Labels, float]) -> None:
        """As `add`, of many."""
        self._series += [(family, labels) for labels in values]
        self._values += values.values()

    def add_buckets(self, family: Family, buckets: Buckets, *labels: str) -> None:
        """They must not change any more."""
        self._series.append((family, labels))
        self._values.append(buckets)

    def text(self) -> Text:
        """What was added since the last time."""
        if self._series != self._form.series:
            self._form = _Form(self._series)
        found = self._form.fill(self._values)
        self._series, self._values = [], []
        return found


class _Form:
    """The text of these series, with the numbers left out."""

    def __init__(self, series: list[Series]) -> None:
        self.series = series
        first: dict[Series, int] = {}
        self._twins: list[tuple[int, int]] = []  # of one series: what is to be added to which
        for at, one in enumerate(series):
            if first.setdefault(one, at) != at:
                self._twins.append((first[one], at))
        places: dict[Family, list[int]] = {}
        for (family, _), at in first.items():
            places.setdefault(family, []).append(at)
        self._lines = [
            _Lines(family, [series[at][1] for at in found], tuple(found))
            for family, found in places.items()
        ]

    def fill(self, values: list[Any]) -> Text:
        """Changes `values`."""
        for at, twin in self._twins:
            one, other = values[at], values[twin]
            values[at] = one.plus(other) if isinstance(one, Buckets) else one + other
        plain: dict[Family, bytes] = {}
        rich: dict[Family, bytes] = {}
        for lines in self._lines:
            plain[lines.family] = lines.fill(tuple([values[at] for at in lines.places]))
            if lines.rich is not None:
                rich[lines.family] = lines.rich
        return Text(plain, rich)


class _Lines:
    """Those of one family, and their text as it was written last. `places`: where their values are
    among those of the form."""

    __slots__ = ("_pattern", "_text", "_values", "family", "places", "rich")

    def __init__(self, family: Family, labels: Iterable[Labels], places: tuple[int, ...]) -> None:
        self.family, self.places = family, places
        self.rich: bytes | None = None
        self._pattern = "".join([pattern(family, one) for one in labels])
        self._values: tuple[Any, ...] = ()
        self._text = b""

    def fill(self, values: tuple[Any, ...]) -> bytes:
        """As long as the values are the same, the very same."""
        if values != self._values:
            self._values = values
            if self.family.kind == "histogram":
                self._fill_histograms(values)
            else:
                self._text = (self._pattern % tuple(map(number, values))).encode()
        return self._text

    def _fill_histograms(self, histograms: Sequence[Buckets]) -> None:
        numbers: list[float] = []
        for buckets in histograms:
            numbers += accumulate(buckets.counts)
            numbers += (numbers[-1], buckets.total)
        text = self._pattern % tuple(map(number, numbers))
        self._text, self.rich = text.encode(), None
        if any(buckets.exemplars for buckets in histograms):
            lines, first = text.split("\n"), 0
            for buckets in histograms:
                for at, exemplar in (buckets.exemplars or {}).items():
                    lines[first + at] += exemplar.text
                first += len(buckets.counts) + 2
            self.rich = "\n".join(lines).encode()
