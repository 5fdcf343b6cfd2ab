"""What models count themselves, for the server's metrics page (Triton's custom metrics): how it travels,
and what of it may be shown.

A worker tells all of it whenever something has changed, once a second at most. Nobody is asked at a
scrape: what was told last is shown.

Rule: both ends hold it against the same words, for neither may believe the other: the worker so that the
model hears what is wrong where it says it, the server before anything reaches the page.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

MOST_FAMILIES, MOST_SERIES, MOST_LABELS, MOST_BUCKETS = 64, 1000, 10, 64  # of one instance
LONGEST_NAME, LONGEST_LABEL, LONGEST_VALUE, LONGEST_HELP = 200, 64, 256, 1000  # bytes
MOST_BYTES = 8 << 20  # of all that one instance tells; what the numbers above allow is less
TAKEN = ("modeldepot_", "nv_", "process_")  # how names of the server's own series begin
NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
LABEL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
Labels = tuple[tuple[str, str], ...]


class Series(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """`labels` by name. `value`: of a histogram the sum of what was observed, and `counts` how much of
    it lies below each of `bounds` and not below the one before; the last count is of what lies above
    all. `changed`: the machine's monotonic clock."""

    labels: Labels
    value: float
    changed: float = 0.0
    bounds: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()


class Figures(msgspec.Struct, array_like=True, frozen=True):
    """One family."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    series: tuple[Series, ...] = ()


encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[Figures]).decode


def read(told: bytes) -> list[Figures]:
    """What of it can be shown; nothing where it cannot be read at all."""
    try:
        families = _decode(told)
    except msgspec.MsgspecError:
        return []
    left, found = MOST_SERIES, []
    for family in families[:MOST_FAMILIES]:
        if wrong_family(family.name, family.help):
            continue
        series = tuple([s for s in family.series[:left] if not _wrong_series(family.kind, s)])
        left -= len(series)
        found.append(Figures(family.name, family.kind, family.help, series))
    return found


def wrong_family(name: str, help_: str) -> str:
    """Why there can be no family of this name; "" where there can."""
    if not NAME.fullmatch(name) or len(name) > LONGEST_NAME:
        return (
            f"'{name[:LONGEST_NAME]}' is no name for a metric: letters, digits, '_' and ':', no digit "
            f"first, at most {LONGEST_NAME} characters"
        )
    if name.startswith(TAKEN):
        return f"'{name}' begins as the server's own do ({', '.join(TAKEN)}); choose another name"
    if not _fits(help_, LONGEST_HELP):
        return f"the description of '{name}' is longer than {LONGEST_HELP} bytes, or no text"
    return ""


def wrong_labels(kind: str, labels: Mapping[str, str] | Labels) -> str:
    """The same of a series' labels."""
    pairs = list(labels.items() if isinstance(labels, Mapping) else labels)
    if len(pairs) > MOST_LABELS:
        return f"{len(pairs)} labels; at most {MOST_LABELS} are possible"
    for name, value in pairs:
        if not LABEL.fullmatch(name) or len(name) > LONGEST_LABEL or name.startswith("__"):
            return (
                f"'{name[:LONGEST_LABEL]}' is no name for a label: letters, digits and '_', no digit "
                f"and no '__' first, at most {LONGEST_LABEL} characters"
            )
        if name == "le" and kind == "histogram":
            return "the label 'le' of a histogram is its buckets' own"
        if not _fits(value, LONGEST_VALUE):
            return (
                f"the value of the label '{name}' is longer than {LONGEST_VALUE} bytes, or no text"
            )
    return ""


def wrong_bounds(bounds: Sequence[float]) -> str:
    if len(bounds) > MOST_BUCKETS:
        return f"{len(bounds)} buckets; at most {MOST_BUCKETS} are possible"
    if not all(map(math.isfinite, bounds)) or list(bounds) != sorted(set(bounds)):
        return f"buckets must be numbers that ascend; they are {list(bounds)}"
    return ""


def _fits(text: str, most: int) -> bool:
    try:
        return len(text.encode()) <= most
    except UnicodeEncodeError:
        return False


def _wrong_series(kind: str, series: Series) -> bool:
    if kind == "histogram" and (
        wrong_bounds(series.bounds)
        or len(series.counts) != len(series.bounds) + 1
        or min(series.counts) < 0
    ):
        return True
    names = [name for name, _ in series.labels]
    return names != sorted(set(names)) or bool(wrong_labels(kind, series.labels))
