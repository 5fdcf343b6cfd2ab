"""Makes Grafana's JSON of the boards.

    python -m grafana.build [FOLDER]     (default: dashboards/ beside this file)

What is committed is what this makes; a test compares. References of queries (A, B, ...) are set here:
the kit gives none, and Grafana mixes up answers of queries that have none.
"""

from __future__ import annotations

import json
import string
import sys
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import dashboard as dash
from grafana_foundation_sdk.builders import prometheus
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as words
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from grafana.boards import BOARDS
from grafana.grid import SPAN, Place, places
from grafana.looks import SOURCE, look
from grafana.panels import VARIABLES, Board, Mark, Panel, Query, Variable

HERE = Path(__file__).parent
TAG = "modeldepot"


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "dashboards"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in made().items():
        (folder / name).write_text(text)
        print(folder / name)


def made() -> dict[str, str]:
    """File name -> JSON of each board."""
    return {f"{board.uid.removeprefix('modeldepot-')}.json": text_of(board) for board in BOARDS}


def text_of(board: Board) -> str:
    plain = json.loads(json.dumps(build(board).build(), cls=JSONEncoder))
    for variable in plain["templating"]["list"]:
        for name in ("auto", "auto_count", "auto_min"):  # of intervals; the schema knows them not
            variable.pop(name, None)
    return json.dumps(plain, indent=2, sort_keys=True) + "\n"


def build(board: Board) -> dash.Dashboard:
    made = (
        dash.Dashboard(board.title)
        .uid(board.uid)
        .description(board.help)
        .tags([TAG])
        .timezone("browser")
        .time("now-1h", "now")
        .refresh("10s")
        .tooltip(words.DashboardCursorSync.CROSSHAIR)
        .with_variable(_datasource())
        .link(
            dash.DashboardLink("Model Depot")
            .type(words.DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .tooltip("The other boards, for the same servers, models and time")
            .include_vars(True)
            .keep_time(True)
        )
    )
    for variable in VARIABLES:
        made.with_variable(_variable(variable))
    for mark in board.marks:
        made.annotation(_mark(mark))
    number = 0
    top = 0
    for row in board.rows:
        number += 1
        made.with_row(dash.Row(row.title).id(number).grid_pos(_grid(Place(0, top, SPAN, 1))))
        for panel, place in zip(row.panels, places(row.panels, top + 1), strict=True):
            number += 1
            made.with_panel(_panel(panel).id(number).grid_pos(_grid(place)))
            top = max(top, place.y + place.height)
    return made


def _grid(place: Place) -> words.GridPos:
    return words.GridPos(h=place.height, w=place.width, x=place.x, y=place.y)


def _datasource() -> dash.DatasourceVariable:
    return (
        dash.DatasourceVariable("datasource")
        .label("Prometheus")
        .type("prometheus")
        .description("Where the series are kept.")
    )


def _variable(variable: Variable) -> dash.QueryVariable:
    return (
        dash.QueryVariable(variable.name)
        .label(variable.label)
        .description(variable.help)
        .datasource(SOURCE)
        .query({"query": variable.query, "refId": variable.name, "qryType": 1})
        .refresh(words.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(words.VariableSort.NATURAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(words.VariableOption(text="All", value="$__all"))
    )


def _mark(mark: Mark) -> dash.AnnotationQuery:
    return _MarkWithText(mark)


class _MarkWithText(dash.AnnotationQuery):
    """The kit knows an annotation's expression, but not the words that are shown of it."""

    def __init__(self, mark: Mark) -> None:
        super().__init__()
        self.name(mark.name).datasource(SOURCE).enable(True).icon_color(mark.colour)
        self.expr(mark.expr)
        self._text = mark.text

    def build(self) -> Any:
        said: dict[str, object] = self._internal.to_json()
        return {**said, "step": "15s", "titleFormat": said["name"], "textFormat": self._text}


def _panel(panel: Panel) -> Any:
    made = look(panel).title(panel.title).description(panel.help).datasource(SOURCE)
    made.no_value(panel.none)
    for reference, query in zip(string.ascii_uppercase, panel.queries, strict=False):
        made.with_target(_query(query, reference, panel))
    return made


def _query(query: Query, reference: str, panel: Panel) -> prometheus.Dataquery:
    made = prometheus.Dataquery().expr(query.expr).ref_id(reference).legend_format(query.legend)
    made.datasource(SOURCE)
    if query.instant:
        made.instant()
    else:
        made.range()
    if query.exemplar:
        made.exemplar(True)
    if panel.kind == "table":
        made.format(PromQueryFormat.TABLE)
    return made


if __name__ == "__main__":
    main()
