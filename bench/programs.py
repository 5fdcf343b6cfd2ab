"""Processes of a comparison: started, waited for, put to sleep while others are measured, ended.

A tree is everything in the session that a program began: some peers' children outlive their parent.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from bench import depot

PATIENCE_S = 60.0
GRACE_S = 10.0
CALM = 0.02  # of a core: who uses more when nobody asks sleeps while others are measured


class NotStartedError(Exception):
    """Why a program is left out, in a line."""


class Program:
    """A process with a session of its own. What it says goes to `log`."""

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self.log = log
        self.env = {**os.environ, **(env or {})}
        self._out = log.open("wb")
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._out,
                env=self.env, cwd=cwd, start_new_session=True, text=True,
            )  # fmt: skip
        except OSError as error:
            self._out.close()
            raise NotStartedError(f"{Path(command[0]).name}: {error.strerror}") from error

    def tree(self) -> list[int]:
        return session(self.process.pid)

    def line(self) -> str:
        """The next that it prints."""
        assert self.process.stdout is not None
        text = self.process.stdout.readline()
        if not text:
            self.process.wait(GRACE_S)
            raise NotStartedError(self.why())
        return text.strip()

    def answers(self, url: str) -> None:
        """Waits until `url` is answered with 200."""
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            with suppress(httpx.HTTPError):
                if httpx.get(url, timeout=5).status_code == 200:
                    return
            if self.process.poll() is not None:
                raise NotStartedError(self.why())
            time.sleep(0.1)
        raise NotStartedError(f"not ready within {PATIENCE_S:.0f} s; {self.why()}")

    def why(self) -> str:
        """The last that looks like a reason, or the last at all."""
        said = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        if not said:
            return f"ended with {self.process.poll()}, saying nothing"
        return ([line for line in said if "rror" in line] or said)[-1].strip()[:300]

    def end(self) -> None:
        kill(self.tree(), signal.SIGCONT)
        kill(self.tree(), signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE_S)
        kill(self.tree(), signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        self._out.close()


def session(leader: int) -> list[int]:
    """The processes whose session `leader` began, as long as any lives."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(OSError):  # it has ended meanwhile
                if os.getsid(int(name)) == leader:
                    found.append(int(name))
    return found


def kill(pids: Sequence[int], what: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, what)


@contextmanager
def asleep(pids: Sequence[int]) -> Iterator[None]:
    """Stopped by the kernel: without a share of the cores, keeping everything."""
    kill(pids, signal.SIGSTOP)
    try:
        yield
    finally:
        kill(pids, signal.SIGCONT)


def idle_share(pids: list[int], seconds: float) -> float:
    """Of a core, that they use by themselves."""
    before, began = depot.cpu_s(pids), time.perf_counter()
    time.sleep(seconds)
    return (depot.cpu_s(pids) - before) / (time.perf_counter() - began)


def at_rest(pids: list[int], most_s: float = 3.0) -> None:
    """Waits until the last requests, whose clients have gone, are done with."""
    until = time.monotonic() + most_s
    while idle_share(pids, 0.05) > CALM and time.monotonic() < until:
        pass


def free_ports(count: int) -> list[int]:
    """For programs that cannot be told to take any. Somebody may come first; then it won't start."""
    socks = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in socks]
    for sock in socks:
        sock.close()
    return ports
