"""A real server for a benchmark, and what the kernel says of its processes.

Everything is measured from outside, through the command line, HTTP and /proc; the server knows
nothing of it. Times in seconds, sizes in bytes.
"""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil

PATIENCE_S = 300.0
PROGRAM = (sys.executable, "-m", "server")


class Depot:
    """`python -m server serve` on a free port. `url` once it serves. `program`: another server."""

    def __init__(
        self, repo: Path, state_dir: Path, *flags: str, program: Sequence[str] = PROGRAM
    ) -> None:
        self.began = time.perf_counter()
        self.url = ""
        self.state_dir = state_dir
        self.log: list[str] = []
        self._process = subprocess.Popen(
            [*program, "serve", str(repo), "--port", "0",
             "--state-dir", str(state_dir), "--trust-code", *flags],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # Not as a flag: a server that is compared with may be older. Said later, it counts.
            env={"MODELDEPOT_ALLOW_GRPC": "false", **os.environ},
        )  # fmt: skip
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._lines.put(line.rstrip())
        self._lines.put(None)

    def said(self, pattern: str) -> re.Match[str]:
        """The first line from here on that matches."""
        until = time.monotonic() + PATIENCE_S
        while True:
            line = self._lines.get(timeout=max(0.0, until - time.monotonic()))
            if line is None:
                raise SystemExit("the server ended:\n" + "\n".join(self.log[-20:]))
            self.log.append(line)
            if found := re.search(pattern, line):
                return found

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.pid).children(recursive=True)

    def tree(self) -> list[int]:
        return [self.pid, *(child.pid for child in self.children())]

    def workers(self) -> list[int]:
        return [child.pid for child in self.children() if name_of(child.pid).startswith("md:")]

    def stop(self) -> tuple[int, float]:
        """SIGTERM. The exit code, and how long it took."""
        began = time.perf_counter()
        self._process.send_signal(signal.SIGTERM)
        code = self._process.wait(PATIENCE_S)
        return code, time.perf_counter() - began

    def end(self) -> None:
        if self._process.poll() is None:
            for pid in self.tree():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._process.wait()


@contextmanager
def serving(
    repo: Path, state_dir: Path, *flags: str, program: Sequence[str] = PROGRAM
) -> Iterator[tuple[Depot, httpx.Client]]:
    depot = Depot(repo, state_dir, *flags, program=program)
    try:
        depot.url = depot.said(r"serving (http://\S+)")[1]
        with httpx.Client(base_url=depot.url, timeout=PATIENCE_S) as client:
            yield depot, client
    finally:
        depot.end()


@contextmanager
def beside(module: str, *args: str) -> Iterator[list[float]]:
    """`python -m module` works from its first line on, in a process of its own, for as long as the
    block lasts, and until what it has begun is done. Afterwards the figures that it told then."""
    told: list[float] = []
    process = subprocess.Popen(
        [sys.executable, "-m", module, *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdout.readline()
    try:
        yield told
    finally:
        process.stdin.close()
        told += [float(line) for line in process.stdout]
        process.wait()


def name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def pss(pid: int) -> int:
    """Its own memory and its share of what it shares. 0: it is gone."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return int(re.findall(r"^Pss:\s+(\d+) kB", text, re.M)[0]) * 1024


def private(pid: int) -> int:
    """What would come back if only this process ended. 0: it is gone."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return sum(int(kb) for kb in re.findall(r"^Private_\w+:\s+(\d+) kB", text, re.M)) * 1024


def rss(pid: int) -> int:
    return int(psutil.Process(pid).memory_info().rss)


def cpu_s(pids: list[int]) -> float:
    """CPU time of all threads of all of them, by the scheduler's clock: to the nanosecond, where
    the usual counters tick in hundredths."""
    total = 0
    for pid in pids:
        with suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                with suppress(OSError):
                    total += int(Path(f"/proc/{pid}/task/{task}/schedstat").read_text().split()[0])
    return total / 1e9


def wakeups(pids: list[int]) -> int:
    """How often their threads have begun to wait: each end of a wait is a wakeup."""
    total = 0
    for pid in pids:
        with suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                with suppress(OSError):
                    text = Path(f"/proc/{pid}/task/{task}/status").read_text()
                    total += int(re.findall(r"^voluntary_ctxt_switches:\s+(\d+)", text, re.M)[0])
    return total


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def segments() -> list[str]:
    """Shared memory of ours."""
    return [name for name in os.listdir("/dev/shm") if "modeldepot" in name]


def files_in(folder: Path) -> list[str]:
    return [str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir()]
