"""Tables: drawn to the width on a terminal, plain columns that nothing cuts off in a pipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

STYLES = {"loaded": "green", "loading": "yellow", "failed": "red", "unloading": "yellow"}
Row = Sequence[str]


def plain(head: Row, rows: Sequence[Row]) -> list[str]:
    """Columns are separated by two spaces; a text of several lines becomes one."""
    cells = [[" ".join(cell.split()) or "-" for cell in row] for row in (head, *rows)]
    wide = [max(len(row[i]) for row in cells) for i in range(len(head))]
    return ["  ".join(c.ljust(w) for c, w in zip(row, wide, strict=True)).rstrip() for row in cells]


def drawn(head: Row, rows: Sequence[Row]) -> Table:
    """The column "state" is coloured by what it says."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in head:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*[Text(cell, style=STYLES.get(cell.split(" ")[0], "")) for cell in row])
    return table
