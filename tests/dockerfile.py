"""A Dockerfile as far as ours goes: stages and steps, and which files `.dockerignore` lets through.

Comments, continuation lines, ARG in FROM, JSON and shell forms; no heredocs, no ONBUILD, no escapes but
the backslash at the end of a line.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class Step(NamedTuple):
    word: str  # COPY, RUN, ...
    text: str

    def form(self) -> list[str] | None:
        """The words of the exec form; None: it is written for a shell."""
        try:
            words = json.loads(self.text)
        except ValueError:
            return None
        return words if isinstance(words, list) else None


@dataclass(frozen=True)
class Stage:
    name: str
    base: str  # another stage's name, or an image
    steps: tuple[Step, ...]


def steps_of(text: str) -> Iterator[Step]:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        word, _, rest = line.strip().partition(" ")
        if word:
            yield Step(word.upper(), " ".join(rest.split()))


def stages_of(text: str, **given: str) -> dict[str, Stage]:
    """By name, in their order. `given`: build arguments."""
    found: dict[str, Stage] = {}
    arguments: dict[str, str] = {}
    for step in steps_of(text):
        if step.word == "ARG" and not found:
            name, _, value = step.text.partition("=")
            arguments[name] = given.get(name, value)
        elif step.word == "FROM":
            base, name = re.fullmatch(r"(\S+)(?: AS (\S+))?", step.text).groups()  # type: ignore[union-attr]
            found[name] = Stage(name, filled(base, arguments), ())
        else:
            last = list(found.values())[-1]
            found[last.name] = Stage(last.name, last.base, (*last.steps, step))
    return found


def filled(text: str, values: Mapping[str, str]) -> str:
    return re.sub(r"\$\{(\w+)\}", lambda found: values.get(found[1], ""), text)


def chain_of(stages: Mapping[str, Stage], name: str) -> list[Step]:
    """Every step from the image at the bottom to the end of the stage."""
    stage = stages[name]
    below = chain_of(stages, stage.base) if stage.base in stages else []
    return [*below, *stage.steps]


def environment_of(steps: list[Step], environ: Mapping[str, str]) -> dict[str, str]:
    found = dict(environ)
    for step in steps:
        if step.word == "ENV":
            for pair in shlex.split(step.text):
                name, _, value = pair.partition("=")
                found[name] = filled(value, found)
    return found


def last(steps: list[Step], word: str) -> Step:
    return [step for step in steps if step.word == word][-1]


def copies_of(steps: list[Step]) -> Iterator[tuple[list[str], str]]:
    """Sources and target of each COPY that takes from the context."""
    for step in steps:
        words = step.text.split()
        if step.word == "COPY" and not any(word.startswith("--from=") for word in words):
            *sources, target = [word for word in words if not word.startswith("--")]
            yield sources, target


class Ignore:
    """What `.dockerignore` keeps out: the last pattern that fits a path, or a folder above it, says."""

    def __init__(self, text: str) -> None:
        lines = [line.strip() for line in text.splitlines()]
        self._rules = [
            (_regex(line.lstrip("!").strip("/")), line.startswith("!"))
            for line in lines
            if line and not line.startswith("#")
        ]

    def __call__(self, path: str) -> bool:
        parts = path.split("/")
        above = ["/".join(parts[: n + 1]) for n in range(len(parts))]
        ignored = False
        for pattern, back in self._rules:
            if any(pattern.fullmatch(each) for each in above):
                ignored = not back
        return ignored

    def files(self, home: Path, source: str) -> Iterator[str]:
        """Those that `COPY source` takes, relative to the context."""
        top = home / source
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            relative = path.relative_to(home).as_posix()
            if path.is_file() and not self(relative):
                yield relative


def _regex(pattern: str) -> re.Pattern[str]:
    out = ""
    for piece in re.split(r"(\*\*/|\*\*|\*|\?)", pattern):
        out += {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(
            piece, re.escape(piece)
        )
    return re.compile(out)
