"""Where an adapter that somebody names may lie: `src` becomes a folder that may be read.

Relative paths begin in the model's folder. Whatever links do, the folder itself must lie in the model's
folder, the repository, or a root that the server allows; elsewhere is not even looked at. No text
carries an absolute path.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from repository.errors import (
    AdapterRefusedError,
    InvalidRequestError,
    UnsupportedSourceError,
)
from repository.names import inside, shown


class Place(NamedTuple):
    """`path`: real; inside `root`, which is real too. `src`: how people are told of it."""

    path: str
    root: str
    src: str


def find(src: str, model: Path, repository: Path, allowed: Sequence[Path] = ()) -> Place:
    """`src`: a path, or a file:// address. `model`: the model's folder.

    Raises InvalidRequestError for what is no path, UnsupportedSourceError for another address,
    AdapterRefusedError for a place that may not be read, or where no folder is.
    """
    given = _path_of(src)
    roots = [os.path.realpath(root) for root in (repository, *allowed)]
    home = os.path.realpath(model)
    path = os.path.realpath(os.path.join(home, given))
    root = next((root for root in (*roots, home) if inside(root, path)), None)
    if root is None:
        raise AdapterRefusedError(
            "src lies outside of the model's folder, the repository and the server's allowed roots"
        )
    told = _told(path, root, home)
    if not os.path.isdir(path):
        raise AdapterRefusedError(f"there is no folder '{shown(told)}'")
    return Place(path, root, told)


def _path_of(src: str) -> str:
    if "\0" in src or not src:
        raise InvalidRequestError("src must be the path of a folder")
    if src.startswith("file://"):
        host, slash, path = src.removeprefix("file://").partition("/")
        if host not in ("", "localhost") or not slash:
            raise InvalidRequestError("src: a file:// address needs a path of this machine")
        src = unquote(slash + path)
        if "\0" in src:
            raise InvalidRequestError("src must be the path of a folder")
    elif "://" in src:
        raise UnsupportedSourceError("URL adapters are not currently supported")
    return src


def _told(path: str, root: str, home: str) -> str:
    """Relative to the model's folder where that is in the same root; else with the root's name."""
    if inside(root, home):
        return os.path.relpath(path, home)
    return os.path.join(os.path.basename(root), os.path.relpath(path, root))
