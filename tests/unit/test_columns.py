"""Figures of several subjects, side by side."""

from bench.columns import columns
from bench.figures import Row


def test_rows_are_matched_by_name_and_a_missed_aim_is_marked() -> None:
    found = {
        "1": [Row("scan", 0.5, "s", 1), Row("left", 0, "", 0)],
        "1000": [Row("scan", 2, "s", 1), Row("tree", 12, "MiB")],
    }
    assert [line.split() for line in columns("models", found).splitlines()] == [
        ["models"],
        ["1", "1000", "aim"],
        ["scan", "0.5", "s", "2", "s", "!", "<=", "1", "s"],
        ["left", "0", "-", "<=", "0"],
        ["tree", "-", "12", "MiB"],
    ]
