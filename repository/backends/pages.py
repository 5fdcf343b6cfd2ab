"""Which pages of this process's memory are there, and whose: as the kernel tells it.

A span is (address, bytes). Pages of a file that is mapped privately, and that nobody has written to,
are nobody's loss: whoever touches them again gets the same bytes, from the page cache or the disk.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
from collections.abc import Iterable, Iterator
from typing import TypeAlias

Span: TypeAlias = tuple[int, int]

PAGE = mmap.PAGESIZE
ENTRY = 8  # bytes of a page in pagemap; of those only the last is looked at
# Bits of that byte (Documentation/admin-guide/mm/pagemap.rst).
PRESENT, SWAPPED, OF_A_FILE, ALONE = 0x80, 0x40, 0x20, 0x01
READ_AT_ONCE = 1 << 20  # pages
MADV_DONTNEED, MADV_POPULATE_WRITE = 4, 23  # the second since Linux 5.14

_OURS = bytes(int(b & PRESENT > 0 and b & ALONE > 0) for b in range(256))
_CLEAN = bytes(
    int(b & SWAPPED == 0 and (b & PRESENT == 0 or b & OF_A_FILE > 0)) for b in range(256)
)
_RUNS = re.compile(b"\x01+")


def resident(spans: Iterable[Span]) -> int | None:
    """Bytes of them that would come back if this process ended, each page once. None: the kernel does
    not tell."""
    try:
        return PAGE * sum(states.translate(_OURS).count(1) for _, states in _states(merged(spans)))
    except OSError:
        return None


def forget(spans: Iterable[Span]) -> int:
    """Gives the clean pages of mapped files among them back to the machine; how many bytes came back.
    Whatever else lies there stays as it is: pages that were written to, memory of no file."""
    freed = 0
    try:
        mapped = list(_mapped_files())
        for begin, size in merged(spans):
            for low, high in mapped:
                part = max(begin, low), min(begin + size, high)
                if part[0] < part[1]:
                    freed += _forget(part[0], part[1] - part[0])
    except OSError:
        return freed
    return freed


def populate(address: int, size: int) -> None:
    """All pages of an anonymous mapping at once, by whichever thread asks, without the GIL. Where the
    kernel cannot, they come as they are touched."""
    _madvise(address, size, MADV_POPULATE_WRITE)


def trim() -> None:
    """What the allocator keeps of freed memory goes back to the machine. Nothing where the C library
    has no such call."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def merged(spans: Iterable[Span]) -> list[Span]:
    """Whole pages, ascending, none twice."""
    found: list[list[int]] = []
    for begin, size in sorted(span for span in spans if span[1] > 0):
        low, high = begin - begin % PAGE, begin + size + -(begin + size) % PAGE
        if found and low <= found[-1][1]:
            found[-1][1] = max(found[-1][1], high)
        else:
            found.append([low, high])
    return [(low, high - low) for low, high in found]


def _forget(begin: int, size: int) -> int:
    freed = 0
    for at, states in _states([(begin, size)]):
        for run in _RUNS.finditer(states.translate(_CLEAN)):
            low, high = run.span()
            if _madvise(at + low * PAGE, (high - low) * PAGE, MADV_DONTNEED):
                freed += PAGE * states[low:high].translate(_OURS).count(1)
    return freed


def _states(spans: Iterable[Span]) -> Iterator[tuple[int, bytes]]:
    """(address of the first page, the last byte of each page's entry). Raises OSError."""
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for begin, size in spans:
            for first in range(begin // PAGE, (begin + size) // PAGE, READ_AT_ONCE):
                count = min(READ_AT_ONCE, (begin + size) // PAGE - first)
                entries = os.pread(fd, count * ENTRY, first * ENTRY)
                yield first * PAGE, entries[ENTRY - 1 :: ENTRY]
    finally:
        os.close(fd)


def _mapped_files() -> Iterator[tuple[int, int]]:
    """(begin, end) of every private mapping of a file. Raises OSError."""
    with open("/proc/self/maps", "rb") as file:
        for line in file:
            where, rights, _, _, inode, *_ = line.split(maxsplit=5)
            if rights.endswith(b"p") and inode != b"0":
                low, _, high = where.partition(b"-")
                yield int(low, 16), int(high, 16)


def _madvise(address: int, size: int, advice: int) -> bool:
    call = ctypes.CDLL(None, use_errno=True).madvise
    done: int = call(ctypes.c_void_p(address), ctypes.c_size_t(size), advice)
    return done == 0
