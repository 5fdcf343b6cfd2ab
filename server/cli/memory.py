"""`modeldepot sleep`, `wake`, `pin`, `unpin`, `devices`: who is where in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from server.cli.exits import FAILED, Failure
from server.cli.options import talks_to_a_server
from server.cli.wishes import shown

if TYPE_CHECKING:
    from server.cli.client import Client

HEAD = ("DEVICE", "NAME", "BUDGET", "RESERVED", "FREE", "USED", "OF", "OURS", "OTHERS")


@click.command()
@click.argument("model")
@talks_to_a_server
async def sleep(client: Client, model: str) -> None:
    """Put MODEL to sleep: its weights wait in host memory, its device's memory is free. What cannot
    sleep serves on, and says why."""
    answer = await shown(client, model, lambda: client.sleep(model))
    click.echo(f"{answer['message']} ({answer['took_s']:.2f} s)")


@click.command()
@click.argument("model")
@talks_to_a_server
async def wake(client: Client, model: str) -> None:
    """Wake MODEL and wait until it serves. If it does not sleep, it is loaded."""
    answer = await shown(client, model, lambda: client.wake(model))
    click.echo(f"{answer['message']} ({answer['took_s']:.2f} s)")


@click.command()
@click.argument("model")
@talks_to_a_server
async def pin(client: Client, model: str) -> None:
    """Keep MODEL: nobody drives it out. Fails where the operator's cap does not allow it."""
    answer = await client.pin(model, pinned=True)
    if not answer["honoured"]:
        raise Failure(
            answer["message"],
            FAILED,
            "it is honoured as soon as the cap has room: unpin another, or raise --pin-cap",
        )
    click.echo(answer["message"])


@click.command()
@click.argument("model")
@talks_to_a_server
async def unpin(client: Client, model: str) -> None:
    """Let MODEL be driven out again when others need its room."""
    click.echo((await client.pin(model, pinned=False))["message"])


@click.command()
@click.option("--json", "as_json", is_flag=True, help="As the server says it.")
@talks_to_a_server
async def devices(client: Client, as_json: bool) -> None:
    """Show the devices and their memory: what models may have, hold, and what the device says."""
    answer = await client.devices()
    if as_json:
        import msgspec

        click.echo(msgspec.json.format(msgspec.json.encode(answer), indent=2))
        return
    from rich.console import Console

    from server.cli.tables import drawn, plain

    rows = [row_of(device) for device in answer["devices"]]
    console = Console()
    if console.is_terminal:
        console.print(drawn(HEAD, rows))
    else:
        click.echo("\n".join(plain(HEAD, rows)))


def row_of(device: dict[str, Any]) -> tuple[str, ...]:
    """What is not known is empty. "ours" and "others": of what is used, as far as it can be told."""
    keys = ("budget", "reserved", "free", "used", "total", "attributed", "unattributed")
    name = device["name"] if device["name"] != device["device"] else ""
    return (device["device"], name, *(_bytes(device[key]) for key in keys))


def _bytes(n_bytes: int | None) -> str:
    from repository.sizes import human

    return "" if n_bytes is None else human(n_bytes)
