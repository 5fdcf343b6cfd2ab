"""How many compute threads one worker gets: the only place that says so.

By default the cores that this server may use, divided among the instances of the model, at least 1
and at most MOST. Other models do not count: most of them are idle at any moment, and pools that do
not spin lose little where they are not (docs/decisions/0015-threads.md has the figures). A model's
own `options.threads` goes before everything, then what the server was told.

Cores are those of the process's affinity, or fewer where a control group limits its CPU time: a
container that may use two of 64 cores must not start 64 threads.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from repository.config import ModelConfig

MOST = 16  # few graphs gain from more
PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def threads_for(config: ModelConfig, instances: int, told: int | None = None) -> int:
    """`told`: what the server was started with, for every worker."""
    own = config.options.get("threads")
    if isinstance(own, int) and not isinstance(own, bool) and own > 0:
        return own
    return told or max(1, min(cores() // max(1, instances), MOST))


def cores(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Whole cores, at least 1."""
    count = float(len(os.sched_getaffinity(0)))
    return max(1, int(min([count, *_limits(proc, cgroups)])))


def _limits(proc: Path, cgroups: Path) -> Iterator[float]:
    """Cores of every group around this process that has a limit. Both versions of control groups."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        # In a container the group may have its outer name here; its own group is then the root.
        parts = [part for part in group.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            if controllers == "":
                yield from _quota(cgroups.joinpath(*parts[:depth]) / "cpu.max")
            elif "cpu" in controllers.split(","):
                folder = cgroups.joinpath("cpu", *parts[:depth])
                yield from _quota(folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us")


def _quota(*files: Path) -> Iterator[float]:
    """Quota and period, in one file or two. Nothing where there is no file, or no limit in it."""
    try:
        words = " ".join(file.read_text() for file in files).split()
    except OSError:
        return
    if len(words) == 2 and all(word.isdigit() and int(word) for word in words):
        yield int(words[0]) / int(words[1])
