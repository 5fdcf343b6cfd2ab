"""The pictures of the boards: whole SVG whatever comes, figures as people read them."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from grafana import picture, svg
from grafana.boards import BOARDS
from grafana.figures import marks, said
from grafana.panels import Panel, Query
from grafana.svg import Box, Series

HOME = Path(__file__).resolve().parents[2]
PICTURES = HOME / "docs" / "pictures"
BOX = Box(0, 0, 400, 220)


@pytest.mark.parametrize(
    ("value", "unit", "words"),
    [
        (0, "s", "0"), (0.0042, "s", "4.2 ms"), (75, "s", "1.2 min"), (0.5, "percentunit", "50 %"),
        (3 * 2**30, "bytes", "3 GiB"), (0, "bytes", "0 B"), (1234, "reqps", "1,234/s"),
        (0.25, "short", "0.25"), (math.nan, "s", "-"), (310, "watt", "310 W"),
    ],
)  # fmt: skip
def test_figures_are_short_and_have_their_unit(value: float, unit: str, words: str) -> None:
    assert said(value, unit) == words


@pytest.mark.parametrize("most", [1e-5, 0.3, 1, 7, 99, 1023, 2**31, 7e12])
@pytest.mark.parametrize("unit", ["bytes", "s", "short"])
def test_an_axis_begins_at_0_rises_evenly_and_holds_the_highest(most: float, unit: str) -> None:
    found = marks(most, unit)
    steps = {round((b - a) / found[1], 6) for a, b in pairwise(found)}
    assert found[0] == 0 and found[-1] >= most * 0.999 and steps == {1.0} and len(found) <= 7


def panel(kind: str) -> Panel:
    return Panel("A & B <c>", kind, "h", (Query("x", "{{model}}"),), words={1: ("on", "green")},
                 columns=(("model", "Model"), ("Value", "Times")))  # type: ignore[arg-type]  # fmt: skip


@pytest.mark.parametrize("kind", sorted(picture.INSIDES))
@pytest.mark.parametrize("count", [0, 1, 30])
def test_every_kind_of_panel_can_be_drawn_of_nothing_and_of_much(kind: str, count: int) -> None:
    hostile = '<script>alert("x")</script>&' * 3
    series = [
        Series(
            f"{hostile}{n}", [(t, float(t % 3)) for t in range(0, 100, 2)], labels={"model": "m"}
        )
        for n in range(count)
    ]
    shown = picture.Shown(None, ".*", 0, 100)
    parts = picture.card(panel(kind), [series], BOX, shown)
    found = ElementTree.fromstring(svg.document("t", 400, 220, parts))
    assert "script" not in {element.tag.rpartition("}")[2] for element in found.iter()}


def test_a_line_is_interrupted_where_nothing_was_measured() -> None:
    points = [(0.0, 1.0), (2.0, 1.0), (4.0, 1.0), (40.0, 1.0), (42.0, 1.0)]
    scale = svg.Scale(BOX, 0, 50, 1)
    (line,) = svg.lines([Series("m", points)], scale, ["m"])
    assert line.count("M") == 2


def test_what_is_not_there_is_0_in_a_pile() -> None:
    pile = svg.piled([Series("a", [(0, 1.0), (1, 1.0)]), Series("b", [(1, 2.0), (2, 2.0)])])
    assert [band for _, band in pile] == [
        [(0, 0.0, 1.0), (1, 0.0, 1.0), (2, 0.0, 0.0)],
        [(0, 1.0, 1.0), (1, 1.0, 3.0), (2, 0.0, 2.0)],
    ]


def test_the_pictures_that_are_committed_show_every_panel_that_needs_no_gpu() -> None:
    """Nor what a healthy day has nothing of."""
    for board in BOARDS:
        text = (PICTURES / f"{board.uid.removeprefix('modeldepot-')}.svg").read_text()
        ElementTree.fromstring(text)
        assert "prefers-color-scheme: dark" in text and not re.search(
            r"url\(|https?://(?!www\.w3)", text
        )
        for one in board.panels:
            if one.needs not in ("gpu", "leak"):
                title = svg.escape(svg.fitted(one.title, 200))[:12]
                assert title in text, f"{board.title} has no {one.title}: make pictures"
