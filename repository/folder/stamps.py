"""What a scan notes of a file, and the fingerprint of many.

A fingerprint is made of names, sizes, mtimes in nanoseconds and inodes: any difference counts, also
an older mtime (a rollback by `rsync -a` or tar). Contents are not read. The ctime does not count: a
chmod or a hard link changes it and nothing else.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable

from repository.spec import FileStamp, ModelSpec


def stamp(path: str, found: os.stat_result) -> FileStamp:
    return FileStamp(path, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


def fingerprint(stamps: Iterable[FileStamp]) -> str:
    """32 hex digits. The order of the stamps does not matter."""
    digest = hashlib.sha256()
    for one in sorted(stamps):
        path = one.path.encode("utf-8", "surrogateescape")
        # The length keeps a name from posing as the numbers of its neighbour.
        digest.update(b"%d %s %d %d %d\n" % (len(path), path, one.size, one.mtime_ns, one.inode))
    return digest.hexdigest()[:32]


def with_override(fingerprint: str, override: str) -> str:
    """That of the same files under another config than theirs."""
    if not override:
        return fingerprint
    return hashlib.sha256(f"{fingerprint} {override}".encode()).hexdigest()[:32]


def restat(spec: ModelSpec) -> bool:
    """The spec's files are still as the scan saw them. Asked after a load, in a thread or a worker.

    A file that was added meanwhile is the next scan's to see.
    """
    for seen in spec.files:
        try:
            now = os.stat(spec.folder / seen.path)
        except OSError:
            return False
        same = (now.st_size, now.st_mtime_ns, now.st_ino) == (seen.size, seen.mtime_ns, seen.inode)
        if not same or not stat.S_ISREG(now.st_mode):
            return False
    return True
