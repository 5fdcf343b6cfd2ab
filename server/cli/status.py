"""`modeldepot status`: all models in a table, or one with all that is known of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import click

from server.cli.exits import TIMEOUT, UNREACHABLE, USAGE, Failure
from server.cli.options import talks_to_a_server

if TYPE_CHECKING:
    from rich.console import Console

    from server.cli.client import Client

HEAD = ("MODEL", "STATE", "VERSION", "DEVICE", "MEMORY", "RESERVED", "IN FLIGHT", "LAST ERROR")
GENERATIONS = ("GENERATION", "VERSION", "STATE", "WHY", "DEVICE", "MEMORY", "IN FLIGHT", "SERVED")
DEVICES = ("ON", "RESERVED", "MEASURED")
LOOK_S = 3.0  # what is in flight makes no event
TOGETHER_S = 0.2  # events come in groups
STORY = 8  # steps shown of the newest generation
ENDED = ("gone", "failed")


@click.command()
@click.argument("model", required=False)
@click.option("-w", "--watch", is_flag=True, help="Go on showing it until interrupted.")
@click.option("--json", "as_json", is_flag=True, help="As the server says it.")
@talks_to_a_server
async def status(client: Client, model: str | None, watch: bool, as_json: bool) -> None:
    """Show the models of a server, or MODEL with its generations and why it failed."""
    if watch and as_json:
        raise Failure("--watch draws a table; `modeldepot events --json` follows in JSON", USAGE)
    from rich.console import Console

    console = Console()
    if watch:
        await _watch(client, console, model)
    elif as_json:
        found = await client.models() if model is None else await client.model(model)
        _echo_json(found)
    else:
        show(console, await _ask(client, model), whole=model is not None)


async def _ask(client: Client, model: str | None) -> list[dict[str, Any]]:
    return await client.models() if model is None else [await client.model(model)]


def _echo_json(found: Any) -> None:
    import msgspec

    click.echo(msgspec.json.format(msgspec.json.encode(found), indent=2))


def show(console: Console, models: list[dict[str, Any]], *, whole: bool) -> None:
    from server.cli.tables import drawn, plain

    if not models:
        click.echo("no models in the repository")
        return
    rows = [row_of(m) for m in models]
    if console.is_terminal:
        console.print(drawn(HEAD, rows))
    else:
        click.echo("\n".join(plain(HEAD, rows)))
    if whole:
        click.echo("\n".join(details_of(models[0])))


def row_of(model: dict[str, Any]) -> tuple[str, ...]:
    from repository.sizes import human

    alive = [g for g in model["generations"] if g["state"] not in ENDED]
    serving = model["serving_version"]
    versions = [serving] if serving else [g["version"] for g in alive[:1]]
    error = model["last_error"]
    return (
        model["name"],
        _state(model),
        ",".join(str(v) for v in versions),
        ",".join(sorted({g["device"] for g in alive})),
        _memory(model["memory"]),
        human(model["memory"]["reserved"]) if model["memory"]["reserved"] else "",
        str(sum(g["leases"] for g in alive)) if alive else "",
        error["message"] if error else "",
    )


def _state(model: dict[str, Any]) -> str:
    """The public word, and in brackets what stands beside it."""
    beside = [word for word in ("reloading", "asleep", "pinned") if model.get(word)]
    state: str = model["state"]
    return f"{state} ({', '.join(beside)})" if beside else state


def _memory(memory: dict[str, Any]) -> str:
    """What is held; in brackets what would be needed, where nothing is."""
    from repository.sizes import human

    measured = sum(memory["measured"].values())
    held = measured or memory["reserved"]
    if held:
        return human(held)
    return f"({human(memory['estimated'])})" if memory["estimated"] else ""


def details_of(model: dict[str, Any]) -> list[str]:
    from server.cli.tables import plain

    lines: list[str] = _in_memory(model)
    if model.get("problems"):
        lines += ["", "In its folder:"]
        lines += [f"  {_problem(p)}" for p in model["problems"]]
    gens = model["generations"]
    if gens:
        lines += ["", *plain(GENERATIONS, [_generation(g) for g in gens])]
        lines += ["", f"The story of #{gens[0]['serial']}:"]
        lines += [_step(s) for s in gens[0]["story"][-STORY:]]
    return lines


def _in_memory(model: dict[str, Any]) -> list[str]:
    """By device; and what of it is not as it was meant to be."""
    from repository.sizes import human
    from server.cli.tables import plain

    rows = [
        (
            device,
            human(here["reserved"]),
            ", ".join(f"{kind} {human(size)}" for kind, size in here["measured"].items()),
        )
        for device, here in model["memory"].get("devices", {}).items()
    ]
    lines = ["", *plain(DEVICES, rows)] if rows else []
    if model.get("pin_refused"):
        lines += ["", f"It is to be pinned, but is not: {model['pin_refused']}"]
    if model.get("leaked_bytes"):
        lines += ["", f"When it ended last, {human(model['leaked_bytes'])} did not come back."]
    return lines


def _generation(gen: dict[str, Any]) -> tuple[str, ...]:
    numbers = (gen["leases"], gen["served"])
    return (
        f"#{gen['serial']}",
        str(gen["version"]),
        gen["state"],
        gen["trigger"],
        gen["device"],
        _memory(gen["memory"]),
        *map(str, numbers),
    )


def _step(step: dict[str, Any]) -> str:
    return f"  {step['at']}  {step['state']}" + (f"  {step['note']}" if step["note"] else "")


async def _watch(client: Client, console: Console, model: str | None) -> None:
    """Asks again after every event, and now and then. A server that goes away is waited for."""
    changed = asyncio.Event()
    models = await _ask(client, model)
    following = asyncio.create_task(_poke(client, model or "", changed))
    try:
        with _screen(console) as draw:
            draw(models, "")
            while not following.done():
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_S):
                        await changed.wait()
                    await asyncio.sleep(TOGETHER_S)
                changed.clear()
                try:
                    models = await _ask(client, model)
                except Failure as failure:
                    if failure.exit_code not in (UNREACHABLE, TIMEOUT):
                        raise
                    draw(models, failure.message)
                else:
                    draw(models, "")
        await following
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def _poke(client: Client, model: str, changed: asyncio.Event) -> None:
    try:
        async for _ in client.follow(model=model):
            changed.set()
    finally:
        changed.set()  # why it ended is to be seen at once


class _Plain:
    """Not a terminal: rows that changed, one line each."""

    def __init__(self) -> None:
        self._shown: dict[str, str] = {}

    def __call__(self, models: list[dict[str, Any]], trouble: str) -> None:
        from server.cli.tables import plain

        if trouble:
            click.echo(trouble, err=True)
        lines = plain(HEAD, [row_of(m) for m in models])
        for model, line in zip(models, lines[1:], strict=True):
            said = " ".join(line.split())
            if self._shown.get(model["name"]) != said:
                self._shown[model["name"]] = said
                click.echo(line)


@contextmanager
def _screen(console: Console) -> Iterator[Callable[[list[dict[str, Any]], str], None]]:
    if not console.is_terminal:
        yield _Plain()
        return
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from server.cli.tables import drawn

    live = Live(console=console, auto_refresh=False, vertical_overflow="crop")

    def draw(models: list[dict[str, Any]], trouble: str) -> None:
        table = drawn(HEAD, [row_of(m) for m in models])
        live.update(Group(table, Text(trouble, style="red")), refresh=True)

    with live:
        yield draw


def _problem(found: dict[str, Any]) -> str:
    return f"{found['where']}: {found['message']}" + (
        f" ({found['hint']})" if found["hint"] else ""
    )
