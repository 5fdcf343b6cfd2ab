"""Real servers one after the other that do not import everything anew: each is forked from a process
that has imported the server and done nothing else."""

from __future__ import annotations

import asyncio
import os
import re
import select
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import psutil

from tests.e2e.server import WITHIN_S, Running

PROGRAM = """
import os, sys
import server.run
from server.cli import main

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        main(sys.argv[1:])
    print("forked", pid, "for this round", file=sys.stderr, flush=True)
    ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print("ended with", ended, "for good", file=sys.stderr, flush=True)
"""


class Forked:
    """The server of the moment: `pid`, `url`."""

    def __init__(self, running: Running) -> None:
        self._running = running
        self._begun = 0
        self.pid = 0
        self.url = ""

    async def start(self) -> None:
        """Returns when what was wanted at the start has been loaded."""
        self._begun = len(self._running.log)
        stdin = self._running.process.stdin
        assert stdin is not None
        stdin.write(b"\n")
        self.pid = int((await self._said(r"forked (\d+) for this round"))[1])
        self.url = (await self._said(r"serving (http://\S+)"))[1]
        await self._said("ready after")

    async def _said(self, pattern: str) -> re.Match[str]:
        return await self._running.said(pattern, self._begun)

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, timeout=WITHIN_S)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.pid).children(recursive=True)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    async def code(self) -> int:
        return int((await self._said(r"ended with (-?\d+) for good"))[1])


def ended(processes: list[psutil.Process]) -> bool:
    """They run no more, whether or not the machine's first process has buried them yet."""
    for process in processes:
        try:
            file = os.pidfd_open(process.pid)
        except ProcessLookupError:
            continue
        try:
            if not select.select([file], [], [], WITHIN_S)[0]:
                return False
        finally:
            os.close(file)
    return True


@asynccontextmanager
async def forking(*arguments: str) -> AsyncIterator[Forked]:
    """`arguments`: of the command."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, *arguments,
        stdin=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    running = Running(process)
    try:
        yield Forked(running)
    finally:
        await running.end()
