"""What `bench.compare` shows to people: progress, tables, the picture."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from bench import chart
from bench.contenders import LIMITS, OURS, Contender, limit
from bench.figures import MIB
from bench.programs import CALM
from bench.ratios import Cell, Key
from bench.subjects import SUBJECTS

RESTLESS = CALM  # of a core, used without being asked
SHOWN = 16  # connections, in the picture
HEADINGS = ("req/s", "p50 ms", "p99 ms", "CPU us/req", "of the limit", "spread")


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def which(key: Key) -> str:
    subject, contender, connections = key
    return f"{subject}, c={connections}: {contender}"


def tables(cells: Sequence[Cell], names: Sequence[str]) -> str:
    lines: list[str] = []
    for name in names:
        of_it = [cell for cell in cells if cell.subject == name]
        wide = max(len(f"c=16, 1.00 = {LIMITS[name]}"), *(len(cell.contender) for cell in of_it))
        lines.append(f"{name}: {SUBJECTS[name].told}")
        for connections in sorted({cell.connections for cell in of_it}):
            group = [cell for cell in of_it if cell.connections == connections]
            label = f"c={connections}, 1.00 = {limit(name, connections)}" if connections else ""
            lines.append("  ".join([f"{label:<{wide}}", *(f"{h:>12}" for h in HEADINGS)]))
            lines += [_line(cell, wide) for cell in group]
        lines.append("")
    return "\n".join(lines)


def _line(cell: Cell, wide: int) -> str:
    if cell.ratio is None and cell.wrong:
        return f"{cell.contender:<{wide}}  wrong or missing answers"
    ratio = cell.ratio
    told = [
        f"{cell.rate.median:,.0f}",
        f"{cell.p50_ms.median:.3f}",
        f"{cell.p99_ms.median:.3f}",
        f"{cell.cpu_us.median:.1f}",
        f"{ratio.median:.2f}" if ratio else "",
        f"{ratio.low:.2f}..{ratio.high:.2f}" if ratio else "",
    ]
    mark = f"  WRONG ANSWERS in {cell.wrong} rounds" if cell.wrong else ""
    return "  ".join([f"{cell.contender:<{wide}}", *(f"{text:>12}" for text in told)]) + mark


def servers(
    contenders: Sequence[Contender],
    memory: Mapping[str, int],
    idle: Mapping[str, float],
    left_out: Mapping[str, str],
) -> str:
    names: dict[str, str] = {}
    for contender in contenders:
        names.setdefault(contender.server, contender.name)
    wide = max(len(name) for name in names.values())
    lines = [f"{'with all its models':<{wide}}  {'PSS MiB':>12}  {'idle CPU %':>12}"]
    for server, pss in memory.items():
        share = idle[server]
        note = "  stopped while others were measured" if share > RESTLESS else ""
        lines.append(f"{names[server]:<{wide}}  {pss / MIB:>12.0f}  {100 * share:>12.1f}{note}")
    lines += [f"left out: {names[server]}: {why}" for server, why in left_out.items()]
    return "\n".join([*lines, ""])


def picture(cells: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    panels = []
    for name in names:
        bars = [c for c in cells if c["subject"] == name and c["connections"] == SHOWN]
        panels.append((f"{name}: {SUBJECTS[name].told}", LIMITS[name], bars))
    told = (
        f"Requests per second with {SHOWN} connections, as a share of each model's limit; "
        "the lines are the spread of the rounds of one run.",
        "Blue: Model Depot. Dark grey: what the parts can do without a model server. Light grey: peers.",
    )
    title = "Model Depot, its limits and its peers"
    return chart.draw(title, told, panels, ours=OURS, limits=list(LIMITS.values()))
