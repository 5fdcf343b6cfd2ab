"""A file as one piece of memory: what is judged and what is loaded are then the same bytes."""

from __future__ import annotations

import os
from pathlib import Path

from repository.errors import FilesChangedError, IncompleteFilesError


def read_whole(path: Path) -> bytes:
    """Raises IncompleteFilesError (it is missing or empty), FilesChangedError (it was written to
    meanwhile)."""
    try:
        with path.open("rb") as file:
            before = _stamp(os.fstat(file.fileno()))
            data = file.read(before[0])
            after = (_stamp(os.fstat(file.fileno())), _stamp(path.stat()))
    except FileNotFoundError as error:
        raise IncompleteFilesError(f"{path.name} is missing") from error
    if not data:
        raise IncompleteFilesError(f"{path.name} is empty")
    if len(data) < before[0] or after != (before, before):
        raise FilesChangedError(f"{path.name} was changed while it was being read")
    return data


def check_there(path: Path) -> None:
    """Raises IncompleteFilesError as `read_whole` does, without reading."""
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise IncompleteFilesError(f"{path.name} is missing") from error
    if not size:
        raise IncompleteFilesError(f"{path.name} is empty")


def _stamp(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_size, found.st_mtime_ns, found.st_ino
