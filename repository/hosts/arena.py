"""Memory that the front and the workers of one host share: large tensors lie there and do not travel.

One memfd for each host. The front alone gives out places; a worker maps the same memory when a frame
first names one. It is SIZE bytes of addresses and no memory at all until a tensor lies there, nobody
maps it before, and it has no name: it ends with the last process that knows of it. It cannot shrink
(sealed), so a worker cannot take memory away from under the front.

Rules: a place is free again when the last view of it has died: whoever can still see the bytes keeps
them, and nobody says when he is done. Places are given from the lowest address that fits, so the same
warm pages are used again. A full arena gives nothing, at once; whoever asked has another way.
Pages that were not used for REST_S go back to the machine.

It must not know frames nor tensors.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import mmap
import os
import weakref
from bisect import bisect
from collections import deque
from typing import Any

import numpy as np

from repository.tensors import Buffer, address

SIZE = 256 << 20
PAGE = mmap.PAGESIZE
REST_S = 5.0
POPULATE_AT_ONCE = 8 << 20  # what lies behind is faulted in as it is written: the loop must go on
_MADV_POPULATE_WRITE = 23  # Linux 5.14
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class _Lot(weakref.ref[Any]):
    """One place given out; its callback comes when the last view of it has died."""

    __slots__ = ("at", "end")
    at: int
    end: int


class Arena:
    """The front's side. All calls come from the event loop's thread; views may die on any."""

    def __init__(self, size: int = SIZE) -> None:
        """Raises OSError."""
        self.size = size
        self._fd = os.memfd_create("modeldepot", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._fd, size)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(self._fd)
            raise
        self._map: mmap.mmap | None = None
        self._base = 0
        self._holes = [(0, size)]  # (at, end), ascending, never touching each other
        self._lots: dict[int, _Lot] = {}  # by where they begin
        self._over: deque[_Lot] = deque()
        self._warm = 0  # pages below it may have memory
        self._peak = 0  # the end of the highest place given out since the last look
        self._timer: asyncio.TimerHandle | None = None

    @property
    def fd(self) -> int:
        """For a worker to map. -1: it is mapped here, or closed, and cannot be handed on any more."""
        return self._fd

    def take(self, size: int, *, populate: bool = True) -> tuple[memoryview, int] | None:
        """`size` bytes (> 0) with anything in them, and where they are: the beginning of a page.
        None: there is no room. `populate` false: it may never be used, so it costs nothing yet."""
        assert size > 0
        if self._over:
            self._collect()
        wanted = -(-size // PAGE) * PAGE
        i = next((i for i, (at, end) in enumerate(self._holes) if end - at >= wanted), None)
        if i is None or (self._map is None and not self._open()):
            return None
        at, end = self._holes[i]
        top = at + wanted
        if top > self._warm:
            if populate and not self._populate(top):
                return None
            self._warm = top
        if end == top:
            del self._holes[i]
        else:
            self._holes[i] = (top, end)
        whole = np.frombuffer(self._map, np.uint8, size, at)  # type: ignore[arg-type]
        lot = _Lot(whole, self._over.append)
        lot.at, lot.end = at, top
        self._lots[at] = lot
        self._peak = max(self._peak, top)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(REST_S, self._look)
        return whole.data, at

    def place_of(self, data: Buffer) -> int | None:
        """Where in the arena `data` lies; None: somewhere else."""
        if self._map is None or not data or type(data) is bytes:
            return None
        at = address(data) - self._base
        return at if 0 <= at <= self.size - len(data) else None

    def rest(self) -> None:
        """Nobody will use it for a while: all pages that nothing lies in go back to the machine."""
        if self._map is None:
            return
        self._collect()
        for at, end in self._holes:
            if at < self._warm:
                with contextlib.suppress(OSError):
                    self._map.madvise(mmap.MADV_REMOVE, at, min(end, self._warm) - at)
        self._warm = max((lot.end for lot in self._lots.values()), default=0)
        self._peak = self._warm

    def close(self) -> None:
        """Nothing is given out any more. The memory goes with the last view of it."""
        self._holes = []
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._map = None
        self._close_fd()

    # pages --------------------------------------------------------------------------------------

    def _open(self) -> bool:
        if self._fd < 0:
            return False
        try:
            self._map = mmap.mmap(self._fd, self.size)  # it keeps a descriptor of its own
        except OSError:
            return False
        self._close_fd()
        self._base = address(memoryview(self._map))
        return True

    def _close_fd(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _populate(self, top: int) -> bool:
        """Memory up to `top`, in one call where the kernel can. False: there is no more."""
        assert self._map is not None
        size = min(top - self._warm, POPULATE_AT_ONCE)
        try:
            self._map.madvise(_MADV_POPULATE_WRITE, self._warm, size)
        except OSError as error:
            if error.errno != errno.EINVAL:
                return False
        return True

    def _collect(self) -> None:
        """Places whose last view has died become holes. Not done in the callback itself: that may
        come on another thread, or in the middle of `take`."""
        holes = self._holes
        while self._over:
            lot = self._over.popleft()
            del self._lots[lot.at]
            at, end = lot.at, lot.end
            i = bisect(holes, (at, end))
            if i < len(holes) and holes[i][0] == end:
                end = holes.pop(i)[1]
            if i and holes[i - 1][1] == at:
                i -= 1
                at = holes.pop(i)[0]
            holes.insert(i, (at, end))

    def _look(self) -> None:
        """Gives back what was not used since the last look, and looks again while there is more."""
        assert self._map is not None
        self._collect()
        peak = self._peak
        self._peak = max((lot.end for lot in self._lots.values()), default=0)
        if peak < self._warm:
            with contextlib.suppress(OSError):
                self._map.madvise(mmap.MADV_REMOVE, peak, self._warm - peak)
            self._warm = peak
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(REST_S, self._look) if self._warm else None


class Window:
    """A worker's side. It maps nothing until something is asked of it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._whole: memoryview | None = None

    def view(self, at: int, size: int) -> memoryview:
        """Raises ValueError for a place that is not in it, OSError."""
        if self._whole is None:
            self._whole = memoryview(mmap.mmap(self._fd, os.fstat(self._fd).st_size))
            os.close(self._fd)
        if at + size > len(self._whole):
            raise ValueError(f"{size} bytes at {at} are not in an arena of {len(self._whole)}")
        return self._whole[at : at + size]
