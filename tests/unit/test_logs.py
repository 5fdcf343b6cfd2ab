"""Log lines: one each, with the time in UTC to the millisecond, for people or for machines."""

import json
import logging
import sys
from datetime import UTC, datetime

import pytest

from server.logs import JsonLines, TextLines

MOMENTS = [0.0, 1.9999, 1_700_000_000.0, 1_700_000_000.0625, 1_700_000_059.96875, 1_700_000_060.5]


def record(at=0.0, error=None):
    made = logging.LogRecord("modeldepot.x", logging.INFO, "", 0, "%s of %d", ("one", 2), error)
    made.created = at
    return made


@pytest.mark.parametrize("at", MOMENTS)
def test_a_line_begins_with_its_time_in_utc_to_the_millisecond(at):
    told = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
    line = TextLines().format(record(at))
    assert line == f"{told.removesuffix('+00:00')}Z INFO    modeldepot.x: one of 2"
    assert json.loads(JsonLines().format(record(at)))["at"] == told


def test_a_line_for_machines_is_one_object_with_the_traceback_inside():
    try:
        raise ValueError("bad")
    except ValueError:
        error = sys.exc_info()
    line = JsonLines().format(record(error=error))
    found = json.loads(line)
    assert "\n" not in line and "ValueError: bad" in found.pop("traceback")
    assert found == {
        "at": "1970-01-01T00:00:00.000+00:00",
        "level": "info",
        "logger": "modeldepot.x",
        "message": "one of 2",
    }
