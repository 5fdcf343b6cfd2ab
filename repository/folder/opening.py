"""Opens a file that a look at the repository has found, and holds the file itself against the rules.

Between the look and the opening somebody may have put a link in its place: what was opened must still
lie in the repository before a byte of it is read.
"""

from __future__ import annotations

import errno
import os

from repository.names import inside


def open_inside(root: str, path: str) -> int:
    """A descriptor for reading that the caller closes. `root` is a real path.

    Raises OSError; with ELOOP for a file that lies elsewhere. Never waits for a pipe's other end.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not inside(root, os.readlink(f"/proc/self/fd/{fd}")):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    except OSError:
        os.close(fd)
        raise
    return fd
