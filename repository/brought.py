"""Files that a load in Triton's way brings with it, in place of a whole model's folder.

    <state folder>/brought/<digest of the model's name and its files>/<model>/1/model.onnx

Files are written whole or not at all, and never changed; the repository itself is never written to. The
digest is of their contents, so bringing the same again is the same model. What nobody refers to any
more is swept.

A name of a file comes from a client: it is refused unless it stays below the model's folder by its words
alone, and nothing has been written then. Everything here blocks.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from repository.errors import InvalidRequestError, NoDiskError
from repository.names import shown

HOME = "brought"
MOST_FILES = 1000
DEEPEST = 8  # folders below the model's
LONGEST = 255  # bytes of one segment, as file systems have it


class BroughtFiles:
    """What is held and what is doomed is said by the event loop alone; `digest`, `put`, `listed` and
    `sweep` block, and are for threads."""

    def __init__(self, state_dir: Path) -> None:
        self.home = os.path.realpath(state_dir / HOME)
        self._held: Counter[str] = Counter()  # digests of what is not to go now
        self._doomed: set[str] = set()
        self._disk = threading.Lock()
        self._numbers = itertools.count(1)
        self.used = os.path.isdir(self.home)  # else there is nothing to sweep

    def digest(self, model: str, files: Mapping[str, bytes]) -> str:
        """Raises InvalidRequestError for a name; then nothing has been written."""
        check_files(files)
        return digest_of(model, files)

    def hold(self, digest: str) -> str:
        """The root of these files, which stay until it is let go."""
        self.used = True
        self._held[digest] += 1
        self._doomed.discard(digest)
        return os.path.join(self.home, digest)

    def let_go(self, root: str) -> None:
        """Whoever wanted it refers to it now, or never will."""
        digest = os.path.basename(root)
        self._held[digest] -= 1
        if self._held[digest] <= 0:
            del self._held[digest]

    def put(self, root: str, model: str, files: Mapping[str, bytes]) -> None:
        """The folder of `model` lies in `root` then. It must be held. Raises NoDiskError."""
        with self._disk:
            if not os.path.isdir(root):
                self._write(root, model, files)

    def _write(self, root: str, model: str, files: Mapping[str, bytes]) -> None:
        fresh = f"{root}.{os.getpid()}.{next(self._numbers)}"
        try:
            os.makedirs(self.home, mode=0o700, exist_ok=True)
            for name, content in files.items():
                _write(os.path.join(fresh, model, name), content)
            _sync_folders(fresh)
            with suppress(FileExistsError):  # another has just written the same
                _rename(fresh, root)
            _sync(self.home)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else "an input/output error"
            raise NoDiskError(
                f"the files of '{model}' cannot be kept in the state folder: {reason}"
            ) from error
        finally:
            shutil.rmtree(fresh, ignore_errors=True)

    def listed(self) -> list[str]:
        """All that is there."""
        with suppress(FileNotFoundError):
            return os.listdir(self.home)
        return []

    def doom(self, listed: Iterable[str], keep: Iterable[str]) -> None:
        """All but these roots, and what is held, is to go."""
        kept = {os.path.basename(root) for root in keep} | self._held.keys()
        self._doomed = {name for name in listed if name.partition(".")[0] not in kept}

    def sweep(self) -> None:
        """Removes what is doomed, and still is when its turn comes."""
        with self._disk:
            # What lies aside goes before what it was: the next one's name aside may be the same.
            for name in sorted(self._doomed, reverse=True):
                if name in self._doomed:
                    self._remove(os.path.join(self.home, name))

    def _remove(self, path: str) -> None:
        """Under another name first: half of it must never pass for the whole."""
        aside = f"{path}.{os.getpid()}.{next(self._numbers)}"
        with suppress(OSError):
            os.rename(path, aside)
            shutil.rmtree(aside, ignore_errors=True)

    def root_of(self, folder: str) -> str:
        """The root that `folder` lies in; "" if it is none of these."""
        if not folder.startswith(self.home + os.sep):
            return ""
        return os.path.join(self.home, folder[len(self.home) + 1 :].split(os.sep, 1)[0])


def check_files(files: Mapping[str, bytes]) -> None:
    """Raises InvalidRequestError for names that lead elsewhere, or that cannot all be files."""
    if len(files) > MOST_FILES:
        raise InvalidRequestError(f"the load brings {len(files)} files; at most {MOST_FILES}")
    folders: set[str] = set()
    for name in files:
        why = _refusal(name)
        if why:
            raise InvalidRequestError(f"invalid file name '{shown(name)}': {why}")
        above = name
        while (above := above.rpartition("/")[0]) and above not in folders:
            folders.add(above)
    for name in files:
        if name in folders:
            raise InvalidRequestError(f"'{shown(name)}' is a file and a folder")


def _refusal(name: str) -> str:
    segments = name.split("/")
    if not name.isprintable() or "\\" in name:
        return "it holds characters that no file of a model has"
    if name.startswith("/"):
        return "it is absolute; it must be relative to the model's folder"
    if any(segment in ("", ".", "..") for segment in segments):
        return "it must not hold path traversal characters"
    if any(len(segment.encode()) > LONGEST for segment in segments):
        return f"a part of it has more than {LONGEST} bytes"
    if len(segments) > DEEPEST + 1:
        return f"it is nested deeper than {DEEPEST} folders"
    return ""


def digest_of(model: str, files: Mapping[str, bytes]) -> str:
    """32 hex digits."""
    digest = hashlib.sha256(f"{model}\n".encode())
    for name, content in sorted(files.items()):
        path = name.encode()
        # The lengths keep a name, or a content, from posing as its neighbour.
        digest.update(b"%d %s %d " % (len(path), path, len(content)))
        digest.update(content)
    return digest.hexdigest()[:32]


def _write(path: str, content: bytes) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folders(root: str) -> None:
    for folder, _, _ in os.walk(root):
        _sync(folder)


def _sync(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _rename(fresh: str, root: str) -> None:
    try:
        os.rename(fresh, root)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise FileExistsError(errno.EEXIST, "it is there already") from error
        raise
