"""The few calls to Linux that Python has no name for, and what the kernel says of processes."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
PR_SET_CHILD_SUBREAPER = 36


def prctl(option: int, value: int | bytes) -> None:
    """Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    argument = ctypes.c_char_p(value) if isinstance(value, bytes) else ctypes.c_ulong(value)
    if libc.prctl(option, argument, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def die_with_parent(parent: int, signum: int) -> None:
    """`signum` comes when the process `parent` ends. If it has ended already, exits now."""
    prctl(PR_SET_PDEATHSIG, signum)
    if os.getppid() != parent:
        os._exit(1)


def adopt_orphans() -> None:
    """Whatever is started below this process and loses its parent becomes a child of this one,
    also what has left its process group and session."""
    with contextlib.suppress(OSError):
        prctl(PR_SET_CHILD_SUBREAPER, 1)


def children() -> list[int]:
    """Of this process's first thread, zombies too. Empty where the kernel does not tell."""
    pid = os.getpid()
    try:
        with open(f"/proc/{pid}/task/{pid}/children", "rb") as file:
            return [int(child) for child in file.read().split()]
    except OSError:
        return []


def name_process(name: str) -> None:
    """As ps and top show it; the kernel keeps 15 bytes."""
    with contextlib.suppress(OSError):
        prctl(PR_SET_NAME, name.encode()[:15])


def offer_to_oom_killer(more: int) -> None:
    """When memory runs out, a worker goes before the server does."""
    path = "/proc/self/oom_score_adj"
    with contextlib.suppress(OSError, ValueError):
        with open(path) as file:
            now = int(file.read())
        with open(path, "w") as file:
            file.write(str(min(1000, now + more)))


def let_others_go_first() -> None:
    """This process, and each of its threads to come, gets as much of the processors as before, but
    does not push aside whoever runs when it wakes up. Without it the kernel may run a worker in the
    place of the front that has just written to it, which then waits though another core is idle."""
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def started_at(pid: int) -> int | None:
    """The start time of a process in clock ticks since boot: with the pid, its identity. None:
    there is no such process, or it is a zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name may hold spaces and parentheses; the fields begin behind the last one.
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] == b"Z" else int(fields[19])


def resident() -> int:
    """Memory in bytes that would come back if this process ended: its own pages. What it shares with
    the process that it was forked from, or with others of its model, is not counted."""
    total = 0
    with open("/proc/self/smaps_rollup", "rb") as file:
        for line in file:
            if line.startswith(b"Private_"):
                total += int(line.split()[1]) * 1024
    return total


def anonymous(pid: int) -> int:
    """Bytes of a process that come from no file; what it shares with those that it forked counts in
    full. 0: it has ended."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/smaps_rollup", "rb") as file:
        for line in file:
            if line.startswith(b"Anonymous:"):
                return int(line.split()[1]) * 1024
    return 0


def how_it_ended(status: int) -> str:
    """A wait status in words: "killed by signal 9 (SIGKILL)", "exit code 3"."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by signal {-code} ({signal.Signals(-code).name})"
    except ValueError:
        return f"killed by signal {-code}"


def say(text: str) -> None:
    """One line to the log of a process without logging."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
