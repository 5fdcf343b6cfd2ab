"""The words of which boards are made. `build.py` makes Grafana's JSON of them, `picture.py` draws them,
and the tests ask a Prometheus each expression. This file computes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["lines", "stack", "events", "states", "stat", "bars", "table"]
Unit = Literal["", "s", "bytes", "percentunit", "reqps", "ops", "short", "watt"]
Step = tuple[float, str]

# What a model's state is as a number. The higher, the more somebody should look.
STATES: dict[int, tuple[str, str]] = {
    1: ("unloaded", "gray"),
    2: ("loaded", "green"),
    3: ("unloading", "orange"),
    4: ("loading", "blue"),
    5: ("failed", "red"),
}


@dataclass(frozen=True, slots=True)
class Query:
    """legend   Grafana's template: `{{label}}`
    instant  one value, now, instead of one for each step
    line     in a stack: a limit that is drawn over it
    """

    expr: str
    legend: str
    instant: bool = False
    line: bool = False
    exemplar: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """lines   a value over time; `stack`: areas upon each other; `events`: bars, one a step
    states  a bar for each model that changes its colour; bars: one value each, now
    help    what it shows, and what to do when it looks bad
    none    is shown instead of an empty picture: why there may be nothing to see
    needs   what a machine must have for it to show something
    steps   thresholds: from which value on which colour
    words   of numbers
    """

    title: str
    kind: Kind
    help: str
    queries: tuple[Query, ...]
    unit: Unit = "short"
    width: int = 8
    height: int = 8
    none: str = "nothing yet"
    needs: Literal["", "gpu", "text", "adapters", "demand", "tier", "leak"] = ""
    steps: tuple[Step, ...] = ()
    words: dict[int, tuple[str, str]] = field(default_factory=dict)
    top: float | None = None
    columns: tuple[tuple[str, str], ...] = ()  # of a table: label (or Value), heading


@dataclass(frozen=True, slots=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Mark:
    """A line through all panels at the moment when something happened."""

    name: str
    expr: str
    colour: str
    text: str


@dataclass(frozen=True, slots=True)
class Variable:
    name: str
    label: str
    query: str
    help: str


@dataclass(frozen=True, slots=True)
class Board:
    uid: str
    title: str
    help: str
    rows: tuple[Row, ...]
    marks: tuple[Mark, ...] = ()

    @property
    def panels(self) -> tuple[Panel, ...]:
        return tuple(panel for row in self.rows for panel in row.panels)


VARIABLES = (
    Variable(
        "instance", "Server", "label_values(modeldepot_build_info, instance)",
        "Servers, as Prometheus calls what it scrapes.",
    ),
    Variable(
        "model", "Model", 'label_values(modeldepot_model_state{instance=~"$instance"}, model)',
        "Models of the chosen servers.",
    ),
    Variable(
        "gpu", "GPU", 'label_values(modeldepot_gpu_info{instance=~"$instance"}, gpu)',
        "GPUs of the chosen servers, by index. Empty where a machine has none.",
    ),
)  # fmt: skip
