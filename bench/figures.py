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
    """`aim`: at most this much; None: only told."""

    what: str
    value: float
    unit: str
    aim: float | None = None

    @property
    def reached(self) -> bool:
        return self.aim is None or self.value <= self.aim


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(share * len(ranked)) - 1)]


def table(title: str, rows: Sequence[Row]) -> str:
    wide = max(len(row.what) for row in rows)
    lines = [title, f"{'':<{wide}}  {'measured':>12}  {'aim':>12}"]
    for row in rows:
        aim = "" if row.aim is None else f"<= {row.aim:g} {row.unit}"
        mark = "" if row.reached else "  MISSED"
        lines.append(f"{row.what:<{wide}}  {f'{row.value:.4g} {row.unit}':>12}  {aim:>12}{mark}")
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
