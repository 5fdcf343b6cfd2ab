"""The repository, the state folder, and how changes in the first are seen."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from repository.sizes import human
from server.cli.checkup.finding import Finding, fail, ok, warn
from server.cli.checkup.mounts import MOUNTINFO, is_network, kind_of
from server.settings import Settings

LITTLE, TOO_LITTLE = 1 << 30, 32 << 20  # bytes free in the state folder
SKEW_S = 2.0  # by which a file system's clock may differ from ours
LOCK = "journal.lock"


def repository(settings: Settings, mountinfo: Path = MOUNTINFO) -> list[Finding]:
    """Whether its folders can be read, and what a scan says of the models."""
    from repository.folder.scan import Scanner

    name, roots = "repository", (settings.repo, *settings.model_repository)
    for root in roots:
        if not root.is_dir():
            return [fail(name, f"no folder '{root}'", "create it, or name your own: serve REPO")]
    root = roots[0]
    try:
        found = Scanner(
            roots,
            trust_code=settings.trust_code,
            gpus=None,
            config_name=settings.model_config_name or "",
            completes=not settings.disable_auto_complete_config,
            caches=bool(settings.response_cache_size),
        ).scan()
    except OSError as error:
        todo = f"let user id {os.geteuid()} list and read it"
        return [fail(name, f"'{root}' cannot be read: {error.strerror}", todo)]
    problems = [*found.problems, *(p for m in found.models.values() for p in m.errors)]
    told = ", ".join(map(str, roots))
    said = f"{told}: {_count(len(found.models), 'model')} on {kind_of(root, mountinfo) or 'a disk'}"
    if problems:
        said += f", {_count(len(problems), 'problem')}; the first: {problems[0]}"
        return [warn(name, said, f"see all of them: modeldepot validate {root}")]
    if not found.models:
        return [warn(name, said, "put model folders there; `modeldepot init` makes one")]
    return [ok(name, said)]


def watching(
    settings: Settings, proc: Path = Path("/proc"), mountinfo: Path = MOUNTINFO
) -> list[Finding]:
    """Whether inotify can tell of changes there, with a watch for each folder."""
    name, roots = "watch", [settings.repo, *settings.model_repository]
    if settings.watch != "notify":
        how = {"poll": f"by looking every {settings.poll_secs:g} s", "off": "not at all"}
        return [ok(name, f"changes of files are seen {how[settings.watch]}")]
    roots = [root for root in roots if root.is_dir()]
    if not roots:
        return [ok(name, "nothing to watch")]
    for root in roots:
        kind = kind_of(root, mountinfo)
        if is_network(kind):
            said = f"{root} is on {kind}: inotify does not tell of what other machines change there"
            return [warn(name, said, "start with --watch poll")]
        if kind == "overlay":
            said = f"{root} is on overlay: what is changed in a layer beneath it is not told of"
            return [warn(name, said, "mount the models as a volume, or start with --watch poll")]
    return [_limits(name, sum(1 for root in roots for _ in os.walk(root)), proc)]


def _limits(name: str, folders: int, proc: Path) -> Finding:
    used, instances = in_use(proc)
    limits = proc / "sys/fs/inotify"
    watches, most = _number(limits / "max_user_watches"), _number(limits / "max_user_instances")
    said = f"{_count(folders, 'folder')}; {used} of {watches} inotify watches are in use"
    poll = "or start with --watch poll; without inotify the server looks every --poll-secs"
    if watches is None or most is None:
        return warn(name, "the kernel does not tell its inotify limits", "start with --watch poll")
    if used + folders > watches:
        todo = f"sysctl fs.inotify.max_user_watches={_rounded(used + folders)}, {poll}"
        return warn(name, said, todo)
    if instances + 1 > most:
        said = f"all {most} inotify instances of this user are in use"
        return warn(name, said, f"sysctl fs.inotify.max_user_instances={2 * most}, {poll}")
    return ok(name, said)


def in_use(proc: Path = Path("/proc")) -> tuple[int, int]:
    """inotify's watches and instances of this user, as far as /proc shows them."""
    watches = instances = 0
    for folder in _processes(proc):
        with suppress(OSError):  # it has ended, or is not ours to look at
            for link in (folder / "fd").iterdir():
                if os.readlink(link) == "anon_inode:inotify":
                    instances += 1
                    text = (folder / "fdinfo" / link.name).read_text()
                    watches += text.count("inotify wd:")
    return watches, instances


def _processes(proc: Path) -> Iterator[Path]:
    for folder in proc.iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                if folder.stat().st_uid == os.geteuid():
                    yield folder


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _rounded(wanted: int) -> int:
    """The next power of two with as much again to spare."""
    return 1 << (2 * wanted - 1).bit_length()


def state(
    settings: Settings,
    mountinfo: Path = MOUNTINFO,
    free: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free,
    clock: Callable[[], float] = time.time,
) -> list[Finding]:
    """Whether it can be written, is on a disk of this machine, has room, and whose it is."""
    name, folder = "state", settings.state_dir
    assert folder is not None, "resolve() gives one"
    there = next(p for p in (folder, *folder.parents) if p.exists())
    mend = f"let user id {os.geteuid()} write there, or name another folder with --state-dir"
    if not there.is_dir():
        return [fail(name, f"'{there}' is no folder", "name another with --state-dir")]
    if there != folder and not os.access(there, os.W_OK | os.X_OK):
        return [fail(name, f"'{folder}' cannot be made in '{there}'", mend)]
    found: list[Finding] = []
    if there == folder:
        try:
            skew_s = _write(folder, clock)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            todo = "free some room there, or name another folder with --state-dir" if full else mend
            return [fail(name, f"'{folder}' cannot be written: {error.strerror}", todo)]
        if skew_s > SKEW_S:
            said = f"the clock of the file system of '{folder}' is {skew_s:.0f} s off"
            found.append(warn(name, said, "set both clocks by one time server"))
    kind = kind_of(there, mountinfo)
    if is_network(kind):
        said = f"'{folder}' is on {kind}; SQLite's log is safe on a disk of this machine alone"
        found.append(warn(name, said, "name a local folder with --state-dir, one for each server"))
    found.append(_room(name, folder, free(there)))
    return [*found, *_copies(settings, there), *_owner(folder)]


def _write(folder: Path, clock: Callable[[], float]) -> float:
    """Writes what a journal would, down to the disk, and removes it; how far the clocks differ."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
        file.write(bytes(4096))
        file.flush()
        os.fsync(file.fileno())
        return abs(os.fstat(file.fileno()).st_mtime - clock())


def _room(name: str, folder: Path, left: int) -> Finding:
    said = f"{folder}: {human(left)} free"
    if left >= LITTLE:
        return ok(name, said)
    todo = "private copies of model files lie there while they serve: free some room"
    return (fail if left < TOO_LITTLE else warn)(name, said, todo)


def _copies(settings: Settings, where: Path) -> list[Finding]:
    """How private copies of model files come about: for nothing (reflink), or byte by byte."""
    sample = next(_files(settings.repo), None) if settings.repo.is_dir() else None
    if sample is None or not os.access(where, os.W_OK):
        return []
    if _reflinks(sample, where):
        return [ok("copies", "private copies of model files cost nothing (reflink)")]
    said = (
        "private copies are made byte by byte: no reflink from the repository to the state folder"
    )
    return [ok("copies", f"{said} (XFS and Btrfs can, with both on one)")]


def _files(root: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(root):
        for each in names:
            path = Path(folder, each)
            if path.is_file() and path.stat().st_size and os.access(path, os.R_OK):
                yield path


def _reflinks(sample: Path, where: Path) -> bool:
    from repository.hosts.snapshots import FICLONE

    try:
        with sample.open("rb") as old, tempfile.NamedTemporaryFile(dir=where) as new:
            fcntl.ioctl(new.fileno(), FICLONE, old.fileno())
    except OSError:
        return False
    return True


def _owner(folder: Path) -> list[Finding]:
    """Which server has it, if one runs: no second one may start with it."""
    try:
        with (folder / LOCK).open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                who = file.read(20).decode(errors="replace").strip()
                return [ok("state", f"in use by the server with pid {who or '?'}")]
    except OSError:
        pass
    return []


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
