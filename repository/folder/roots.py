"""The folders that make one repository: usually one, or several that are looked at together.

A name in two of them is no model that could be loaded. One folder that cannot be read hides its models
and takes nothing away; if none can be read, nobody knows anything.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from repository.folder.layout import Found, Layout
from repository.folder.stamps import fingerprint
from repository.names import check_name
from repository.snapshot import ModelFolder, Problem

TWICE = "model appears in two or more repositories"


class Lying(NamedTuple):
    """One model, and the folder of the repository that it lies in (real)."""

    found: Found
    root: str


@dataclass(slots=True)
class Sight:
    """`models`: by name, wherever they lie. `notes`: what belongs to none."""

    models: dict[str, list[Lying]] = field(default_factory=dict)
    notes: list[Problem] = field(default_factory=list)


class Roots:
    """As given: they may be links that are moved, so they are followed anew each time."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self._devices: dict[Path, int] = {}  # the file systems that models lay on
        self._homes: dict[str, Path] = {}

    def look(self) -> Sight:
        """Raises OSError if none can be listed, or is more than the place where it was mounted."""
        sight = Sight()
        failures: list[OSError] = []
        for path in self.paths:
            try:
                self._look(path, sight)
            except OSError as error:
                failures.append(error)
                sight.notes.append(_unreadable(path, error))
        if len(failures) == len(self.paths):
            raise failures[0]
        return sight

    def _look(self, path: Path, sight: Sight) -> None:
        layout = Layout(os.fspath(path))
        models = list(layout.models())
        self._check_mount(path, layout.root, bool(models))
        sight.notes += layout.notes
        for found in models:
            sight.models.setdefault(found.name, []).append(Lying(found, layout.root))
            self._homes[found.name] = path

    def find(self, name: str) -> list[Lying]:
        """One model, in every folder where it lies. Raises InvalidNameError."""
        check_name(name)
        there: list[Lying] = []
        for path in self.paths:
            layout = Layout(os.fspath(path))
            found = layout.model(name)
            if found is not None:
                there.append(Lying(found, layout.root))
                self._homes[name] = path
        return there

    def home(self, name: str) -> Path:
        """Where the model lies, or lay when it was seen last."""
        return self._homes.get(name, self.paths[0]) / name

    def _check_mount(self, path: Path, root: str, full: bool) -> None:
        """An unmounted folder looks like an empty one, but lies on another file system."""
        device = os.stat(root).st_dev
        if not full and self._devices.get(path, device) != device:
            raise OSError(errno.ENODEV, "it is empty and on another file system than it was")
        if full:
            self._devices[path] = device


def twice(name: str, there: Sequence[Lying]) -> ModelFolder:
    """What lies in several folders: seen, and never loaded. Whatever serves goes on."""
    prints = []
    for found, _ in there:
        stamps = [*found.shared, *(s for own in found.versions.values() for s in own)]
        prints.append(fingerprint(stamps))
    return ModelFolder(
        name=name,
        fingerprint=hashlib.sha256("+".join(prints).encode()).hexdigest()[:32],
        versions=tuple(sorted({v for f, _ in there for v in f.versions}, reverse=True)),
        specs=MappingProxyType({}),
        problems=(Problem(name, "twice", TWICE, "rename or remove one of the folders"),),
        newest_ctime=max(found.newest_ctime_ns for found, _ in there) / 1e9,
    )


def _unreadable(path: Path, error: OSError) -> Problem:
    """Its place is ".": whatever is not seen now may be there."""
    why = error.strerror or "it cannot be read"
    return Problem(
        ".", "io", f"the repository '{path.name}' cannot be read: {why}", "is it mounted?"
    )
