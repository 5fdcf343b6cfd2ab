"""Paths that people name models by, and folders outside of the repository that became models of it.

A path is what begins with '/' or './' (from the repository on). In the repository it means the model
that lies there; below a root that the server allows it can be *mounted*: the folder is then a model too,
called by its path below that root. Any other path is out of bounds, and whether something lies there is
not even looked at: the words of the path are compared before the disk is asked.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from repository.errors import InvalidRequestError, OutOfBoundsError
from repository.folder.aphrodite import Said
from repository.folder.instead import Instead
from repository.names import check_name, inside

REFUSED = (
    "the path of the model lies outside of the repository and of the server's allowed roots "
    "(--allowed-root); nothing was looked at"
)


class Mount(NamedTuple):
    """A model outside of the repository: its folder is `root`/name. `root`: absolute, as given."""

    root: str
    name: str

    @property
    def path(self) -> str:
        return os.path.join(self.root, self.name)


class Place(NamedTuple):
    """What a path means: the model of this name; `mount`: it lies outside of the repository."""

    name: str
    mount: Mount | None = None


@dataclass(frozen=True)
class ByCall:
    """What people said of single models by call, over what lies in the repository. Replaced whole."""

    overrides: Mapping[str, Said | Instead] = field(default_factory=lambda: MappingProxyType({}))
    mounts: Mapping[str, Mount] = field(default_factory=lambda: MappingProxyType({}))

    def overridden(self, model: str, said: Said | Instead | None) -> ByCall:
        return replace(self, overrides=_with(self.overrides, model, said))

    def mounted(self, model: str, mount: Mount | None) -> ByCall:
        return replace(self, mounts=_with(self.mounts, model, mount))

    def brought(self, model: str) -> Mount | None:
        """Where the files lie that a load brought in place of the model's folder."""
        said = self.overrides.get(model)
        return Mount(said.root, model) if isinstance(said, Instead) and said.root else None


def is_path(text: str) -> bool:
    return text.startswith(("/", "./"))


def place_of(text: str, repository: Path | Sequence[Path], allowed: Sequence[Path] = ()) -> Place:
    """By its words alone: the disk is asked for nothing below the roots. Of several folders that make
    the repository, './' begins in the first.

    Raises OutOfBoundsError, InvalidRequestError for a root itself, InvalidNameError for a path that
    makes no name of a model.
    """
    if "\0" in text:
        raise InvalidRequestError("a path holds a NUL character")
    homes = _all(repository)
    path = os.path.normpath(os.path.join(os.path.abspath(homes[0]), text))
    path = "/" + path.lstrip("/")  # two slashes are a root of their own to POSIX
    for number, root in enumerate((*homes, *allowed)):
        for known in (os.path.abspath(root), os.path.realpath(root)):
            if path == known:
                raise InvalidRequestError(
                    "the path names the repository, or an allowed root, itself; name the folder of "
                    "one model in it"
                )
            if inside(known, path):
                name = check_name(os.path.relpath(path, known))
                elsewhere = number >= len(homes)
                return Place(name, Mount(os.path.abspath(root), name) if elsewhere else None)
    raise OutOfBoundsError(REFUSED)


def check_links(place: Place, repository: Path | Sequence[Path]) -> None:
    """Whatever links do, the folder lies in its root. Raises OutOfBoundsError."""
    for home in (place.mount.root,) if place.mount else _all(repository):
        real = os.path.realpath(os.path.join(home, place.name))
        if not inside(os.path.realpath(home), real):
            raise OutOfBoundsError(REFUSED)


def _all(repository: Path | Sequence[Path]) -> Sequence[Path]:
    return (repository,) if isinstance(repository, Path) else repository


def _with(said: Mapping[str, Any], model: str, word: Any) -> Mapping[str, Any]:
    rest = {name: value for name, value in said.items() if name != model}
    return MappingProxyType(rest if word is None else {**rest, model: word})
