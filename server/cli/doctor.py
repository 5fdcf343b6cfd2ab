"""`modeldepot doctor`: is this machine fit to serve, as the server would be started here?

`--live` and `--ready` ask a server that runs instead, for a container's health check: quick, so they
import next to nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from server.cli.exits import FAILED
from server.cli.serve import flags
from server.settings import ENV

if TYPE_CHECKING:
    from server.cli.checkup.finding import Finding
    from server.settings import Settings

WITHIN_S = 60.0  # importing torch from a cold disk takes its time
ASKED_S = 2.0
COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def _doctor(
    repo: str | None,
    config: str | None,
    live: bool,
    ready: bool,
    as_json: bool,
    timeout: float | None,
    **given: Any,
) -> None:
    """Check that this machine can serve the models in REPO, and say what to do where it cannot.

    Takes the flags, MODELDEPOT_* variables and --config of `serve`, and starts nothing. Exits 0 where
    nothing failed (warnings are shown), else 1. --live and --ready ask the server that runs at the
    configured port: 0 if it is, 1 if not, and no API key is needed.
    """
    from repository.errors import RepositoryError
    from server.cli.checkup.finding import fail
    from server.settings import resolve

    try:
        path = Path(config) if config else None
        settings = resolve({"repo": repo, **given}, os.environ, path).settings
    except RepositoryError as error:
        found = [
            fail("settings", str(error), "`modeldepot serve --print-config` shows all of them")
        ]
    else:
        if live or ready:
            found = [asked(settings, "ready" if ready else "live", timeout or ASKED_S)]
        else:
            from server.cli.checkup.examine import checks, examine

            within_s = timeout or WITHIN_S
            found = examine(checks(settings, within_s), within_s)
    show(found, as_json=as_json, whole=not (live or ready))
    if any(one.level == "fail" for one in found):
        raise click.exceptions.Exit(FAILED)


def asked(settings: Settings, word: str, within_s: float) -> Finding:
    """`word`: live or ready."""
    from server.cli.checkup import doors
    from server.cli.checkup.encryption import context_of
    from server.cli.checkup.finding import fail, ok

    host = doors.reach(settings.host)
    tls = context_of(settings)
    scheme = "http" if tls is None else "https"
    where = f"{scheme}://[{host}]" if ":" in host else f"{scheme}://{host}"
    where = f"{where}:{settings.port}"
    if settings.port == 0:
        return fail(word, "port 0 is any free one", "name the one that the server took: --port")
    try:
        told = doors.ask(host, settings.port, f"/v2/health/{word}", within_s, tls)
    except TimeoutError:
        return fail(word, f"{where} does not answer within {within_s:g} s", "see its log")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        todo = "is the server running, and is this its port (MODELDEPOT_PORT, --port)?"
        return fail(word, f"nothing at {where}: {why}", todo)
    if told.status == 200:
        return ok(word, f"{where} answered within {told.took_s * 1000:.0f} ms")
    why = "it is shutting down" if told.status == 503 else "not all that was wanted has settled"
    if word == "live" or told.status not in (400, 503):
        why = "it is shutting down" if told.status == 503 else "is another program there?"
    return fail(word, f"{where} answered {told.status}: {why}", "see its log, or modeldepot status")


def show(found: Sequence[Finding], *, as_json: bool, whole: bool) -> None:
    if as_json:
        import json

        rows = [{**one._asdict(), "level": str(one.level)} for one in found]
        text = {"ok": all(one.level != "fail" for one in found), "checks": rows}
        click.echo(json.dumps(text, indent=2))
        return
    if not whole:
        click.echo(" ".join(f"{one.level} {one.check}: {one.said}" for one in found))
        return
    wide = max(len(one.check) for one in found)
    for one in found:
        level = click.style(f"{one.level:<4}", fg=COLOURS[one.level])
        click.echo(f"{level}  {one.check:<{wide}}  {one.said}")
        if one.todo:
            click.echo(f"{'':<{6 + wide}}  → {one.todo}")
    count = {level: sum(one.level == level for one in found) for level in COLOURS}
    click.echo(f"{count['ok']} ok, {count['warn']} to look at, {count['fail']} failed")


doctor = click.Command(
    "doctor",
    callback=_doctor,
    help=_doctor.__doc__,
    params=[
        click.Argument(["repo"], required=False, metavar="REPO"),
        click.Option(["--live"], is_flag=True, help="Ask only whether the server lives."),
        click.Option(["--ready"], is_flag=True, help="Ask only whether it is ready."),
        click.Option(["--json", "as_json"], is_flag=True, help="One JSON object."),
        click.Option(
            ["--timeout"],
            type=click.FloatRange(min=0, min_open=True),
            metavar="SECONDS",
            help=f"For every check.  [default: {WITHIN_S:g}; {ASKED_S:g} with --live and --ready]",
        ),
        click.Option(
            ["--config"], envvar=f"{ENV}CONFIG", metavar="FILE", help="As `serve --config`."
        ),
        *flags(hidden=True),
    ],
)
