"""A real `python -m server serve` on a free port, its log, its children, and models that wait."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

WITHIN_S = 40.0  # for anything that a test waits for; a busy machine is slow
PROGRAM = (sys.executable, "-m", "server")

MODEL = """
import os, pathlib, time
HERE = pathlib.Path({here!r})

def hold(name):
    (HERE / f"{{name}}.reached").touch()
    while not (HERE / f"{{name}}.open").exists():
        time.sleep(0.005)

class Model:
    def load(self, *_):
        {load}

    def infer(self, inputs):
        {infer}
        return {{"y": inputs["x"]}}
"""
CONFIG = """
backend: python
inputs: [{name: x, datatype: FP32, shape: [-1]}]
outputs: [{name: y, datatype: FP32, shape: [-1]}]
warmup: []
"""
REQUEST = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2], "data": [1, 2]}]}


def add_model(repo: Path, gates: Path, name: str, *, load: str = "", infer: str = "") -> None:
    """A model that stops at the gate `load` or `infer` until the test opens it."""
    folder = repo / name
    folder.mkdir(parents=True)
    steps = {
        key: f"hold({gate!r})" if gate else "pass"
        for key, gate in (("load", load), ("infer", infer))
    }
    (folder / "model.py").write_text(MODEL.format(here=str(gates), **steps))
    (folder / "config.yaml").write_text(CONFIG)


async def reached(gates: Path, gate: str) -> None:
    """The model stands at its gate (it is another process: a file is how it says so)."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            if (gates / f"{gate}.reached").exists():
                return
            await asyncio.sleep(0.01)


def open_gate(gates: Path, gate: str) -> None:
    (gates / f"{gate}.open").touch()


class Running:
    """`log` grows as the server writes. `url` once it serves; `grpc` is "host:port", where it was asked
    for."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.log: list[str] = []
        self.url = self.grpc = ""
        self._more = asyncio.Event()
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.log.append(line.decode(errors="replace").rstrip())
            self._more.set()
        self._more.set()

    async def said(self, pattern: str, after: int = 0) -> re.Match[str]:
        """Waits for a line of the log, past so many."""
        seen = after
        async with asyncio.timeout(WITHIN_S):
            while True:
                for line in self.log[seen:]:
                    if found := re.search(pattern, line):
                        return found
                seen = len(self.log)
                assert not self._reader.done(), "\n".join(self.log)
                self._more.clear()
                await self._more.wait()

    async def code(self) -> int:
        async with asyncio.timeout(WITHIN_S):
            code = await self.process.wait()
            await self._reader
        return code

    def signal(self, number: signal.Signals, *, group: bool = False) -> None:
        if group:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, timeout=WITHIN_S)

    async def end(self) -> None:
        """Whatever happened, nothing of it stays."""
        if self.process.returncode is None:
            for one in [*self.children(), psutil.Process(self.process.pid)]:
                with suppress(psutil.NoSuchProcess):  # a worker may be just ending
                    one.kill()
        await self.process.wait()
        await self._reader


@asynccontextmanager
async def serving(
    repo: Path,
    *flags: str,
    wait_for: str = r"serving (http://\S+)",
    program: Sequence[str] = PROGRAM,
    grpc: bool = False,
    **environ: Any,
) -> AsyncIterator[Running]:
    """`program`: the same server, started in another way. `grpc`: it speaks that too."""
    state = repo.parent / "state"
    process = await asyncio.create_subprocess_exec(
        *program, "serve", str(repo),
        "--port", "0", "--state-dir", str(state), "--trust-code",
        *(("--grpc-port", "0") if grpc else ("--no-allow-grpc",)), *flags,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, **environ},
    )  # fmt: skip
    running = Running(process)
    try:
        if wait_for:
            running.url = (await running.said(wait_for))[1]
        if grpc:
            running.grpc = (await running.said(r"serving grpc (\S+)"))[1]
        yield running
    finally:
        await running.end()


def gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=WITHIN_S)
    return not alive
