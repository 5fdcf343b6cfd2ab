"""Host memory, as much of it as this process may have.

In a container /proc/meminfo tells of the whole machine; the limit is the control group's, or that
of any group around it. Both versions of control groups are read, each level on its own, as every
ancestor can be the one that is tight. Memory that the kernel would give back at once (inactive file
cache) counts as free. It must not know what the memory is for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class Memory(NamedTuple):
    """Bytes. 0 <= free <= total. What is not free is used, by whomever."""

    total: int
    free: int


class _Layout(NamedTuple):
    """Where a version of control groups keeps its figures."""

    limits: tuple[str, ...]
    usage: str
    reclaimable: str  # a line of memory.stat


V1 = _Layout(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")
# Past `high` nobody is killed, but everybody is slowed down until nothing works: it is a limit too.
V2 = _Layout(("memory.max", "memory.high"), "memory.current", "inactive_file")


@dataclass(frozen=True, slots=True)
class Ram:
    """`proc`, `cgroups`: where those file systems are mounted."""

    proc: Path = Path("/proc")
    cgroups: Path = Path("/sys/fs/cgroup")

    def read(self) -> Memory:
        """Measured now. Raises OSError where there is no /proc/meminfo (not Linux)."""
        meminfo = _pairs(self.proc / "meminfo")
        total = meminfo["MemTotal:"] * 1024
        free = meminfo.get("MemAvailable:", meminfo.get("MemFree:", 0)) * 1024
        for limit, used in self._groups():
            total = min(total, limit)
            free = min(free, limit - used)
        return Memory(total, max(0, min(free, total)))

    def _groups(self) -> Iterator[tuple[int, int]]:
        """Limit and use of every group around this process that has a limit."""
        try:
            lines = (self.proc / "self" / "cgroup").read_text().splitlines()
        except OSError:
            return
        for line in lines:
            _, _, rest = line.partition(":")
            controllers, _, group = rest.partition(":")
            if controllers == "":
                # Beside version 1, version 2 is mounted one deeper and has no memory in it.
                yield from _levels(self.cgroups, group, V2)
            elif "memory" in controllers.split(","):
                yield from _levels(self.cgroups / "memory", group, V1)


def _levels(mount: Path, group: str, layout: _Layout) -> Iterator[tuple[int, int]]:
    """From the process's own group to the root, as far as they can be seen from here.

    In a container the group's name may be the one outside, which is not mounted inside; the mounted
    root is then the container's own group.
    """
    parts = [part for part in group.split("/") if part not in ("", "..")]
    for depth in range(len(parts), -1, -1):
        folder = mount.joinpath(*parts[:depth])
        limits = [n for name in layout.limits if (n := _number(folder / name)) is not None]
        if limits:
            used = _number(folder / layout.usage) or 0
            with suppress(OSError):
                used -= _pairs(folder / "memory.stat").get(layout.reclaimable, 0)
            yield min(limits), max(0, used)


def _number(path: Path) -> int | None:
    """None where there is no such file, or it says "max"."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _pairs(path: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for line in path.read_text().splitlines():
        words = line.split()
        if len(words) >= 2 and words[1].isdigit():
            found[words[0]] = int(words[1])
    return found
