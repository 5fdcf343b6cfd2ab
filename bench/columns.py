"""The same figures of several subjects side by side: a row is a figure, a column a subject."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.figures import Row


def columns(title: str, found: Mapping[str, Sequence[Row]]) -> str:
    """Rows are matched by `what`, in the order of their first appearance. `!`: the aim is missed."""
    names = list(dict.fromkeys(row.what for rows in found.values() for row in rows))
    by_column = [{row.what: row for row in rows} for rows in found.values()]
    lines = [["", *found, "aim"]]
    for name in names:
        cells = [_cell(column.get(name)) for column in by_column]
        wishes = dict.fromkeys(c[name].wish for c in by_column if name in c and c[name].wish)
        lines.append([name, *cells, " or ".join(wishes)])
    wide = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        [title, *("  ".join([line[0].ljust(wide[0]), *_right(line, wide)]) for line in lines)]
    )


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    return f"{row.value:.4g} {row.unit}".rstrip() + ("" if row.reached else " !")


def _right(line: Sequence[str], wide: Sequence[int]) -> list[str]:
    return [cell.rjust(width) for cell, width in zip(line[1:], wide[1:], strict=True)]
