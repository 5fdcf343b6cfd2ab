"""Which file system a path is on, as the kernel lists them in /proc/self/mountinfo."""

from __future__ import annotations

import re
from pathlib import Path

MOUNTINFO = Path("/proc/self/mountinfo")
# Other machines, or the host of a virtual one, may change what lies there, and the kernel here is not
# told of it; nor are their locks all that SQLite's log needs.
NETWORK = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "virtiofs", "vboxsf", "ceph", "lustre", "beegfs",
     "gpfs", "glusterfs", "afs", "fakeowner", "osxfs"}
)  # fmt: skip


def kind_of(path: Path, mountinfo: Path = MOUNTINFO) -> str:
    """ "ext4", "nfs4", "overlay"; "" where the kernel does not tell. `path` need not exist."""
    try:
        lines = mountinfo.read_text().splitlines()
    except OSError:
        return ""
    where, found = path.resolve(), ("", "")
    for line in lines:
        before, _, after = line.partition(" - ")
        point = _plain(before.split()[4])
        # The last of several on one place is the one that is seen.
        if where.is_relative_to(point) and len(point) >= len(found[0]):
            found = point, after.split()[0]
    return found[1]


def is_network(kind: str) -> bool:
    """A FUSE file system counts: most of those that hold models fetch them from elsewhere."""
    return kind in NETWORK or kind.startswith("fuse.")


def _plain(point: str) -> str:
    """Blanks and the like are octal there."""
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), point)
