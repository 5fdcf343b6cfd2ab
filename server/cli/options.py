"""The options of every command that talks to a server, and how such a command is run."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from server.cli.client import Client

URL = "http://127.0.0.1:8000"

_OPTIONS = (
    click.option(
        "--url", envvar="MODELDEPOT_URL", default=URL, show_default=True, help="The server."
    ),
    click.option(
        "--api-key",
        envvar="MODELDEPOT_API_KEY",
        help="API key; others can see it here, not in MODELDEPOT_API_KEY.",
    ),
    click.option(
        "--timeout",
        type=click.FloatRange(min=0, min_open=True),
        metavar="SECONDS",
        help="How long to wait for an answer.  [default: 10; for loads and inference 900]",
    ),
)


def talks_to_a_server(act: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Adds the options and runs `act` with an open Client as its first argument."""

    @wraps(act)
    def run(url: str, api_key: str | None, timeout: float | None, **rest: Any) -> None:
        import asyncio

        from server.cli.client import Client, Server

        async def talk() -> None:
            client: Client
            async with Client(Server(url, api_key, timeout)) as client:
                await act(client, **rest)

        asyncio.run(talk())

    command: Callable[..., None] = run
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
