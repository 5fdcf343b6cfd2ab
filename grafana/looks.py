"""How each kind of panel looks in Grafana: the builder with everything but titles and queries."""

from __future__ import annotations

from typing import Any

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.builders import dashboard as dash
from grafana_foundation_sdk.models import common as how
from grafana_foundation_sdk.models import dashboard as words

from grafana.panels import Panel

SOURCE = words.DataSourceRef(type_val="prometheus", uid="${datasource}")
EVENT_STEP = "1m"  # one bar a minute at most, or the bars could not be told apart
SEE_MODEL = "/d/modeldepot-inference?var-model=${__field.labels.model}&${__url_time_range}"
HIDDEN = ("Time", "__name__", "instance", "job", "Value")


def look(panel: Panel) -> Any:
    made = _KINDS[panel.kind](panel)
    if panel.unit:
        made.unit(panel.unit)
    if panel.words:
        made.mappings([_words(panel)])
    if panel.top is not None:
        made.max(panel.top)
    if panel.kind not in ("stat", "table") or panel.unit == "percentunit":
        made.min(0)
    return made.thresholds(_thresholds(panel))


def _lines(panel: Panel) -> timeseries.Panel:
    made = timeseries.Panel().line_width(1).fill_opacity(8).show_points(how.VisibilityMode.NEVER)
    made.color_scheme(_by_name()).span_nulls(60_000)
    if panel.steps:
        style = common.GraphThresholdsStyleConfig().mode(how.GraphThresholdsStyleMode.DASHED)
        made.thresholds_style(style)
    return _with_legend(made, panel)


def _stack(panel: Panel) -> timeseries.Panel:
    made = timeseries.Panel().line_width(1).fill_opacity(45).show_points(how.VisibilityMode.NEVER)
    made.color_scheme(_by_name())
    made.stacking(common.StackingConfig().mode(how.StackingMode.NORMAL).group("A"))
    for number, query in enumerate(panel.queries):
        if query.line:
            made.override_by_query(
                chr(ord("A") + number),
                [
                    words.DynamicConfigValue("custom.stacking", {"mode": "none", "group": "A"}),
                    words.DynamicConfigValue("custom.fillOpacity", 0),
                    words.DynamicConfigValue("custom.lineWidth", 2),
                    words.DynamicConfigValue("custom.lineStyle", {"fill": "dash", "dash": [8, 6]}),
                ],
            )
    return _with_legend(made, panel)


def _events(panel: Panel) -> timeseries.Panel:
    made = timeseries.Panel().draw_style(how.GraphDrawStyle.BARS).fill_opacity(70).decimals(0)
    made.color_scheme(_by_name()).interval(EVENT_STEP)
    made.stacking(common.StackingConfig().mode(how.StackingMode.NORMAL).group("A"))
    return _with_legend(made, panel)


def _states(panel: Panel) -> statetimeline.Panel:
    made = statetimeline.Panel().show_value(how.VisibilityMode.AUTO).row_height(0.8)
    made.merge_values(True).fill_opacity(80).line_width(0)
    made.legend(_legend())
    made.tooltip(common.VizTooltipOptions().mode(how.TooltipDisplayMode.SINGLE))
    return made.data_links(
        [dash.DashboardLink("Requests of ${__field.labels.model}").url(SEE_MODEL)]
    )


def _stat(panel: Panel) -> stat.Panel:
    made = stat.Panel().reduce_options(_last()).graph_mode(_graph(panel))
    made.color_mode(
        how.BigValueColorMode.VALUE if panel.steps or panel.words else how.BigValueColorMode.NONE
    )
    single = len(panel.queries) == 1 and "{{" not in panel.queries[0].legend
    return made.text_mode(
        how.BigValueTextMode.VALUE if single else how.BigValueTextMode.VALUE_AND_NAME
    )


def _graph(panel: Panel) -> how.BigValueGraphMode:
    return how.BigValueGraphMode.NONE if panel.words else how.BigValueGraphMode.AREA


def _bars(panel: Panel) -> bargauge.Panel:
    made = bargauge.Panel().reduce_options(_last()).orientation(how.VizOrientation.HORIZONTAL)
    return made.display_mode(how.BarGaugeDisplayMode.BASIC)


def _table(panel: Panel) -> table.Panel:
    made = table.Panel().cell_height(how.TableCellHeight.SM)
    headings = dict(panel.columns)
    order = {label: number for number, (label, _) in enumerate(panel.columns)}
    hidden = {name: True for name in HIDDEN if name not in headings}
    return made.with_transformation(
        words.DataTransformerConfig(
            id_val="organize",
            options={"excludeByName": hidden, "indexByName": order, "renameByName": headings},
        )
    )


_KINDS: dict[str, Any] = {
    "lines": _lines, "stack": _stack, "events": _events, "states": _states,
    "stat": _stat, "bars": _bars, "table": _table,
}  # fmt: skip


def _with_legend(made: timeseries.Panel, panel: Panel) -> timeseries.Panel:
    tooltip = common.VizTooltipOptions().mode(how.TooltipDisplayMode.MULTI)
    return made.legend(_legend()).tooltip(tooltip.sort(how.SortOrder.DESCENDING))


def _legend() -> common.VizLegendOptions:
    made = common.VizLegendOptions().display_mode(how.LegendDisplayMode.LIST)
    return made.placement(how.LegendPlacement.BOTTOM).show_legend(True).calcs([])


def _last() -> common.ReduceDataOptions:
    return common.ReduceDataOptions().calcs(["lastNotNull"]).values(False)


def _by_name() -> dash.FieldColor:
    """A model has the same colour in every panel."""
    return dash.FieldColor().mode(words.FieldColorModeId.PALETTE_CLASSIC_BY_NAME)


def _words(panel: Panel) -> words.ValueMap:
    return words.ValueMap(
        options={
            str(value): words.ValueMappingResult(text=text, color=colour, index=index)
            for index, (value, (text, colour)) in enumerate(panel.words.items())
        }
    )


def _thresholds(panel: Panel) -> dash.ThresholdsConfig:
    steps = panel.steps or ((0, "green"),)
    return (
        dash.ThresholdsConfig()
        .mode(words.ThresholdsMode.ABSOLUTE)
        .steps(
            [
                words.Threshold(value=None if number == 0 else value, color=colour)
                for number, (value, colour) in enumerate(steps)
            ]
        )
    )
