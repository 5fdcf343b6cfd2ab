"""A server that has started, and its processes and files, looked at from outside."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.e2e.changes import Told, shown, told_by
from tests.e2e.server import Running, serving


@asynccontextmanager
async def started(
    repo: Path, *flags: str, **how: Any
) -> AsyncIterator[tuple[Running, httpx.AsyncClient, Told]]:
    """`how`: more for `serving`."""
    async with (
        serving(repo, "--settle", "0.2", *flags, **how) as server,
        server.client() as client,
        told_by(server) as told,
    ):
        await told.until(lambda event: event.kind == "server.ready")
        yield server, client, told


async def inside(client: httpx.AsyncClient, model: str, requests: int) -> None:
    """So many requests are with the model."""
    while True:
        found: Any = await shown(client, model)
        if found["generations"][0]["leases"] == requests:
            return


def workers(server: Running, model: str = "") -> list[psutil.Process]:
    """Of one model (by the first letters of its name, as the kernel keeps it), or of all."""
    begin = f"md:{model}:" if model else "md:"
    return [p for p in server.children() if name_of(p).startswith(begin)]


def worker(server: Running, model: str) -> psutil.Process:
    (found,) = workers(server, model)
    return found


def zygote(server: Running, framework: str) -> psutil.Process:
    (found,) = [p for p in server.children() if name_of(p) == f"md-zygote-{framework}"[:15]]
    return found


def name_of(process: psutil.Process) -> str:
    """The kernel's; psutil would look at the command line, which a fork shares."""
    try:
        return Path(f"/proc/{process.pid}/comm").read_text().strip()
    except OSError:
        return ""


def private(pid: int) -> int:
    """Bytes that nobody shares with it."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return 1024 * sum(int(row.split()[1]) for row in text.splitlines() if row.startswith("Private"))


def snapshots(repo: Path) -> list[str]:
    """In the state folder that `serving` gives the server of this repository."""
    folder = repo.parent / "state" / "snapshots"
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def left_behind(repo: Path) -> list[str]:
    """Files of a server in its state folder but for its journal and its estimates, and shared memory."""
    state = repo.parent / "state"
    found = [str(p) for p in state.rglob("*") if not p.is_dir()]
    found = [p for p in found if not Path(p).name.startswith(("journal.", "needs.jsonl"))]
    return found + [name for name in os.listdir("/dev/shm") if "modeldepot" in name]
