"""Private copies of model files, so that an overwrite in place cannot change or kill a live model.

A file that is mapped changes under the model when somebody writes into it, and a truncation kills
the process; a hard link is the same file. So what will be mapped (ONNX external data), or may be
read later (the folder of a python model), is copied first: by reflink where the file system can,
else byte by byte. Large weights (safetensors) are never copied byte by byte: without reflink their
backend reads them into memory of its own. Copies lie in
`<state_dir>/snapshots/<pid>-<start time>-<n>`, are made by the worker, removed by the host, and
swept at the next start if the server was killed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from repository import linux
from repository.errors import IncompleteFilesError, LoadFailedError, NoDiskError

Policy: TypeAlias = Literal["external", "folder", "weights", "none"]
Kind: TypeAlias = Literal["snapshots", "scratch"]  # scratch: what a server's workers put aside
FOLDER_LIMIT = 256 << 20  # bytes up to which a whole folder is copied
FICLONE = 0x40049409
CHUNK = 64 << 20

_numbers = itertools.count(1)


# the server's side ------------------------------------------------------------------------------


def fresh(state_dir: Path, kind: Kind = "snapshots") -> Path:
    """A name that no other snapshot has. Its parent exists afterwards, it does not."""
    home = state_dir / kind
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    pid = os.getpid()
    return home / f"{pid}-{linux.started_at(pid)}-{next(_numbers)}"


def remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)


def sweep(state_dir: Path) -> int:
    """Removes what servers that are gone have left; how many."""
    swept = 0
    for path in [path for kind in get_args(Kind) for path in (state_dir / kind).glob("*")]:
        pid, _, rest = path.name.partition("-")
        began = rest.partition("-")[0]
        if pid.isdigit() and began.isdigit() and linux.started_at(int(pid)) != int(began):
            remove(path)
            swept += 1
    return swept


# the worker's side ------------------------------------------------------------------------------


def prepare(policy: Policy, path: Path, model_file: str, target: Path) -> Path:
    """Where to load from: `path` itself, or `target`, which now holds a copy of what is needed.

    Raises IncompleteFilesError, NoDiskError.
    """
    try:
        if policy == "external":
            return _with_external_data(path, model_file, target)
        if policy == "folder":
            return _whole_folder(path, target)
        if policy == "weights":
            return _reflinked_folder(path, target)
    except FileNotFoundError as error:
        raise IncompleteFilesError(f"{error.filename} is missing") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise NoDiskError(
            f"the state folder has no room for a private copy of the model's files "
            f"({error.strerror}); free some there, or name a larger one with --state-dir"
        ) from error
    return path


def _with_external_data(path: Path, model_file: str, target: Path) -> Path:
    from repository.folder.onnx_files import external_files

    needed = external_files(path / model_file)
    if not needed:
        return path
    base = (path / model_file).parent
    ends: dict[str, int] = {}
    for location, offset, length in needed:
        ends[location] = max(ends.get(location, 0), offset + length)
    for location, end in ends.items():
        _check_data(base, location, end)
    target.mkdir(mode=0o700)
    for name in (model_file, *(str(Path(model_file).parent / each) for each in ends)):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        clone(path / name, target / name)
    return target


def _check_data(base: Path, location: str, end: int) -> None:
    """External data is relative, inside, no link anywhere on the way, and long enough."""
    relative = Path(location)
    if not location or relative.is_absolute() or ".." in relative.parts:
        raise LoadFailedError(
            f"the model's external data '{location}' lies outside the model's folder"
        )
    at = base
    for part in relative.parts:
        at = at / part
        try:
            found = at.lstat()
        except (FileNotFoundError, NotADirectoryError):
            raise IncompleteFilesError(f"the external data file '{location}' is missing") from None
        if stat.S_ISLNK(found.st_mode):
            raise LoadFailedError(
                f"the external data '{location}' is a symbolic link; put the file itself there"
            )
    if not stat.S_ISREG(found.st_mode):
        raise LoadFailedError(f"the external data '{location}' is not a plain file")
    if found.st_size < end:
        raise IncompleteFilesError(
            f"the external data file '{location}' holds {found.st_size} bytes; "
            f"the model needs {end}"
        )


def _whole_folder(path: Path, target: Path) -> Path:
    files = list(_files(path))
    if sum(found.stat().st_size for found in files) > FOLDER_LIMIT:
        return path
    home = path.resolve()
    target.mkdir(mode=0o700)
    for found in files:
        if found.is_symlink() and not found.resolve().is_relative_to(home):
            raise LoadFailedError(
                f"'{found.relative_to(path)}' links to a file outside the model's folder"
            )
        copy = target / found.relative_to(path)
        copy.parent.mkdir(parents=True, exist_ok=True)
        clone(found, copy)
    return target


def _reflinked_folder(path: Path, target: Path) -> Path:
    """`target`, all of it on the same blocks as `path`, which costs nothing; or `path`, where that
    cannot be: then nobody may map what lies there."""
    home = path.resolve()
    try:
        # Adapters are added and removed while the model is served, and read when they are needed.
        files = [f for f in _files(path) if f.relative_to(path).parts[0] != "adapters"]
    except LoadFailedError:  # a linked folder: the scan has let it pass, so it is read where it is
        return path
    if any(f.is_symlink() and not f.resolve().is_relative_to(home) for f in files):
        return path
    target.mkdir(mode=0o700)
    for found in files:
        copy = target / found.relative_to(path)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not _reflink(found, copy):
            shutil.rmtree(target)
            return path
    return target


def _files(path: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(path):
        # Bytecode beside a source may be stale or foreign: it is compiled anew.
        folders[:] = [name for name in folders if name != "__pycache__"]
        for name in names:
            yield Path(folder, name)
        for name in folders:
            if Path(folder, name).is_symlink():
                raise LoadFailedError(
                    f"'{name}' is a link to a folder; put the folder itself there"
                )


def _reflink(source: Path, target: Path) -> bool:
    """False: another file system, or one that cannot; then `target` is empty."""
    with source.open("rb") as old, target.open("xb") as new:
        try:
            fcntl.ioctl(new.fileno(), FICLONE, old.fileno())
        except OSError:
            return False
        return True


def clone(source: Path, target: Path) -> None:
    """The same bytes, on blocks of their own as soon as either side is written."""
    if _reflink(source, target):
        return
    with source.open("rb") as old, target.open("r+b") as new:
        try:
            while os.copy_file_range(old.fileno(), new.fileno(), CHUNK):
                pass
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            shutil.copyfileobj(old, new, 1 << 20)
