"""One real server for all tests of a module, which none of them changes for the others: without an event
loop, so that a fixture may hold it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.e2e.server import WITHIN_S


class Lasting:
    """`log` grows as the server writes."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.log: list[str] = []
        self.url = self.grpc = ""
        self._more = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._more:
                self.log.append(line.rstrip())
                self._more.notify_all()
        with self._more:
            self._ended = True
            self._more.notify_all()

    def said(self, pattern: str) -> re.Match[str]:
        """Waits for a line of the log."""

        def line() -> re.Match[str] | None:
            return next((m for m in (re.search(pattern, one) for one in self.log) if m), None)

        with self._more:
            self._more.wait_for(lambda: line() or self._ended, WITHIN_S)
            found = line()
        assert found is not None, "\n".join(self.log)
        return found

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def end(self) -> None:
        """Whatever happened, nothing of it stays."""
        if self.process.poll() is None:
            top = psutil.Process(self.process.pid)
            family = [*top.children(recursive=True), top]
            for one in family:
                one.kill()
            psutil.wait_procs(family, timeout=WITHIN_S)
        self.process.wait()
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()


@contextmanager
def lasting(repo: Path, *flags: str, grpc: bool = False) -> Iterator[Lasting]:
    """Serves, and has tried all models, when the block begins. `grpc`: it speaks that too."""
    state = repo.parent / "state"
    command = [sys.executable, "-m", "server", "serve", str(repo), "--port", "0"]
    command += ("--grpc-port", "0") if grpc else ("--no-allow-grpc",)
    process = subprocess.Popen(
        [*command, "--state-dir", str(state), "--settle", "0.1", "--trust-code", *flags],
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
        env=os.environ,
    )
    server = Lasting(process)
    try:
        server.url = server.said(r"serving (http://\S+)")[1]
        server.said(r"ready after")
        if grpc:
            server.grpc = server.said(r"serving grpc (\S+)")[1]
        yield server
    finally:
        server.end()
