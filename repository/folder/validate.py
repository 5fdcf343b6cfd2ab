"""All that is wrong in a repository, for `modeldepot validate`."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

from repository.folder.scan import Scanner
from repository.snapshot import Problem

Finding: TypeAlias = Problem


def validate(root: Path, trust_code: bool) -> list[Finding]:
    """Errors and warnings of a whole scan, by place. Models are not loaded, and GPUs not asked for:
    a repository may be validated on another machine than the one that serves it."""
    snapshot = Scanner(root, trust_code=trust_code, gpus=None).scan()
    found = [*snapshot.problems, *(p for m in snapshot.models.values() for p in m.problems)]
    return sorted(found, key=_by_place)


def _by_place(problem: Problem) -> tuple[str, int, str]:
    place, _, line = problem.where.rpartition(":")
    if place and line.isdecimal():
        return place, int(line), problem.message
    return problem.where, 0, problem.message
