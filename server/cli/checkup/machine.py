"""Memory, cores, open files, shared memory and the clock."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from repository.sizes import human
from server.cli.checkup.finding import Finding, fail, ok, warn
from server.settings import Settings

LITTLE = 1 << 30  # bytes of host memory: a framework takes some hundred MiB before its first model
FILES, FEW_FILES = 65_536, 4096  # what the server asks for; too few for clients and workers


def memory(
    settings: Settings,
    proc: Path = Path("/proc"),
    cgroups: Path = Path("/sys/fs/cgroup"),
) -> list[Finding]:
    """The machine's, or the control group's around this process, beside what models may take."""
    from repository.devices.ram import Ram

    name, found = "memory", Ram(proc, cgroups).read()
    whole = Ram(proc, Path("/nonexistent")).read().total
    said = f"{human(found.free)} of {human(found.total)} free"
    if found.total < whole:
        said += f" (limit of the control group; the machine has {human(whole)})"
    budget, tier = settings.memory_budget.get("cpu", 0), settings.host_tier or 0
    if budget + tier > found.total:
        parts = f"--memory-budget cpu={human(budget)} and --host-tier {human(tier)}"
        todo = f"make {parts} fit into it, or raise the limit"
        return [warn(name, f"{said}; models may take {human(budget + tier)}", todo)]
    if found.total < LITTLE:
        return [warn(name, said, "give it 1 GiB at least: each framework takes some hundred MiB")]
    return [ok(name, said)]


def cores(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> list[Finding]:
    """How many the models' threads are counted for."""
    from repository.hosts.threads import cores as count

    mine, every = count(proc, cgroups), os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0))
    said = f"{mine} of the machine's {every}"
    if mine < allowed:
        return [ok("cores", f"{said}: the control group limits the CPU time")]
    return [ok("cores", said)]


def files(
    limits: Callable[[], tuple[int, int]] = lambda: resource.getrlimit(resource.RLIMIT_NOFILE),
) -> list[Finding]:
    """The server raises the soft limit by itself, up to the hard one."""
    _, hard = limits()
    if hard == resource.RLIM_INFINITY or hard >= FILES:
        return [ok("files", f"{FILES} files may be open at once")]
    said = f"{hard} files may be open at once; every client and every worker takes some"
    if hard >= FEW_FILES:
        return [ok("files", said)]
    return [warn("files", said, "raise the hard limit: ulimit -Hn, --ulimit nofile, LimitNOFILE=")]


def shared_memory(make: Callable[[str, int], int] = os.memfd_create) -> list[Finding]:
    """Large tensors lie in an anonymous file; /dev/shm is not used."""
    name = "shared memory"
    try:
        file = make("modeldepot", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        said = f"memfd_create is refused: {error.strerror}"
        return [fail(name, said, "let the container's seccomp profile allow memfd_create")]
    try:
        os.ftruncate(file, 1 << 20)
        os.pwrite(file, b"x", 0)
    except OSError as error:
        todo = "raise the memory limit of the control group"
        return [fail(name, f"none can be had: {error.strerror}", todo)]
    finally:
        os.close(file)
    return [ok(name, "memfd works; /dev/shm is not used")]


def clock(now: Callable[[], float] = time.time, newest: float | None = None) -> list[Finding]:
    """`newest`: when the newest of our own files was written; it cannot be later than now."""
    if newest is None:
        home = Path(__file__).parents[1]
        newest = max(path.stat().st_mtime for path in home.rglob("*.py"))
    said = datetime.fromtimestamp(now(), UTC).isoformat(timespec="seconds")
    if now() + 60 < newest:
        said += f" is before this program was installed ({newest - now():.0f} s)"
        return [
            warn(
                "clock", said, "set the clock: files seem to come from the future, and settle late"
            )
        ]
    return [ok("clock", said)]
