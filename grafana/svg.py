"""Panels as SVG, by plain string building: lines, areas, bars, states, numbers, tables.

It brings its own background and follows the reader's light or dark theme by a media query, so it is
readable on either. No font is loaded. Times are seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple
from xml.sax.saxutils import escape

from grafana.figures import marks, said

LIGHT = ("#0969da", "#bf5700", "#1a7f37", "#8250df", "#cf222e", "#0e8a8a", "#9a6700", "#bf3989")
DARK = ("#4493f8", "#f0883e", "#3fb950", "#ab7df8", "#f85149", "#39c5cf", "#d29922", "#db61a2")
NAMED = {
    "green": ("#2da44e", "#2ea043"), "red": ("#cf222e", "#f85149"), "gray": ("#afb8c1", "#484f58"),
    "yellow": ("#bf8700", "#d29922"), "orange": ("#e16f24", "#f0883e"), "blue": ("#0969da", "#4493f8"),
    "purple": ("#8250df", "#ab7df8"),
}  # fmt: skip


def _paint(sheet: int) -> str:
    """Plain rules, no variables: not everything that shows an SVG knows those."""
    colours = {f"c{number}": each for number, each in enumerate((LIGHT, DARK)[sheet])}
    colours |= {name: pair[sheet] for name, pair in NAMED.items()}
    return "\n  ".join(
        f".fill.{name}, .value.{name} {{ fill: {each}; }} "
        f".line.{name}, .limit.{name} {{ stroke: {each}; }} "
        f".area.{name} {{ fill: {each}; stroke: {each}; }} .mark.{name} {{ stroke: {each}; }}"
        for name, each in colours.items()
    )


STYLE = f"""
  .ground {{ fill: #f6f8fa; }} .card {{ fill: #ffffff; stroke: #d1d9e0; }}
  text {{ font: 12px -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328; }}
  .board {{ font-size: 18px; font-weight: 600; }} .title {{ font-weight: 600; }}
  .row {{ font-size: 13px; font-weight: 600; }} .faint {{ fill: #59636e; }} .small {{ font-size: 11px; }}
  .end {{ text-anchor: end; }} .middle {{ text-anchor: middle; }}
  .big {{ font-size: 26px; font-weight: 600; }}
  .grid {{ stroke: #d1d9e0; stroke-width: 0.6; }} .head {{ font-weight: 600; font-size: 11px; }}
  .line {{ fill: none; stroke-width: 1.6; stroke-linejoin: round; }}
  .limit {{ fill: none; stroke-width: 1.8; stroke-dasharray: 7 5; }}
  .area {{ fill-opacity: 0.45; stroke-width: 1; }}
  .inside {{ fill: #ffffff; font-size: 11px; }} .mark {{ stroke-dasharray: 2 3; stroke-opacity: 0.5; }}
  {_paint(0)}
  @media (prefers-color-scheme: dark) {{
    .ground {{ fill: #010409; }} .card {{ fill: #0d1117; stroke: #3d444d; }}
    text {{ fill: #f0f6fc; }} .faint {{ fill: #9198a1; }} .grid {{ stroke: #3d444d; }}
    .inside {{ fill: #ffffff; }}
    {_paint(1)}
  }}
"""


class Box(NamedTuple):
    x: float
    y: float
    w: float
    h: float

    def within(self, left: float, top: float, right: float, bottom: float) -> Box:
        return Box(self.x + left, self.y + top, self.w - left - right, self.h - top - bottom)


@dataclass(frozen=True)
class Series:
    """points  (time, value), in order; of one that is asked for now, one
    line    in a pile: a limit that is drawn over it
    labels  for tables
    """

    name: str
    points: Sequence[tuple[float, float]]
    line: bool = False
    labels: Mapping[str, str] | None = None

    @property
    def last(self) -> float:
        return self.points[-1][1]


class Scale(NamedTuple):
    """From times and values to places."""

    box: Box
    start: float
    end: float
    most: float

    def x(self, at: float) -> float:
        return self.box.x + (at - self.start) / (self.end - self.start) * self.box.w

    def y(self, value: float) -> float:
        return self.box.y + self.box.h * (1 - min(value, self.most * 1.02) / self.most)


def colour(name: str, names: Sequence[str]) -> str:
    """By its place among the names, so that neighbours differ."""
    return f"c{list(names).index(name) % len(LIGHT)}"


def text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(words)}</text>'


def rect(box: Box, kind: str, round_: float = 0, tip: str = "") -> str:
    inner = f"<title>{escape(tip)}</title>" if tip else ""
    return (
        f'<rect x="{box.x:.1f}" y="{box.y:.1f}" width="{max(0.5, box.w):.1f}" '
        f'height="{max(0.5, box.h):.1f}" rx="{round_}" class="{kind}">{inner}</rect>'
    )


def fitted(words: str, room: float, size: float = 6.4) -> str:
    """As much as there is room for; `size`: of a letter, in the mean."""
    most = max(1, int(room / size))
    return words if len(words) <= most else words[: most - 1] + "…"


def document(title: str, wide: float, high: float, parts: Sequence[str]) -> str:
    name = escape(title, {'"': "&quot;"})
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide:.0f} {high:.0f}" '
            f'width="{wide:.0f}" height="{high:.0f}" role="img" aria-label="{name}">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style>",
            rect(Box(0, 0, wide, high), "ground", 8),
            *parts,
            "</svg>\n",
        ]
    )


# over time ----------------------------------------------------------------------------------------


def axes(box: Box, start: float, end: float, most: float, unit: str) -> tuple[list[str], Scale]:
    """The grid with its words, and the scale of what is drawn into it."""
    at = marks(most, unit)
    scale = Scale(box, start, end, at[-1] or 1.0)
    parts = []
    for value in at:
        y = scale.y(value)
        parts.append(
            f'<line class="grid" x1="{box.x:.1f}" x2="{box.x + box.w:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(text(box.x - 6, y + 4, said(value, unit), "faint small end"))
    every = next(
        s for s in (10, 15, 30, 60, 120, 300, 600, 3600) if (end - start) / s <= box.w / 60
    )
    for number in range(int((end - start) // every) + 1):
        words = f"{number * every // 60}:{number * every % 60:02}"
        parts.append(
            text(scale.x(start + number * every), box.y + box.h + 15, words, "faint small middle")
        )
    return parts, scale


def lines(series: Sequence[Series], scale: Scale, names: Sequence[str]) -> list[str]:
    return [
        f'<path class="{"limit" if one.line else "line"} {colour(one.name, names)}" '
        f'd="{_path(one.points, scale)}"><title>{escape(one.name)}</title></path>'
        for one in series
    ]


def _path(points: Sequence[tuple[float, float]], scale: Scale) -> str:
    """A gap of more than a few steps interrupts the line."""
    gaps = [b[0] - a[0] for a, b in pairwise(points)]
    step = min(gaps, default=1.0)
    parts, before = [], float("-inf")
    for at, value in points:
        pen = "L" if at - before < 3.5 * step else "M"
        parts.append(f"{pen}{scale.x(at):.1f} {scale.y(value):.1f}")
        before = at
    if len(parts) == 1:
        parts.append("h2")
    return "".join(parts)


def piled(series: Sequence[Series]) -> list[tuple[Series, list[tuple[float, float, float]]]]:
    """Each with (time, from, to): it stands upon those before it, and is 0 where it is not."""
    ground = dict.fromkeys(sorted({at for one in series for at, _ in one.points}), 0.0)
    found = []
    for one in series:
        band, values = [], dict(one.points)
        for at, low in ground.items():
            value = values.get(at, 0.0)
            ground[at] = low + value
            band.append((at, low, low + value))
        found.append((one, band))
    return found


def areas(series: Sequence[Series], scale: Scale, names: Sequence[str]) -> list[str]:
    parts = []
    for one, band in piled(series):
        there = "L".join(f"{scale.x(at):.1f} {scale.y(top):.1f}" for at, _, top in band)
        back = "L".join(f"{scale.x(at):.1f} {scale.y(low):.1f}" for at, low, _ in reversed(band))
        parts.append(
            f'<path class="area {colour(one.name, names)}" d="M{there}L{back}Z">'
            f"<title>{escape(one.name)}</title></path>"
        )
    return parts


def bars(series: Sequence[Series], scale: Scale, names: Sequence[str], step: float) -> list[str]:
    """One a step, each upon those before it."""
    wide = max(2.0, (scale.x(scale.start + step) - scale.x(scale.start)) * 0.7)
    return [
        rect(
            Box(scale.x(at) - wide, scale.y(top), wide, scale.y(low) - scale.y(top)),
            f"fill {colour(one.name, names)}", 1, f"{one.name}: {top - low:g}",
        )
        for one, band in piled(series)
        for at, low, top in band
        if top > low and at > scale.start + step / 2  # what was before begins with its first
    ]  # fmt: skip


def mark(at: float, scale: Scale, kind: str, tip: str) -> str:
    """A moment, from the top to the bottom."""
    x, box = scale.x(at), scale.box
    return (
        f'<line class="mark {kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{box.y:.1f}" '
        f'y2="{box.y + box.h:.1f}"><title>{escape(tip)}</title></line>'
    )


def legend(box: Box, names: Sequence[str], order: Sequence[str]) -> list[str]:
    """In one line; what finds no room is counted."""
    parts, x = [], box.x
    for number, name in enumerate(names):
        words = fitted(name, 150)
        room = 26 + 6.3 * len(words)
        if x + room > box.x + box.w - 24 and number:
            parts.append(text(x, box.y + 9, f"+{len(names) - number}", "faint small"))
            break
        parts.append(rect(Box(x, box.y + 3, 10, 4), f"fill {colour(name, order)}", 1))
        parts.append(text(x + 14, box.y + 9, words, "faint small"))
        x += room
    return parts


def timeline(
    box: Box, series: Sequence[Series], words: Mapping[int, tuple[str, str]], scale: Scale
) -> list[str]:
    """A bar for each, of the colours of its states."""
    if not series:
        return []
    high = box.h / len(series)
    parts = []
    for number, one in enumerate(series):
        y = box.y + number * high
        parts.append(text(box.x - 8, y + high / 2 + 4, fitted(one.name, box.x - 20), "small end"))
        for start, end, value in runs(one.points):
            name, kind = words.get(int(value), (f"{value:g}", "gray"))
            bar = Box(scale.x(start), y + high * 0.12, scale.x(end) - scale.x(start), high * 0.76)
            parts.append(rect(bar, f"fill {kind}", 2, f"{one.name}: {name}"))
            if bar.w > 12 + 6.5 * len(name) and high > 14:
                parts.append(text(bar.x + 6, y + high / 2 + 4, name, "inside"))
    return parts


def runs(points: Sequence[tuple[float, float]]) -> list[tuple[float, float, float]]:
    """(from, to, value) of each stretch in which it stays the same."""
    found: list[tuple[float, float, float]] = []
    for at, value in points:
        if found and found[-1][2] == value:
            found[-1] = (found[-1][0], at, value)
        else:
            if found:
                found[-1] = (found[-1][0], at, found[-1][2])
            found.append((at, at, value))
    return found


# now ----------------------------------------------------------------------------------------------


def numbers(
    box: Box, series: Sequence[Series], write: Callable[[float], tuple[str, str]]
) -> list[str]:
    """`write`: a value as words and the class of its colour."""
    parts, wide = [], box.w / max(1, len(series))
    for number, one in enumerate(series):
        words, kind = write(one.last)
        middle = box.x + wide * (number + 0.5)
        parts.append(text(middle, box.y + box.h / 2 + 8, words, f"big middle {kind}".strip()))
        if len(series) > 1:
            parts.append(
                text(middle, box.y + box.h / 2 + 27, fitted(one.name, wide), "faint small middle")
            )
    return parts


def lying(
    box: Box, series: Sequence[Series], write: Callable[[float], tuple[str, str]], most: float
) -> list[str]:
    """Bars from left to right, the longest first."""
    shown = sorted(series, key=lambda s: -s.last)[: int(box.h // 20)]
    if not shown:
        return []
    left = min(150.0, 14 + 6.4 * max(len(s.name) for s in shown))
    high = min(28.0, box.h / len(shown))
    parts = []
    for number, one in enumerate(shown):
        y = box.y + number * high
        words, kind = write(one.last)
        room = box.w - left - 70
        long = room * min(1.0, one.last / most) if most else 0
        parts.append(
            text(box.x + left - 8, y + high / 2 + 4, fitted(one.name, left - 8), "small end")
        )
        parts.append(rect(Box(box.x + left, y + 4, long, high - 8), f"fill {kind or 'c0'}", 2))
        parts.append(text(box.x + left + long + 7, y + high / 2 + 4, words, "small"))
    return parts


def table(box: Box, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A column is as wide as its longest cell asks for, compared with the others."""
    long = [min(24, 2 + max(len(cells[n]) for cells in (heads, *rows))) for n in range(len(heads))]
    lefts = [box.x + box.w * sum(long[:n]) / sum(long) for n in range(len(heads))]
    wide = [box.w * one / sum(long) for one in long]
    parts = []
    for line, cells in enumerate([heads, *rows][: int(box.h // 18)]):
        y = box.y + 11 + 19 * line
        kind = "small" if line else "head faint"
        parts += [
            text(left, y, fitted(cell, room, 5.9), kind)
            for left, room, cell in zip(lefts, wide, cells, strict=True)
        ]
    return parts
