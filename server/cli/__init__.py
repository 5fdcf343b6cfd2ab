"""The `modeldepot` command.

Rules: this module imports click and nothing else, and a command's module is imported only when that
command runs, so that `--help` and a shell's completion answer at once. Exit codes are in `exits`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import click

from server.cli.exits import INTERRUPTED


class Place(NamedTuple):
    """Where a command lives, and the line that `--help` shows without going there."""

    module: str
    attribute: str
    help: str


COMMANDS: dict[str, Place] = {
    "serve": Place("serve", "serve", "Serve a folder of models."),
    "validate": Place("validate", "validate", "Check a folder of models without serving it."),
    "init": Place("init", "init", "Make a model folder from a file."),
    "status": Place("status", "status", "Show the models of a server."),
    "load": Place("wishes", "load", "Load a model and wait until it serves."),
    "unload": Place("wishes", "unload", "Unload a model and wait until its memory is back."),
    "reload": Place("wishes", "reload", "Load a model anew; the old one serves meanwhile."),
    "sleep": Place("memory", "sleep", "Put a model to sleep in host memory."),
    "wake": Place("memory", "wake", "Wake a model and wait until it serves."),
    "pin": Place("memory", "pin", "Keep a model: nobody drives it out."),
    "unpin": Place("memory", "unpin", "Let a model be driven out again."),
    "devices": Place("memory", "devices", "Show the devices and their memory."),
    "events": Place("events", "events", "Follow what happens on a server."),
    "infer": Place("infer", "infer", "Send one request to a model."),
    "keys": Place("keys", "keys", "Make API keys."),
    "doctor": Place("doctor", "doctor", "Check that this machine can serve."),
    "version": Place("version", "version", "Show the version."),
}


class Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        place = COMMANDS.get(cmd_name)
        if place is None:
            return None
        found = getattr(importlib.import_module(f"server.cli.{place.module}"), place.attribute)
        assert isinstance(found, click.Command)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, place.help) for name, place in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            # click would say "Aborted!" and exit 1; a shell expects the signal's own number.
            raise click.exceptions.Exit(INTERRUPTED) from None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Drop model folders into a directory; they are served, hot-reloaded and measured.

    Commands that talk to a server take --url (MODELDEPOT_URL) and --api-key (MODELDEPOT_API_KEY).

    Exit codes: 0 ok, 1 failed, 2 usage, 3 not found, 4 no or wrong API key, 5 timeout,
    6 server unreachable, 7 findings.
    """


def main(args: Sequence[str] | None = None) -> None:
    """Does not return: ends the process with one of the exit codes."""
    command.main(args=args, prog_name="modeldepot")
