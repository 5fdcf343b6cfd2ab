"""The few shapes of which all expressions of the boards are made.

`$instance`, `$model` and `$gpu` are the boards' variables; "all" is the pattern `.*`.
"""

from __future__ import annotations

WINDOW = "$__rate_interval"  # at least four scrapes: a rate never comes of one sample
STEP = "$__interval"  # the distance of two points: events are counted once
RANGE = "$__range"  # all that the board shows
GAP = "5m"  # scrapes may be missing for so long


def server(name: str, *more: str, **equal: str) -> str:
    return _series(name, 'instance=~"$instance"', *more, **equal)


def model(name: str, *more: str, **equal: str) -> str:
    return _series(name, 'instance=~"$instance"', 'model=~"$model"', *more, **equal)


def gpu(name: str, *more: str, **equal: str) -> str:
    return _series(name, 'instance=~"$instance"', 'gpu=~"$gpu"', *more, **equal)


def _series(name: str, *matchers: str, **equal: str) -> str:
    labels = [*matchers, *(f'{label}="{value}"' for label, value in equal.items())]
    return f"modeldepot_{name}{{{','.join(labels)}}}"


def total(by: str, vector: str) -> str:
    return f"sum by ({by}) ({vector})" if by else f"sum({vector})"


def rate(counter: str, by: str = "") -> str:
    return total(by, f"rate({counter}[{WINDOW}])")


def grown(counter: str, by: str = "", over: str = STEP) -> str:
    """By how much, as a whole number. `increase` would miss the first event of all, with which a
    series begins, and make 1.25 of one: here a series that was not there before counts from zero,
    as does one that a restart has set back."""
    before = f"last_over_time({counter}[{GAP}] offset {over})"
    return total(by, f"({counter} - {before} >= 0) or {counter}")


def quantile(q: float, histogram: str, by: str = "") -> str:
    """`histogram` with its labels; the answer is NaN where nothing was counted, and not shown."""
    name, _, labels = histogram.partition("{")
    buckets = rate(f"{name}_bucket{{{labels}", f"le, {by}" if by else "le")
    return f"histogram_quantile({q}, {buckets}) >= 0"


def mean(histogram: str, by: str = "", over: str = "") -> str:
    """`over`: of events that are rare, by what came in that time."""
    name, _, labels = histogram.partition("{")
    parts = (f"{name}_{part}{{{labels}" for part in ("sum", "count"))
    above, below = (grown(p, by, over) if over else rate(p, by) for p in parts)
    return f"{above} / ({below} > 0)"
