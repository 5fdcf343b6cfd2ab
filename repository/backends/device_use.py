"""What this process has on its GPU, as the driver counts it: a framework knows only of its own tensors.

    use = DeviceUse(1, Gpus.of_this_process())
    use.before()             # nothing of ours is on the device yet
    ...                      # the first thing that makes a context
    use.after(reserved)      # which of the driver's processes we are
    use.bytes(reserved)      # context included

The driver names processes by the machine's pids, which in a container are not those that we see. So we
are whoever has come since `before`; where that is not one alone, the growth of the device meanwhile is
taken as the context's size, once, as far as it can be one: another model that loads meanwhile makes the
device grow too. It must not import a framework.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from repository.devices.nvml import Gpus
from repository.reports import GpuProcess

CONTEXT = 512 << 20  # bytes; about what one takes, where it could not be measured
MOST_CONTEXT = 2 << 30  # what is more is somebody else's


class _Room(Protocol):
    @property
    def total(self) -> int: ...
    @property
    def free(self) -> int: ...


class Watched(Protocol):
    """What is used of `devices.nvml.Gpus`; indices as CUDA counts in this process."""

    @property
    def count(self) -> int: ...
    def read(self, index: int) -> _Room | None: ...
    def processes(self, index: int) -> Sequence[GpuProcess]: ...


class DeviceUse:
    """Of one process on one GPU. `gpus`: None where nothing can be asked."""

    def __init__(self, index: int, gpus: Watched | None) -> None:
        self._index = index
        self._gpus = gpus if gpus is not None and index < gpus.count else None
        self._others: frozenset[int] = frozenset()
        self._used: int | None = None
        self._pid: int | None = None
        self._context = 0

    @classmethod
    def of(cls, device: str) -> DeviceUse:
        """`device`: "cuda:N"."""
        return cls(int(device.partition(":")[2] or 0), Gpus.of_this_process())

    def before(self) -> None:
        if self._gpus is not None:
            self._others = frozenset(one.pid for one in self._gpus.processes(self._index))
            self._used = self._device_used()

    def after(self, reserved: int, *, model: int | None = 0) -> None:
        """`reserved`: bytes that the framework says that it has taken meanwhile. `model`: about what it
        has taken without a word; None: nobody knows, so all of the growth is ours."""
        if self._gpus is None:
            return
        pids = {one.pid for one in self._gpus.processes(self._index)}
        new = pids - self._others
        if os.getpid() in new:
            self._pid = os.getpid()
        elif len(new) == 1:
            (self._pid,) = new
        self._context = max(0, self._grew(self._used) - reserved - (model or 0))
        if model is not None and self._context > model + MOST_CONTEXT:
            self._context = CONTEXT

    def bytes(self, reserved: int, *, model: int = 0) -> int:
        """All of this process on the device, as far as it can be told; never less than `reserved`.
        `model`: what it has now of what `after` was told."""
        listed = self._listed()
        if listed is not None:
            return max(listed, reserved)
        return reserved + model + self._context

    @contextmanager
    def giving_back(self) -> Iterator[None]:
        """Around what gives memory back, or takes it again, without saying how much."""
        before = self._device_used()
        yield
        self._context = max(0, self._context + self._grew(before))

    def _listed(self) -> int | None:
        if self._gpus is None or self._pid is None:
            return None
        for one in self._gpus.processes(self._index):
            if one.pid == self._pid:
                return one.used
        return None

    def _grew(self, before: int | None) -> int:
        """Nothing, where one of the two could not be read."""
        now = self._device_used()
        return 0 if now is None or before is None else now - before

    def _device_used(self) -> int | None:
        found = self._gpus.read(self._index) if self._gpus is not None else None
        return found.total - found.free if found is not None else None
