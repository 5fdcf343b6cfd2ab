"""Two thousand connections ask everything at once: tiny and huge, JSON and binary, in pairs, wrong, and
broken off half-way. Nothing is lost, nothing is confused, everything is counted, and nothing stays.

Both ways of a request through the server are held to the same. `tests/e2e/mix.py` is the client.
"""

from __future__ import annotations

import asyncio
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil
import pytest

from server.settings import Settings
from tests import models
from tests.e2e.mix import MANY_FILES, Mixed, mixing
from tests.e2e.processes import left_behind, name_of, started
from tests.e2e.questions import ALONE, MERGED, PYTHON, WIDE
from tests.e2e.server import WITHIN_S, Running, gone

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

CONNECTIONS = 2000
TURNS = 4000
FEW = 250  # connections and turns to warm up: everything is asked once
ROUNDS = 2
QUEUE = str(2 * CONNECTIONS)  # all may want the same model: nobody is to be turned away
KINDS = {
    "tiny binary", "tiny JSON", "600 kB binary", "1 MiB JSON", "8 MiB binary", "unknown model",
    "wrong shape",
}  # fmt: skip
FRESH_S = 1.1  # a page of /metrics may be a second old
SPARE_FILES = 2  # connections of this test's own
# Of what was freed some stays, where something small lies behind it: seen were up to 22 MiB, which the
# next round used. A leak of 6 kB a request, or of 60 medium bodies, is more.
SPARE_HEAP = 32 << 20
# What processes share goes back a few seconds after the last large body. One that is never given back
# is more than this.
SPARE_SHARED = 4 << 20
COUNTED = re.compile(r"^modeldepot_inference_(\w+)\{(.*)\} (\S+)$", re.M)
LABEL = re.compile(r'(\w+)="([^"]*)"')
# The server as it is, but that it gives back at once what it frees, where else it would keep that for
# the next body: a leak would fill what is kept long before it showed.
GIVES_BACK = """
import server.run
from server.cli import main
server.run._keep_freed_memory = lambda: None
main()
"""
PROGRAM = (sys.executable, "-c", GIVES_BACK)
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
BATCHED = "max_batch_size: {}\n"
ADDING = """
    class Model:
        def infer(self, inputs):
            return {"y": inputs["x"] + 3}
"""
ADDING_CONFIG = """
backend: python
max_batch_size: 32
inputs: [{name: x, datatype: FP32, shape: [4]}]
outputs: [{name: y, datatype: FP32, shape: [4]}]
"""
ROUTES = [[], ["--no-fast-path"]] if "fast_path" in Settings.__dataclass_fields__ else [[]]


def add_models(repo: Path) -> None:
    """All are y = x + value, each in its own way."""
    for target in (ALONE, MERGED, WIDE):
        file = repo / target.name / "1" / "model.onnx"
        models.add_onnx(file, target.value, (-1, target.row))
    for target, most in ((MERGED, 32), (WIDE, 4)):
        (repo / target.name / "config.yaml").write_text(BATCHED.format(most))
    models.python_model(repo / PYTHON.name, ADDING)
    (repo / PYTHON.name / "config.yaml").write_text(ADDING_CONFIG)


@dataclass(frozen=True)
class Counts:
    """What /metrics says of inference, all versions and protocols together."""

    ended: dict[tuple[str, str], int]  # (model, outcome) -> requests
    inside: float  # in flight or waiting

    def outcome(self, name: str) -> int:
        return sum(n for (_, outcome), n in self.ended.items() if outcome == name)


async def counts(client: httpx.AsyncClient) -> Counts:
    await asyncio.sleep(FRESH_S)
    ended: dict[tuple[str, str], int] = {}
    inside = 0.0
    for name, labels, value in COUNTED.findall((await client.get("/metrics")).text):
        label = dict(LABEL.findall(labels))
        if name == "requests_total":
            key = label["model"], label["outcome"]
            ended[key] = ended.get(key, 0) + int(float(value))
        elif name in ("in_flight", "queue_length"):
            inside += float(value)
    return Counts(ended, inside)


async def at_rest(client: httpx.AsyncClient) -> Counts:
    async with asyncio.timeout(WITHIN_S):
        while True:
            found = await counts(client)
            if not found.inside:
                return found


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(WITHIN_S):
        while True:
            if holds():
                return
            await asyncio.sleep(0.05)


def tree(server: Running) -> list[psutil.Process]:
    """The server, and what it starts once; what converts long JSON comes and goes with the work."""
    lasting = [child for child in server.children() if name_of(child) != "md-scribe"]
    return [psutil.Process(server.process.pid), *lasting]


def open_files(server: Running) -> int:
    """Connections, pipes and files. Shared memory is kept for the next large body."""
    found = 0
    for process in tree(server):
        for fd in Path(f"/proc/{process.pid}/fd").iterdir():
            with suppress(OSError):  # closed meanwhile
                found += not os.readlink(fd).startswith("/memfd:")
    return found


class Memory(NamedTuple):
    """Bytes of all processes together, each page once."""

    heap: int
    shared: int


def memory(server: Running) -> Memory:
    found = [0, 0]
    for process in tree(server):
        text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        for at, kind in enumerate(("Anon", "Shmem")):
            (kilobytes,) = re.findall(rf"^Pss_{kind}:\s+(\d+) kB", text, re.M)
            found[at] += 1024 * int(kilobytes)
    return Memory(*found)


def assert_all_is_counted(mixed: list[Mixed], found: Counts) -> None:
    """Every request once, as what it was. Whoever broke off may have been answered all the same."""
    success: dict[str, int] = {}
    for one in mixed:
        for model, n in one.success.items():
            success[model] = success.get(model, 0) + n
    more = found.outcome("success") + found.outcome("canceled") - sum(success.values())
    noticed = sum(one.noticed for one in mixed)
    assert noticed <= more <= noticed + sum(one.unnoticed for one in mixed)
    assert all(found.ended[model, "success"] >= n for model, n in success.items())
    assert found.outcome("bad_request") == sum(one.refused for one in mixed)
    assert {how for _, how in found.ended} <= {"success", "canceled", "bad_request"}


@pytest.mark.alone  # it takes all that the machine has
@pytest.mark.parametrize("flags", ROUTES, ids=" ".join)
async def test_a_mix_of_requests_on_two_thousand_connections_loses_nothing_and_leaves_nothing(
    repo: Path, flags: list[str]
) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < CONNECTIONS + MANY_FILES:
        pytest.skip(f"a process may open {most} files here, too few for {CONNECTIONS} connections")
    add_models(repo)
    mixed: list[Mixed] = []
    after: list[Memory] = []
    async with started(repo, "--max-queue", QUEUE, *flags, program=PROGRAM, **MALLOC) as (
        server,
        client,
        told,
    ):

        async def mix(connections: int, turns: int) -> None:
            seed = len(mixed)
            async with mixing(server.url, connections, turns, seed) as all_of_them:
                assert psutil.Process(server.process.pid).num_fds() > connections
                mixed.append(await all_of_them.begin())
            assert mixed[-1].wrong == []
            assert mixed[-1].right.keys() == KINDS

        await mix(FEW, FEW)
        await at_rest(client)
        processes, files = tree(server), open_files(server)
        for _ in range(ROUNDS):
            await mix(CONNECTIONS, TURNS)
            await until(lambda: open_files(server) <= files + SPARE_FILES)
            assert_all_is_counted(mixed, await at_rest(client))
            assert tree(server) == processes and told.failures() == []
            after.append(memory(server))
        assert after[-1].heap - after[0].heap <= SPARE_HEAP, after
        await until(lambda: memory(server).shared <= SPARE_SHARED)
        assert not [line for line in server.log if "Traceback" in line or "ERROR" in line]
        server.signal(signal.SIGTERM)
        assert await server.code() == 0
    assert gone(processes) and left_behind(repo) == []
