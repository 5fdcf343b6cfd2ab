"""docs/metrics.md says of every series what the table of names says of it."""

from __future__ import annotations

import re
from pathlib import Path

from server.metrics import names, triton_names
from server.metrics.names import Family

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"


def documented() -> dict[str, list[str]]:
    """name -> the other cells of its row."""
    found = {}
    for line in PAGE.read_text().splitlines():
        if row := re.match(r"\| `(\w+)` \| (.+) \|$", line):
            assert row[1] not in found, f"{row[1]} is there twice"
            found[row[1]] = [cell.strip() for cell in row[2].split(" | ")]
    return found


def labels(family: Family) -> str:
    return ", ".join(family.labels) or "-"


def test_every_series_is_documented_with_its_type_its_labels_and_its_help() -> None:
    rows = documented()
    for family in names.ALL:
        name = family.name + ("_total" if family.kind == "counter" else "")
        kind, of, meaning = rows.pop(name)
        assert (kind, of) == (family.kind, labels(family)), name
        assert meaning.startswith(family.help), name
    for group in triton_names.ALL:
        of, meaning = rows.pop(group[0].full)
        assert of == labels(group[-1]), group[0].full
        assert meaning.startswith(group[0].help), group[0].full
    assert rows == {}, "documented, but not in the tables"
