"""What benchmarks do with their figures: quantiles, a table for people, JSON for tools."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Row:
    """`aim`: at most this much; None: only told. `at_least`: an aim from below."""

    what: str
    value: float
    unit: str
    aim: float | None = None
    at_least: float | None = None

    @property
    def reached(self) -> bool:
        within = self.aim is None or self.value <= self.aim
        return within and (self.at_least is None or self.value >= self.at_least)

    @property
    def wish(self) -> str:
        if self.aim is not None:
            return f"<= {self.aim:g} {self.unit}"
        return "" if self.at_least is None else f">= {self.at_least:g} {self.unit}"


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(share * len(ranked)) - 1)]


def table(title: str, rows: Sequence[Row]) -> str:
    wide = max(len(row.what) for row in rows)
    lines = [title, f"{'':<{wide}}  {'measured':>12}  {'aim':>12}"]
    for row in rows:
        mark = "" if row.reached else "  MISSED"
        value = f"{row.value:.4g} {row.unit}"
        lines.append(f"{row.what:<{wide}}  {value:>12}  {row.wish:>12}{mark}")
    return "\n".join(lines)


def write(path: Path, title: str, rows: Sequence[Row], **more: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {
        "title": title,
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "rows": [asdict(row) | {"reached": row.reached} for row in rows],
        **more,
    }
    path.write_text(json.dumps(found, indent=2) + "\n")
