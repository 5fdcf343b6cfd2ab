"""What the tests of `modeldepot doctor` share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from server.cli.checkup.finding import Finding, Level
from server.settings import Settings, resolve


def settings(tmp_path: Path, **flags: Any) -> Settings:
    given = {
        "allow_grpc": False,
        "repo": tmp_path / "models",
        "state_dir": tmp_path / "state",
    } | flags
    return resolve(given, {}).settings


def only(found: Sequence[Finding], check: str = "") -> Finding:
    """The one of that check; nothing is wrong in it without a word what to do."""
    (one,) = [each for each in found if not check or each.check == check]
    assert bool(one.todo) is (one.level is not Level.OK)
    return one
