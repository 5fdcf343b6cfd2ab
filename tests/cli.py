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


def model(name: str = "m", state: str = "loaded", **rest: Any) -> dict[str, Any]:
    """As GET /v1/models/NAME answers."""
    memory = {"estimated": 2048, "reserved": 2048, "measured": {}}
    gen = {
        "serial": 3, "version": 2, "state": "ready", "trigger": "api", "device": "cpu",
        "leases": 1, "served": 5, "memory": memory, "error": None,
        "story": [{"at": "2026-01-01T00:00:00", "state": "ready", "event": "warmed", "note": ""}],
    }  # fmt: skip
    return {
        "name": name, "state": state, "reloading": False, "serving_version": 2, "wanted": True,
        "last_error": None, "memory": memory, "generations": [gen], **rest,
    }  # fmt: skip
