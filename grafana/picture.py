"""Draws the boards as SVG, of what a Prometheus answers to the very queries of their panels.

    python -m grafana.picture FOLDER [--minutes 3]
        serves models of several kinds, lets clients ask, reloads, evicts and breaks them meanwhile
        (tests/e2e/scene.py), has a Prometheus scrape it, and draws repository.svg, memory.svg and
        inference.svg. `make pictures` calls it so. Needs Debian's or Ubuntu's package `prometheus`.

Grafana draws more beautifully; the data and the layout are the same. Panels that this machine has
nothing for (no GPU) are left out.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from grafana import svg
from grafana.boards import BOARDS
from grafana.figures import said
from grafana.grid import SPAN, Place, places
from grafana.panels import Board, Panel, Query
from grafana.svg import Box, Series

COLUMN, LINE = 50, 27  # of the grid
EDGE, GAP = 16, 8
HEAD = 58
STEP_S, WINDOW_S = 2, 10
EVENT_S = 10


class Shown(NamedTuple):
    """What the pictures are of. `start` and `end` in Unix time; `marks`: the board's, as (when,
    colour, words)."""

    asked: Any  # tests.e2e.prometheus.Prometheus
    instance: str
    start: float
    end: float
    marks: tuple[tuple[float, str, str], ...] = ()

    async def answer(self, panel: Panel, query: Query) -> list[Series]:
        from tests.e2e.prometheus import put

        step = EVENT_S if panel.kind == "events" else STEP_S
        whole = f"{int(self.end - self.start)}s"
        expr = put(query.expr, instance=self.instance, window=f"{WINDOW_S}s", step=f"{step}s",
                   shown=whole)  # fmt: skip
        if query.instant:
            found = await self.asked.ask(expr, time=self.end)
            pairs = [(one["metric"], [one["value"]]) for one in found]
        else:
            found = await self.asked.series(expr, self.start, self.end, step)
            pairs = [(one["metric"], one["values"]) for one in found]
        named = [
            Series(name_of(query.legend, labels), numbers_of(values), query.line, labels)
            for labels, values in pairs
        ]
        return sorted((one for one in named if one.points), key=lambda one: one.name)

    async def marked(self, board: Board) -> Shown:
        """With the board's marks. Those of its beginning are of what was before."""
        found = []
        for one in board.marks:
            series = await self.answer(_MARKS, Query(one.expr, one.text))
            found += [
                (at, one.colour, each.name)
                for each in series
                for at, _ in each.points
                if at > self.start + EVENT_S / 2
            ]
        return self._replace(marks=tuple(found))


_MARKS = Panel("", "events", "", ())


def numbers_of(values: Sequence[Sequence[Any]]) -> list[tuple[float, float]]:
    pairs = [(float(at), float(value)) for at, value in values]
    return [(at, value) for at, value in pairs if value == value]


def name_of(legend: str, labels: dict[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found[1], ""), legend)


async def draw(board: Board, shown: Shown, told: str) -> str:
    """The board's picture. `told`: a line below its title."""
    wide = 2 * EDGE + SPAN * COLUMN
    shown = await shown.marked(board)
    parts = [
        svg.text(EDGE, 28, board.title, "board"),
        svg.text(EDGE, 47, told, "faint"),
    ]
    top: float = HEAD
    for row in board.rows:
        filled = {panel.title: await answers(panel, shown) for panel in row.panels}
        kept = tuple(p for p in row.panels if any(filled[p.title]))
        if not kept:
            continue
        parts.append(svg.text(EDGE, top + 15, row.title, "row"))
        top += 22
        laid = places(widened(kept), 0)
        for panel, place in zip(kept, laid, strict=True):
            parts += card(panel, filled[panel.title], box_of(place, top), shown)
        top += max(place.y + place.height for place in laid) * LINE + 4
    return svg.document(board.title, wide, top + EDGE / 2, parts)


def widened(panels: tuple[Panel, ...]) -> tuple[Panel, ...]:
    """Each line takes the whole width: what was left out of it leaves no hole."""
    lines: list[list[Panel]] = []
    for panel, place in zip(panels, places(panels, 0), strict=True):
        if place.x == 0:
            lines.append([])
        lines[-1].append(panel)
    return tuple(panel for line in lines for panel in stretched(line))


def stretched(line: list[Panel]) -> list[Panel]:
    free = SPAN - sum(panel.width for panel in line)
    if free <= 0 or len({panel.height for panel in line}) > 1:
        return line  # one below the other
    each, rest = divmod(free, len(line))
    wide = [panel.width + each for panel in line]
    wide[-1] += rest
    return [replace(panel, width=width) for panel, width in zip(line, wide, strict=True)]


def box_of(place: Place, top: float) -> Box:
    return Box(
        EDGE + place.x * COLUMN,
        top + place.y * LINE,
        place.width * COLUMN - GAP,
        place.height * LINE - GAP,
    )


async def answers(panel: Panel, shown: Shown) -> list[list[Series]]:
    return list(await asyncio.gather(*(shown.answer(panel, query) for query in panel.queries)))


def card(panel: Panel, answered: list[list[Series]], box: Box, shown: Shown) -> list[str]:
    parts = [
        svg.rect(box, "card", 5),
        svg.text(box.x + 12, box.y + 20, svg.fitted(panel.title, box.w - 20, 6.8), "title"),
    ]
    series = [one for found in answered for one in found]
    return parts + INSIDES[panel.kind](panel, series, box, shown)


def over_time(panel: Panel, series: list[Series], box: Box, shown: Shown) -> list[str]:
    names = [one.name for one in series]
    plot = box.within(58, 34, 16, 40)
    solid = [one for one in series if not one.line]
    parts, scale = svg.axes(plot, shown.start, shown.end, most(panel, series), panel.unit)
    if panel.kind != "events":
        parts += [svg.mark(at, scale, kind, words) for at, kind, words in shown.marks]
    if panel.kind == "lines":
        parts += svg.lines(series, scale, names)
    elif panel.kind == "stack":
        parts += svg.areas(solid, scale, names)
        parts += svg.lines([one for one in series if one.line], scale, names)
    else:
        parts += svg.bars(solid, scale, names, EVENT_S)
    place = Box(box.x + 12, box.y + box.h - 17, box.w - 24, 12)
    return parts + svg.legend(place, names, names)


def most(panel: Panel, series: list[Series]) -> float:
    """The highest point of the drawing."""
    if panel.top:
        return panel.top
    alone = [
        value for one in series if one.line or panel.kind == "lines" for _, value in one.points
    ]
    pile = [one for one in series if not one.line]
    tops = [top for _, band in svg.piled(pile) for _, _, top in band] if not alone or pile else []
    found = max([*alone, *(tops if panel.kind != "lines" else ())], default=1.0)
    return max(found, 1.0 if panel.kind == "events" else 0.0) or 1.0


def states(panel: Panel, series: list[Series], box: Box, shown: Shown) -> list[str]:
    plot = box.within(130, 34, 16, 40)
    parts, scale = svg.axes(plot._replace(y=plot.y + plot.h, h=0.01), shown.start, shown.end, 1, "")
    kept = [part for part in parts if "middle" in part]  # the times alone
    kept += svg.timeline(plot, series, panel.words, scale)
    x = box.x + 12
    for word, kind in panel.words.values():
        kept.append(svg.rect(Box(x, box.y + box.h - 14, 10, 6), f"fill {kind}", 1))
        kept.append(svg.text(x + 14, box.y + box.h - 8, word, "faint small"))
        x += 32 + 6.4 * len(word)
    return kept


def written(panel: Panel, value: float) -> tuple[str, str]:
    """A value as words, and the class of its colour."""
    if int(value) in panel.words and value == int(value):
        words, kind = panel.words[int(value)]
        return words, f"value {kind}"
    colours = [kind for step, kind in panel.steps if value >= step]
    return said(value, panel.unit), f"value {colours[-1]}" if colours else ""


def stat(panel: Panel, series: list[Series], box: Box, _: Shown) -> list[str]:
    return svg.numbers(box.within(4, 18, 4, 4), series, lambda value: written(panel, value))


def lying(panel: Panel, series: list[Series], box: Box, _: Shown) -> list[str]:
    longest = panel.top or max((one.last for one in series), default=1.0)

    def write(value: float) -> tuple[str, str]:
        words, kind = written(panel, value)
        return words, kind.removeprefix("value ")

    return svg.lying(box.within(12, 34, 12, 10), series, write, longest)


def table(panel: Panel, series: list[Series], box: Box, _: Shown) -> list[str]:
    rows = [
        [said(one.last, panel.unit) if label == "Value" else (one.labels or {}).get(label, "")
         for label, _ in panel.columns]
        for one in series
    ]  # fmt: skip
    return svg.table(box.within(12, 32, 12, 8), [head for _, head in panel.columns], sorted(rows))


INSIDES = {
    "lines": over_time, "stack": over_time, "events": over_time, "states": states,
    "stat": stat, "bars": lying, "table": table,
}  # fmt: skip


# the run that is drawn ----------------------------------------------------------------------------


async def run(minutes: float) -> dict[str, str]:
    """The pictures, by the boards' names."""
    from tests.e2e.prometheus import prometheus, write_config
    from tests.e2e.scene import scene

    with tempfile.TemporaryDirectory() as home:
        async with scene(Path(home)) as stage:
            target = stage.server.url.removeprefix("http://")
            config = write_config(Path(home) / "prometheus", stage.key, {"depot:8000": target})
            async with prometheus(config) as asked:
                await asked.until("up == 1")
                start = time.time()
                await stage.play(minutes * 60)
                shown = Shown(asked, ".*", start, time.time())
                return {board.uid: await draw(board, shown, told(minutes)) for board in BOARDS}


def told(minutes: float) -> str:
    return (
        f"{minutes:g} minutes of a real server on a machine without a GPU, scraped by a real "
        "Prometheus; drawn by grafana/picture.py with the queries of the board."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=3.0)
    wishes = parser.parse_args()
    wishes.folder.mkdir(parents=True, exist_ok=True)
    for name, picture in asyncio.run(run(wishes.minutes)).items():
        path = wishes.folder / f"{name.removeprefix('modeldepot-')}.svg"
        path.write_text(picture)
        print(path)


if __name__ == "__main__":
    main()
