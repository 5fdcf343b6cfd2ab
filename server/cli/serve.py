"""`modeldepot serve`: its flags are the settings' table, one flag a row."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click

from server.cli.exits import our_errors
from server.cli.triton_flags import translated
from server.settings import ENV, FIELDS, Settings


def flags(*, hidden: bool = False) -> list[click.Parameter]:
    """`hidden`: taken, and left out of --help."""
    kinds, defaults = get_type_hints(Settings), Settings()
    found = [_flag(n, kinds[n], getattr(defaults, n)) for n in FIELDS if n != "repo"]
    for each in found:
        each.hidden = hidden
    return [*found]


def _flag(name: str, kind: Any, default: Any) -> click.Option:
    """No default and no reading here: the settings do both, for every source alike."""
    flag = "--" + name.replace("_", "-")
    text = f"{FIELDS[name].help}  [{_default(default)}; {ENV}{name.upper()}]"
    if kind is bool:
        return click.Option([f"{flag}/--no-{flag[2:]}"], default=None, help=text)
    words = [name, flag, *(f"--{other}" for other in FIELDS[name].also)]
    if get_origin(kind) is Literal:
        choice = click.Choice(get_args(kind))
        return click.Option(words, type=choice, default=None, help=text)
    many = get_origin(kind) is tuple
    return click.Option(words, multiple=many, metavar=_metavar(name, kind), help=text)


def _default(value: Any) -> str:
    if value is None or value in ((), {}):
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _metavar(name: str, kind: Any) -> str:
    if kind is int:
        return "N"
    if kind is float:
        return "SECONDS"
    return "PATH" if kind in (Path, Path | None) else name.upper()


def _serve(repo: str | None, config: str | None, print_config: bool, **flags: Any) -> None:
    """Serve the models in REPO until SIGTERM or Ctrl-C.

    Flag > MODELDEPOT_* variable > --config file > default.
    """
    from server.settings import lines_of, resolve

    with our_errors():
        found = resolve({"repo": repo, **flags}, os.environ, Path(config) if config else None)
    if print_config:
        for line in lines_of(found):
            click.echo(line)
        return
    from server.run import serve as run

    code = run(found.settings, unused=click.get_current_context().meta.get(UNUSED, ()))
    if code:
        raise click.exceptions.Exit(code)


UNUSED = "modeldepot.unused"


class Serve(click.Command):
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if ctx.resilient_parsing:  # a shell completes a line that is not whole yet
            return super().parse_args(ctx, args)
        read = translated(args)
        ctx.meta[UNUSED] = tuple(read.unused)
        return super().parse_args(ctx, read.args)


serve = Serve(
    "serve",
    callback=_serve,
    help=_serve.__doc__,
    params=[
        click.Argument(["repo"], required=False, metavar="REPO"),
        click.Option(
            ["--config"], envvar=f"{ENV}CONFIG", metavar="FILE", help="A YAML file of settings."
        ),
        click.Option(
            ["--print-config"], is_flag=True, help="Show each setting and its source, and exit."
        ),
        *flags(),
    ],
)
