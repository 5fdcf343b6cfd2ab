"""Numbers as people read them, by Grafana's names of units; and round marks for an axis."""

from __future__ import annotations

import math

SIZES = ("B", "KiB", "MiB", "GiB", "TiB")
TIMES = ((1e-6, "µs"), (1e-3, "ms"), (1.0, "s"), (60.0, "min"), (3600.0, "h"))
AFTER = {"reqps": "/s", "ops": "/s", "watt": " W"}


def said(value: float, unit: str) -> str:
    """In three digits or so."""
    if value != value:
        return "-"
    if unit == "percentunit":
        return f"{short(value * 100)} %"
    if unit == "bytes":
        power = min(len(SIZES) - 1, int(math.log(abs(value), 1024)) if abs(value) >= 1 else 0)
        return f"{short(value / 1024**power)} {SIZES[power]}"
    if unit == "s":
        size, word = next((t for t in reversed(TIMES) if abs(value) >= t[0]), TIMES[0])
        return f"{short(value / size)} {word}" if value else "0"
    return short(value) + AFTER.get(unit, "")


def short(value: float) -> str:
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.2g}" if abs(value) < 10 else f"{value:.0f}"


def marks(most: float, unit: str, about: int = 4) -> list[float]:
    """From 0 on, round; the last is not below `most`."""
    base = 1024.0 ** int(math.log(most, 1024)) if unit == "bytes" and most >= 1 else 1.0
    raw = (most or 1.0) / base / about
    ten = 10.0 ** math.floor(math.log10(raw))
    step = next(s for s in (1, 2, 2.5, 5, 10) if s * ten >= raw * 0.999) * ten * base
    return [number * step for number in range(math.ceil(most / step - 1e-9) + 1)] or [0.0, step]
