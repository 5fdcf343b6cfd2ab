"""Many small models at once: all of them serve, none costs much, and nothing of them stays.

`bench/scale.py` measures the same with more of them; here are bounds that hold on a busy machine.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from tests import models
from tests.e2e.changes import answer
from tests.e2e.processes import left_behind, private, started, workers
from tests.e2e.server import gone

pytestmark = pytest.mark.e2e

COUNT = 40
NAMES = [f"m{number:02}" for number in range(COUNT)]
MIB = 2**20
OF_A_WORKER = 12 * MIB  # its own memory, onnxruntime's session and arena included
OF_A_MEMORY = 28 * 1024  # what may stay of one generation that has ended, for people to read
ROUNDS = 8


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    for number, name in enumerate(NAMES):
        models.add_onnx(folder / name / "1" / "model.onnx", float(number))
    return folder


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


async def test_all_are_served_cheaply_and_unload_all_leaves_nothing(repo: Path) -> None:
    async with started(repo) as (server, client, told):
        answers = await asyncio.gather(*[answer(client, name) for name in NAMES])
        assert answers == [float(number) for number in range(COUNT)]
        processes = workers(server)
        assert len(processes) == COUNT and not told.failures()
        assert max(private(p.pid) for p in processes) < OF_A_WORKER
        (zygote,) = set(server.children()) - set(processes)

        got = (await client.post("/v1/models/unload-all")).json()
        assert got["unloaded_models"] == NAMES and got["errors"] == []
        assert gone(processes)
        assert server.children() == [zygote] and left_behind(repo) == []


async def test_loading_and_unloading_again_and_again_costs_nothing_that_stays(repo: Path) -> None:
    async with started(repo) as (server, client, _):

        async def load(name: str) -> None:
            got = await client.post("/v1/models/load", json={"model": name})
            assert got.status_code == 200, got.text

        async def unload_all() -> tuple[int, int]:
            await client.post("/v1/models/unload-all")
            return private(server.process.pid), open_files(server.process.pid)

        bytes_before, files_before = await unload_all()
        for _ in range(ROUNDS):
            await asyncio.gather(*map(load, NAMES))
            assert len(workers(server)) == COUNT
            bytes_after, files_after = await unload_all()
        assert bytes_after - bytes_before < ROUNDS * COUNT * OF_A_MEMORY
        assert files_after <= files_before + 2 * COUNT  # connections of this client, at most
        assert workers(server) == []
