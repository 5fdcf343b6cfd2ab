"""The comparison as a picture: horizontal bars, one panel a model, lengths in shares of its limit.

An SVG by plain string building. It brings its own background, and follows the reader's light or dark
theme by a media query, so it is readable on either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

WIDE = 860
LEFT = 250  # where bars begin
ROOM = 440  # the longest bar
BAR = 18
STEP = 27
HEAD = 94
PANEL_HEAD = 48
PANEL_FOOT = 18

STYLE = """
  .card { fill: #ffffff; stroke: #d1d9e0; }
  text { font: 13px -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328; }
  .title { font-size: 17px; font-weight: 600; }
  .panel { font-size: 14px; font-weight: 600; }
  .faint { fill: #59636e; }
  .end { text-anchor: end; }
  .ours { font-weight: 600; }
  .bar { fill: #afb8c1; }
  .bar.ours { fill: #0969da; }
  .bar.limit { fill: #818b98; }
  .value { paint-order: stroke; stroke: #ffffff; stroke-width: 4px; }
  .spread { stroke: #59636e; stroke-width: 1.5; }
  .one { stroke: #818b98; stroke-dasharray: 3 3; }
  @media (prefers-color-scheme: dark) {
    .card { fill: #0d1117; stroke: #3d444d; }
    text { fill: #f0f6fc; }
    .faint { fill: #9198a1; }
    .bar { fill: #3d444d; }
    .bar.ours { fill: #4493f8; }
    .bar.limit { fill: #656c76; }
    .value { stroke: #0d1117; }
    .spread { stroke: #9198a1; }
    .one { stroke: #656c76; }
  }
"""

Bar = Mapping[str, Any]  # a cell as JSON: contender, ratio {median, low, high}, rate {median}


def draw(
    title: str,
    told: Sequence[str],
    panels: Sequence[tuple[str, str, Sequence[Bar]]],
    *,
    ours: str,
    limits: Sequence[str],
) -> str:
    """`told`: two lines below the title. `panels`: heading, what 1.00 is, bars. Contenders whose name
    begins with `ours` stand out, and those that begin with one of `limits`."""
    parts: list[str] = []
    at = HEAD
    for heading, one, bars in panels:
        at = _panel(parts, at, heading, one, bars, ours, limits)
    high = at + 6
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDE} {high}" '
            f'width="{WIDE}" height="{high}" role="img" aria-label="{_quoted(title)}">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style>",
            f'<rect class="card" x="0.5" y="0.5" width="{WIDE - 1}" height="{high - 1}" rx="8"/>',
            f'<text class="title" x="24" y="36">{escape(title)}</text>',
            *(
                f'<text class="faint" x="24" y="{58 + 19 * number}">{escape(line)}</text>'
                for number, line in enumerate(told)
            ),
            *parts,
            "</svg>\n",
        ]
    )


def _panel(
    parts: list[str],
    at: int,
    heading: str,
    one: str,
    bars: Sequence[Bar],
    ours: str,
    limits: Sequence[str],
) -> int:
    """Adds one panel; says where the next begins."""
    shown = sorted((bar for bar in bars if bar["ratio"]), key=lambda bar: -bar["ratio"]["median"])
    if not shown:
        return at
    longest = max(bar["ratio"]["high"] for bar in shown)
    scale = ROOM / max(1.0, longest)
    parts.append(f'<text class="panel" x="24" y="{at + 24}">{escape(heading)}</text>')
    where, foot = LEFT + scale, at + PANEL_HEAD + STEP * len(shown)
    parts.append(
        f'<text class="faint end" x="{WIDE - 24}" y="{at + 24}">1.00 = {escape(one)}</text>'
    )
    parts.append(
        f'<line class="one" x1="{where:.1f}" x2="{where:.1f}" y1="{at + 36}" y2="{foot}"/>'
    )
    for number, bar in enumerate(shown):
        _bar(parts, at + PANEL_HEAD + STEP * number, bar, scale, _kind(bar, ours, limits))
    return foot + PANEL_FOOT


def _kind(bar: Bar, ours: str, limits: Sequence[str]) -> str:
    name = bar["contender"]
    if name.startswith(ours):
        return " ours"
    return " limit" if name.startswith(tuple(limits)) else ""


def _bar(parts: list[str], at: int, bar: Bar, scale: float, kind: str) -> None:
    ratio, middle = bar["ratio"], at + BAR / 2
    low, high = (LEFT + ratio[end] * scale for end in ("low", "high"))
    rate = f"{bar['rate']['median']:,.0f}/s"
    parts += [
        f'<text class="end{kind}" x="{LEFT - 10}" y="{at + 14}">{escape(bar["contender"])}</text>',
        f'<rect class="bar{kind}" x="{LEFT}" y="{at}" width="{max(1.5, ratio["median"] * scale):.1f}" '
        f'height="{BAR}" rx="3"/>',
        f'<line class="spread" x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}"/>',
        f'<text class="value{kind}" x="{max(high, LEFT + 2) + 8:.1f}" y="{at + 14}">'
        f'{ratio["median"]:.2f} <tspan class="faint">{rate}</tspan></text>',
    ]


def _quoted(text: str) -> str:
    return escape(text, {'"': "&quot;"})
