"""`modeldepot validate`: what a server would complain about, before there is one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from server.cli.exits import FINDINGS, NOT_FOUND, Failure, our_errors

if TYPE_CHECKING:
    from repository.folder.validate import Finding


@click.command()
@click.argument("repo", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="One JSON array.")
@click.option("--trust-code", is_flag=True, help="As `serve --trust-code`.")
@click.option("--strict", is_flag=True, help="Warnings count as findings.")
def validate(repo: str, as_json: bool, trust_code: bool, strict: bool) -> None:
    """Check the models in REPO: layout, configs, whole files. No model is run.

    Exits 0 where nothing was found (warnings are shown), 7 otherwise.
    """
    from pathlib import Path

    from repository.folder.validate import validate as look

    if not Path(repo).is_dir():
        raise Failure(f"no folder '{repo}'", NOT_FOUND, "name the folder that holds the models")
    with our_errors():
        found = look(Path(repo), trust_code)
    errors = [f for f in found if strict or not f.warning]
    if as_json:
        import msgspec

        click.echo(msgspec.json.format(msgspec.json.encode([_plain(f) for f in found]), indent=2))
    else:
        for finding in found:
            click.echo(_line(finding))
        warnings = len(found) - len(errors)
        click.echo(f"{_count(len(errors), 'finding')}, {_count(warnings, 'warning')}")
    if errors:
        raise click.exceptions.Exit(FINDINGS)


def _line(finding: Finding) -> str:
    """`digits/config.yaml:3: config: unknown key 'devise' (did you mean 'device'?)`"""
    level = "warning: " if finding.warning else ""
    hint = f" ({finding.hint})" if finding.hint else ""
    return f"{finding.where}: {level}{finding.rule}: {finding.message}{hint}"


def _plain(finding: Finding) -> dict[str, object]:
    path, _, line = finding.where.rpartition(":")
    numbered = bool(path) and line.isdecimal()
    return {
        "path": path if numbered else finding.where,
        "line": int(line) if numbered else None,
        "rule": finding.rule,
        "message": finding.message,
        "hint": finding.hint,
        "version": finding.version,
        "level": "warning" if finding.warning else "error",
    }


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
