"""`modeldepot load`, `unload`, `reload`: says what is wanted and shows how it comes about.

The server answers when it is done. Meanwhile its events are shown: on a terminal as lines that
change in place, else one line per step, on stderr, so that stdout holds the result alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Protocol

import click

from server.cli.exits import FAILED, USAGE, Failure
from server.cli.options import talks_to_a_server

if TYPE_CHECKING:
    from server.cli.client import Client
    from server.cli.steps import Steps

OPEN_S = 2.0  # for the event stream to open; without it the work goes on unseen
SOURCES = {
    "config": " (as its config says)",
    "measured": " (as measured at an earlier load)",
    "estimate": " (estimated from its files)",
}
BESIDES = {
    "would_wake": "it sleeps, and would be woken",
    "would_wait": "it would have to wait: others are busy, or leaving",
}
LAST_S = 0.5  # for the last event, which may come after the answer


@click.command()
@click.argument("model")
@click.option("--force", is_flag=True, help="Build it anew even if nothing changed.")
@click.option("--dry-run", is_flag=True, help="Only say what would happen.")
@talks_to_a_server
async def load(client: Client, model: str, force: bool, dry_run: bool) -> None:
    """Load MODEL and wait until it serves. If it is loaded already, nothing happens."""
    if dry_run:
        show_dry_run(await client.dry_run(model))
    else:
        answer = await shown(client, model, lambda: client.load(model, force=force))
        click.echo(answer["message"])


@click.command()
@click.argument("model")
@talks_to_a_server
async def reload(client: Client, model: str) -> None:
    """Load MODEL anew, files unchanged or not; what serves now serves until the new one does."""
    answer = await shown(client, model, lambda: client.load(model, force=True))
    click.echo(answer["message"])


@click.command()
@click.argument("model", required=False)
@click.option("--all", "everything", is_flag=True, help="Every model.")
@talks_to_a_server
async def unload(client: Client, model: str | None, everything: bool) -> None:
    """Unload MODEL (or --all of them) and wait until nothing of it runs any more."""
    from repository.sizes import human

    if (model is None) is not everything:
        raise Failure("name one model, or give --all", USAGE)
    if model is not None:
        name = model
        answer = await shown(client, model, lambda: client.unload(name))
        click.echo(f"{answer['message']}; {human(answer.get('freed_bytes', 0))} are free again")
        if leaked := answer.get("leaked_bytes", 0):
            click.echo(f"  {human(leaked)} have not come back from the device", err=True)
        return
    answer = await shown(client, "", client.unload_all)
    errors = answer.get("errors", [])
    click.echo(
        f"{answer['total_unloaded']} models unloaded; "
        f"{human(answer.get('freed_bytes', 0))} are free again"
    )
    for error in errors:
        text = f"{error.get('model')}: {error.get('error')}" if isinstance(error, dict) else error
        click.echo(f"  not unloaded: {text}", err=True)
    if errors:
        raise Failure(f"{len(errors)} models could not be unloaded", FAILED)


def show_dry_run(answer: dict[str, Any]) -> None:
    """What it needs and where, what is free, and what it costs the others; fails where it would not
    load."""
    from repository.sizes import human

    click.echo(answer["message"])
    source = SOURCES.get(answer.get("source", ""), "")
    needs = answer.get("needs") or {answer["device"]: answer["bytes_needed"]}
    told = " and ".join(f"{human(size)} on {device}" for device, size in needs.items())
    click.echo(f"  needs {told}{source}")
    click.echo(f"  free: {human(answer['bytes_free'])} on {answer['device']}")
    if answer["would_evict"]:
        click.echo(f"  would make room: {', '.join(answer['would_evict'])}")
    if answer.get("would_replace"):
        click.echo("  a gap: what serves of it now would leave before the new one has loaded")
    for key, text in BESIDES.items():
        if answer.get(key):
            click.echo(f"  {text}")
    if not answer["would_load"] and answer["bytes_needed"]:  # else it is loaded already
        raise Failure("it would not be loaded", FAILED)


async def shown(
    client: Client, model: str, work: Callable[[], Awaitable[dict[str, Any]]]
) -> dict[str, Any]:
    """The work's answer. It begins once the events are heard, so that its first step is seen."""
    from server.cli.client import checked
    from server.cli.steps import Steps

    if model:
        checked(model)
    steps, opened = Steps(model), asyncio.Event()
    with _screen(steps) as screen:
        watching = asyncio.create_task(_watch(client, steps, screen, opened))
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(OPEN_S):
                    await opened.wait()
            try:
                return await work()
            finally:
                await _last_words(steps, watching)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)


class Screen(Protocol):
    def news(self, line: str) -> None: ...


async def _watch(client: Client, steps: Steps, screen: Screen, opened: asyncio.Event) -> None:
    try:
        async with client.stream() as events:
            opened.set()
            async for event in events:
                line = steps.see(event)
                if line is not None:
                    screen.news(line)
    except Failure:  # no events, no pictures; the work's own answer tells the truth
        pass
    finally:
        opened.set()


async def _last_words(steps: Steps, watching: asyncio.Task[None]) -> None:
    """The step that made the answer possible was published before it, and may yet arrive."""
    loop = asyncio.get_running_loop()
    until = loop.time() + LAST_S
    while steps.rising and loop.time() < until and not watching.done():
        await asyncio.wait([watching], timeout=0.02)


class _Lines:
    def news(self, line: str) -> None:
        click.echo(line, err=True)


class _Nothing:
    """The terminal draws itself from the steps."""

    def news(self, line: str) -> None:
        pass


@contextmanager
def _screen(steps: Steps) -> Iterator[Screen]:
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines()
        return
    from rich.console import Group
    from rich.live import Live
    from rich.spinner import Spinner
    from rich.text import Text

    marks = {"ready": ("✓", "green"), "gone": ("✓", "dim"), "failed": ("✗", "red")}
    waiting = Spinner("dots", text=Text("waiting"))
    spinners: dict[int, Spinner] = {}

    def draw() -> Group:
        now = steps.clock()
        rows: list[Any] = []
        for serial, progress in steps.generations.items():
            mark = marks.get(progress.state)
            line = progress.line(now)
            if mark is None:
                spinner = spinners.setdefault(serial, Spinner("dots"))
                spinner.update(text=Text(line))
                rows.append(spinner)
            else:
                rows.append(Text(f"{mark[0]} {line}", style=mark[1]))
        return Group(*rows) if rows else Group(waiting)

    with Live(get_renderable=draw, console=console, refresh_per_second=10):
        yield _Nothing()
