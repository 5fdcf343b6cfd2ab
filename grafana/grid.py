"""Where the panels of a board lie: 24 columns, as Grafana has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from grafana.panels import Panel

SPAN = 24


class Place(NamedTuple):
    x: int
    y: int
    width: int
    height: int


def places(panels: Sequence[Panel], top: int) -> list[Place]:
    """From left to right, a new line when one is full. A low one whose width is that of the one before
    it goes below that one, beside a neighbour as high as both."""
    found: list[Place] = []
    x, y, high = 0, top, 0
    for panel in panels:
        last = found[-1] if found else None
        below = last is not None and x == SPAN and last.width == panel.width
        if last and below and last.height + panel.height <= high:
            found.append(Place(last.x, y + last.height, panel.width, panel.height))
            continue
        if x + panel.width > SPAN:
            x, y, high = 0, y + high, 0
        found.append(Place(x, y, panel.width, panel.height))
        x, high = x + panel.width, max(high, panel.height)
    return found
