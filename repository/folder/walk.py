"""Lists folders: what is in them that counts, with links followed only while they stay inside.

Rules: hidden and temporary files do not exist; whatever vanishes while we look was never there; a
link out of the repository is told and never opened; what cannot be read is told as `io`, so that
nobody takes it for removed. Nothing here knows what a model is.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field

from repository.folder.stamps import stamp
from repository.names import inside, shown
from repository.snapshot import Problem
from repository.spec import FileStamp

MAX_DEPTH = 8  # folders below a model's or version's folder
MAX_ENTRIES = 500_000  # of one scan: links can make a small tree endless

_IGNORED = frozenset({"__pycache__", "lost+found"})
_IGNORED_ENDINGS = ("~", ".swp", ".swo", ".swx", ".pyc")


def ignored(name: str) -> bool:
    """Editors', file systems' and version control's own things; 4913 is vim's test file."""
    return name.startswith(".") or name in _IGNORED or name.endswith(_IGNORED_ENDINGS)


@dataclass(slots=True)
class Listing:
    """One folder. `path` is real, `rel` is how it is named in the repository ("org/m/1").

    files   name -> what stat says of the file (of its target, for a link)
    folders name -> (real path, ctime in ns)
    """

    path: str
    rel: str
    ctime_ns: int = 0
    files: dict[str, os.stat_result] = field(default_factory=dict)
    folders: dict[str, tuple[str, int]] = field(default_factory=dict)


class Lister:
    """Lists the folders of one scan of the repository whose real path is `root`."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._entries_left = MAX_ENTRIES

    def look(self, path: str, rel: str, ctime_ns: int, notes: list[Problem]) -> Listing:
        """What is in it; problems go to `notes`. A folder that is gone is empty.

        Raises OSError for the repository itself: a repository that is gone is not an empty one.
        """
        listing = Listing(path, rel, ctime_ns)
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    if not ignored(entry.name):
                        self._enter(entry, listing, notes)
        except OSError as error:
            if not rel:
                raise
            if not isinstance(error, FileNotFoundError | NotADirectoryError):
                notes.append(_unreadable(rel, error))
        return listing

    def below(self, listing: Listing, name: str, notes: list[Problem]) -> Listing:
        path, ctime_ns = listing.folders[name]
        return self.look(path, f"{listing.rel}/{name}" if listing.rel else name, ctime_ns, notes)

    def stamps(
        self, listing: Listing, prefix: str, notes: list[Problem], depth: int = MAX_DEPTH
    ) -> Iterator[FileStamp]:
        """Every file in it and below; paths begin with `prefix` ("1/" or "")."""
        for name, found in listing.files.items():
            yield stamp(prefix + name, found)
        for name in listing.folders:
            if depth == 0:
                where = shown(f"{listing.rel}/{name}")
                message = f"nested deeper than {MAX_DEPTH} folders"
                notes.append(Problem(where, "layout", message, "move the files up"))
                continue
            sub = self.below(listing, name, notes)
            yield from self.stamps(sub, f"{prefix}{name}/", notes, depth - 1)

    def _enter(self, entry: os.DirEntry[str], listing: Listing, notes: list[Problem]) -> None:
        if not self._within_budget(notes):
            return
        rel = f"{listing.rel}/{entry.name}" if listing.rel else entry.name
        try:
            path = self._resolved(entry, rel, notes) if entry.is_symlink() else entry.path
            if path is None:
                return
            found = entry.stat()
        except FileNotFoundError:
            if entry.is_symlink():
                notes.append(_link(rel, "a link to something that is not there"))
            return
        except OSError as error:
            notes.append(_unreadable(rel, error))
            return
        if stat.S_ISREG(found.st_mode) and entry.name != "4913":
            listing.files[entry.name] = found
        elif stat.S_ISDIR(found.st_mode):
            if inside(path, listing.path):
                notes.append(_link(rel, "a link to a folder that it lies in itself"))
            else:
                listing.folders[entry.name] = (path, found.st_ctime_ns)

    def _resolved(self, entry: os.DirEntry[str], rel: str, notes: list[Problem]) -> str | None:
        """Where a link leads, if that is inside the repository. Elsewhere is not even looked at."""
        path = os.path.realpath(entry.path)
        if inside(self.root, path):
            return path
        hint = "copy what it points to into the repository"
        notes.append(_link(rel, "a link that leads out of the repository; not followed", hint))
        return None

    def _within_budget(self, notes: list[Problem]) -> bool:
        self._entries_left -= 1
        if self._entries_left == -1:
            message = f"there are more than {MAX_ENTRIES} entries; the rest is not looked at"
            notes.append(Problem(".", "io", message, "is there a link to a folder above?"))
        return self._entries_left >= 0


def _link(rel: str, message: str, hint: str = "mend or remove it") -> Problem:
    return Problem(shown(rel, 300), "link", message, hint)


def _unreadable(rel: str, error: OSError) -> Problem:
    reason = os.strerror(error.errno) if error.errno else "it cannot be read"
    return Problem(
        shown(rel, 300), "io", f"cannot be read: {reason}", "let the server's user read it"
    )
