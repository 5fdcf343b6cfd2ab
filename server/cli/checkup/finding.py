"""What a check says: how it stands, and what to do where it does not stand well."""

from __future__ import annotations

import enum
from typing import NamedTuple


class Level(enum.StrEnum):
    """`warn`: it serves, but not as well as it could, or not for long. `fail`: something does not
    work."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


class Finding(NamedTuple):
    """`todo` is empty only where the level is ok."""

    check: str
    level: Level
    said: str
    todo: str = ""


def ok(check: str, said: str) -> Finding:
    return Finding(check, Level.OK, said)


def warn(check: str, said: str, todo: str) -> Finding:
    return Finding(check, Level.WARN, said, todo)


def fail(check: str, said: str, todo: str) -> Finding:
    return Finding(check, Level.FAIL, said, todo)
