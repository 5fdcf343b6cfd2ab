"""What a comparison found: from samples to ratios, aims and regressions. Pure; knows no process.

Absolute figures depend on the machine and the hour. A ratio divides two contenders of the same
round, seconds apart; its spread is that of the rounds. Only ratios are judged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from bench.contenders import ASGI, BARE, BATCHES, ECHO, LITSERVE, MLSERVER, OURS, TRITON, limit
from bench.figures import Row

FALL = 0.9  # of the ratio before: below this, and beyond the spread, it is a regression

Key = tuple[str, str, int]  # subject, contender, connections


@dataclass(frozen=True, slots=True)
class Sample:
    """One contender in one round. CPU in microseconds a request."""

    rate: float
    p50_ms: float
    p99_ms: float
    cpu_us: float
    client_us: float = 0.0
    wrong: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Spread:
    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        ranked = sorted(values)
        return cls(median(ranked), ranked[0], ranked[-1])


@dataclass(frozen=True, slots=True)
class Cell:
    """A line of a table. `wrong`: of how many rounds answers were missing or not 200."""

    subject: str
    contender: str
    connections: int
    rate: Spread
    p50_ms: Spread
    p99_ms: Spread
    cpu_us: Spread
    client_us: Spread
    ratio: Spread | None
    wrong: int


Rounds = Sequence[Mapping[Key, Sample]]


def quotient(rounds: Rounds, above: Key, below: Key, what: str = "rate") -> Spread | None:
    """Of two contenders, round by round. None: there is no round in which both went well."""
    pairs = [
        (getattr(found[above], what), getattr(found[below], what))
        for found in rounds
        if above in found and below in found and not found[above].wrong and not found[below].wrong
    ]
    values = [a / b for a, b in pairs if b]
    return Spread.of(values) if values else None


def limit_of(key: Key) -> Key:
    subject, _, connections = key
    return subject, limit(subject, connections), connections


def cells_of(rounds: Rounds) -> list[Cell]:
    """In the order in which they were first seen."""
    keys = list(dict.fromkeys(key for found in rounds for key in found))
    return [_cell(rounds, key) for key in keys]


def _cell(rounds: Rounds, key: Key) -> Cell:
    all_of_it = [found[key] for found in rounds if key in found]
    samples = [sample for sample in all_of_it if not sample.wrong] or all_of_it
    return Cell(
        *key,
        rate=Spread.of(sample.rate for sample in samples),
        p50_ms=Spread.of(sample.p50_ms for sample in samples),
        p99_ms=Spread.of(sample.p99_ms for sample in samples),
        cpu_us=Spread.of(sample.cpu_us for sample in samples),
        client_us=Spread.of(sample.client_us for sample in samples),
        ratio=quotient(rounds, key, limit_of(key)),
        wrong=sum(bool(sample.wrong) for sample in all_of_it),
    )


def aims(rounds: Rounds) -> list[Row]:
    """Those that can be judged with what took part."""
    wished = [
        ("tiny", 16, "rate", ASGI, ECHO, 0.6, None),
        ("tiny", 16, "rate", OURS, ECHO, 1.2, None),
        ("tiny", 16, "rate", OURS, TRITON, 2, None),
        ("tiny", 16, "rate", OURS, MLSERVER, 10, None),
        ("tiny", 16, "rate", OURS, LITSERVE, 10, None),
        ("large", 16, "rate", OURS, BARE, 1.2, None),
        ("large", 16, "rate", OURS, TRITON, 1, None),
        ("slow", 16, "rate", OURS, BATCHES, 0.8, None),
        ("slow", 16, "rate", OURS, TRITON, 1, None),
        ("tiny", 1, "p50_ms", ASGI, ECHO, None, 2),
        ("tiny", 1, "p50_ms", OURS, ECHO, None, 1.4),
    ]
    rows = []
    for subject, connections, what, ours, other, least, most in wished:
        above, below = (subject, ours, connections), (subject, other, connections)
        found = quotient(rounds, above, below, what)
        if found is None:
            continue
        said = "p50" if what == "p50_ms" else "req/s"
        text = f"{subject}, c={connections}: {said}, {ours} / {other}"
        rows.append(Row(text, found.median, "x", most, least))
    return rows


def as_json(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    return [asdict(cell) for cell in cells]


def regressions(
    old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]
) -> list[tuple[str, float, float]]:
    """Cells of ours whose ratio to the limit has fallen by more than a tenth, and whose best round
    is below the worst of before: (which, before, now). From `as_json`."""
    before = {_which(cell): cell["ratio"] for cell in old}
    found = []
    for cell in new:
        was, now = before.get(_which(cell)), cell["ratio"]
        if was is None or now is None or not cell["contender"].startswith(OURS):
            continue
        if now["median"] < FALL * was["median"] and now["high"] < was["low"]:
            found.append((_which(cell), was["median"], now["median"]))
    return found


def _which(cell: Mapping[str, Any]) -> str:
    return f"{cell['subject']}, c={cell['connections']}: {cell['contender']}"
