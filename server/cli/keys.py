"""`modeldepot keys new`: an API key, shown once, and the line that lets the server know it."""

from __future__ import annotations

import click

SCOPES = ("inference", "admin", "metrics")


@click.group()
def keys() -> None:
    """Make API keys for the file that `serve --api-keys` reads."""


@keys.command()
@click.option("--name", required=True, help="Who uses it; shown in the audit log.")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    required=True,
    type=click.Choice(SCOPES),
    help="What it may do; give it several times. admin includes the others.",
)
def new(name: str, scopes: tuple[str, ...]) -> None:
    """Print a new key and the line to add under `keys:` in the key file.

    The key is on stdout alone; it is stored nowhere and cannot be shown again.
    """
    from server.auth import Scope, new_key

    key, line = new_key(name, {Scope(scope) for scope in scopes})
    click.echo(key)
    click.echo("\nThe key is shown this once. Add to the file of --api-keys:\n", err=True)
    click.echo(f"keys:\n{line}", err=True)
