"""`modeldepot events`: what happens, line by line."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from server.cli.options import talks_to_a_server

if TYPE_CHECKING:
    from repository.events import Event
    from server.cli.client import Client
    from server.cli.exits import Failure


@click.command()
@click.option("--model", default="", help="Only this model's.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
@talks_to_a_server
async def events(client: Client, model: str, as_json: bool) -> None:
    """Follow what happens on a server until interrupted.

    If the connection breaks it comes back by itself, with what was missed meanwhile.
    """
    import msgspec

    async for event in client.follow(model=model, lost=tell_lost):
        click.echo(msgspec.json.encode(event) if as_json else line_of(event))


def tell_lost(why: Failure | None) -> None:
    click.echo(f"connection lost ({why.message if why else 'it ended'}); coming back", err=True)


def line_of(event: Event) -> str:
    """`12:30:01  model.state  digits:2 #7  state=ready note=...`"""
    from datetime import datetime

    at = datetime.fromtimestamp(event.at).astimezone().strftime("%H:%M:%S")
    about = event.model
    if event.version:
        about += f":{event.version}"
    if event.generation:
        about += f" #{event.generation}"
    rest = " ".join(f"{k}={v}" for k, v in event.data.items() if v not in (None, ""))
    return "  ".join(part for part in (at, event.kind, about, rest) if part)
