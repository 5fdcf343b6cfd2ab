"""The command, run inside the test: what it printed and the exit code that it would have."""

from __future__ import annotations

from typing import Any

from click.testing import CliRunner, Result

from server.cli import command


def run(*args: str, **rest: Any) -> Result:
    result = CliRunner().invoke(command, list(args), **rest)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result
