"""A day of a model server in a minute: models of several kinds, clients that ask for them, and what
goes wrong. For the boards: everything that they show happens here.

    async with scene(folder) as stage:
        await stage.round()
"""

from __future__ import annotations

import asyncio
import math
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from server.auth import Scope, new_key
from tests import models, tiny
from tests.e2e.changes import Told, told_by
from tests.e2e.processes import workers
from tests.e2e.server import CONFIG, WITHIN_S, Running, serving

MIB = 2**20
STEADY = ("adder", "sleeper", "slow", "writer")
WRITERS = ("writer", "writer:pirate", "writer:poet", "writer")
GUESTS = ("guest-a", "guest-b")  # there is room for one of them
FLAGS = (
    "--model-control-mode", "explicit", "--enable-inline-model-loading", "--settle", "0.2",
    "--memory-budget", "cpu=900MiB", "--min-residency", "0.2", "--max-body", "1MiB",
    *(word for name in (*STEADY, "broken") for word in ("--load-model", name)),
)  # fmt: skip
PYTHON = """
import time

class Model:
    def load(self, *_):
        {load}

    def infer(self, inputs):
        if inputs["x"][0] < 0:
            raise ValueError("below zero")
        time.sleep({takes_s})
        return {{"y": inputs["x"]}}
"""
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACED = f"00-{TRACE}-00f067aa0ba902b7-01"  # sampled
FAILS = 'raise RuntimeError("these weights fit no layer")'
ROWS = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 4], "data": [1.0] * 8}]}
ONE = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2], "data": [1.0, 2.0]}]}
BAD = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2], "data": [-1.0, 2.0]}]}
TEXT = {"prompt": "the quick brown fox", "max_tokens": 12, "ignore_eos": True}


def furnish(repo: Path) -> None:
    """`broken` never gets up."""
    add_adder(repo, 1.0)
    models.add_onnx(repo / "sleeper" / "1" / "model.onnx")
    (repo / "sleeper" / "config.yaml").write_text("memory: 50MiB\npin: true\n")
    add_python(repo, "slow", 150, takes_s=0.02, more="pin: true\n")
    add_python(repo, "broken", 50, load=FAILS)
    for name in GUESTS:
        add_python(repo, name, 400)
    tiny.write_text_model(repo / "writer")
    (repo / "writer" / "config.yaml").write_text("memory: 180MiB\npin: true\n")
    base = tiny.model_of("llama")
    tiny.write_adapter(repo.parent / "novelist", base, seed=9)  # joins them later
    for seed, name in enumerate(("pirate", "poet")):
        tiny.write_adapter(repo / "writer" / "adapters" / name, base, seed=seed)


def add_adder(repo: Path, value: float) -> None:
    """A later one is a reload of it."""
    folder = repo / "adder"
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text("memory: 120MiB\nmax_batch_size: 16\npin: true\n")
    made = models.add_onnx(repo.parent / "next.onnx", value)
    (folder / "1").mkdir(exist_ok=True)
    made.rename(folder / "1" / "model.onnx")


def add_python(
    repo: Path, name: str, mib: int, *, takes_s: float = 0.005, load: str = "pass", more: str = ""
) -> None:
    folder = repo / name
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(f"{CONFIG}memory: {mib}MiB\n{more}")
    (folder / "model.py").write_text(PYTHON.format(takes_s=takes_s, load=load))


class Stage:
    """`key` may read metrics and nothing else."""

    def __init__(
        self, repo: Path, server: Running, client: httpx.AsyncClient, told: Told, key: str
    ) -> None:
        self.repo, self.server, self.client, self.told, self.key = repo, server, client, told, key

    async def ask(self, model: str, body: dict[str, Any]) -> int:
        headers = {"traceparent": TRACED} if model == "adder" else None
        got = await self.client.post(f"/v2/models/{model}/infer", json=body, headers=headers)
        return got.status_code

    async def write(self, model: str = "writer", **more: Any) -> int:
        got = await self.client.post("/v1/completions", json={"model": model, **TEXT, **more})
        return got.status_code

    async def round(self) -> None:
        """Some of each, at once."""
        codes = await asyncio.gather(
            *(self.ask("adder", ROWS) for _ in range(6)),
            *(self.ask("slow", ONE) for _ in range(3)),
            self.write(), self.write("writer:pirate"), self.write("writer:poet"),
        )  # fmt: skip
        assert set(codes) == {200}, codes

    async def mishaps(self) -> None:
        """A model that raises, a model that is not there, a body too long, a caller without a key."""
        async with httpx.AsyncClient(base_url=self.server.url, timeout=WITHIN_S) as stranger:
            refused = await stranger.get("/v1/models/status")
        codes = [
            await self.ask("slow", BAD),
            await self.ask("nobody", ONE),
            await self.ask("adder", {"inputs": [], "parameters": {"long": "x" * 2 * MIB}}),
            refused.status_code,
        ]
        assert codes == [500, 404, 400, 401], codes  # 400 is what Triton says of a body too long

    async def turns(self) -> None:
        """Each guest in turn: the one drives the other out."""
        for name in GUESTS:
            assert await self.ask(name, ONE) == 200

    async def reload(self, value: float) -> None:
        before = self.told.generations("adder")[-1]
        add_adder(self.repo, value)
        await self.told.ready("adder", after=before)

    async def spoil(self) -> None:
        """A reload that fails: what served serves on."""
        before = self.told.generations("slow")[-1]
        (self.repo / "slow" / "model.py").write_text(PYTHON.format(takes_s=0.02, load=FAILS))
        await self.told.failed("slow", after=before)

    async def nap(self, lasts_s: float = 0.0) -> None:
        """By call."""
        for verb in ("sleep", "wake"):
            got = await self.client.post(f"/v1/models/{verb}", json={"model": "sleeper"})
            assert got.status_code == 200, got.text
            await asyncio.sleep(lasts_s)

    async def adopt(self) -> None:
        """An adapter is dropped, and asked for."""
        adapters = self.repo / "writer" / "adapters"
        (self.repo.parent / "novelist").rename(adapters / "novelist")
        await self.told.until(
            lambda e: e.kind == "adapter.registered" and e.data["adapter"] == "novelist"
        )
        async with asyncio.timeout(WITHIN_S):
            while (code := await self.write("writer:novelist")) == 503:  # noqa: ASYNC110 - it loads
                await asyncio.sleep(0.1)
        assert code == 200

    async def crash(self) -> None:
        before = self.told.generations("slow")[-1]
        workers(self.server, "slow")[0].send_signal(signal.SIGKILL)
        await self.told.ready("slow", after=before)

    async def play(self, lasts_s: float) -> None:
        await Play(self, lasts_s).run()

    async def unload(self, model: str) -> None:
        got = await self.client.post("/v1/models/unload", json={"model": model})
        assert got.status_code == 200, got.text


class Play:
    """The same day, slowly, for pictures: clients all the time, and now and then a happening."""

    def __init__(self, stage: Stage, lasts_s: float) -> None:
        self._stage, self._lasts_s = stage, lasts_s
        self._over = asyncio.Event()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for at, happening in enumerate(self._happenings()):
                group.create_task(self._later(at, happening))
            group.create_task(self._clients())
            group.create_task(self._guests())
            group.create_task(self._end())

    def _happenings(self) -> list[Callable[[], Awaitable[Any]]]:
        stage, nap_s = self._stage, self._lasts_s / 10
        return [
            lambda: stage.reload(2.0), stage.mishaps, lambda: stage.nap(nap_s), stage.crash,
            stage.adopt, lambda: stage.reload(3.0), stage.mishaps, stage.spoil, lambda: stage.nap(nap_s),
            stage.mishaps, lambda: stage.reload(4.0),
        ]  # fmt: skip

    async def _guests(self) -> None:
        """Now the one is asked for, now the other."""
        began = time.monotonic()
        while not self._over.is_set():
            share = (time.monotonic() - began) / self._lasts_s
            if share > 0.1:
                await self._stage.ask(GUESTS[int(share * 7) % 2], ONE)
            await asyncio.sleep(0.1)

    async def _later(self, at: int, happening: Callable[[], Awaitable[Any]]) -> None:
        await asyncio.sleep(self._lasts_s * (at + 1) / 13)
        await happening()

    async def _clients(self) -> None:
        """More of them in the middle than at the ends."""
        began = time.monotonic()
        while not self._over.is_set():
            share = (time.monotonic() - began) / self._lasts_s
            many = 2 + int(14 * math.sin(math.pi * min(1.0, share)) ** 2)
            await asyncio.gather(
                *(self._stage.ask("adder", ROWS) for _ in range(2 * many)),
                *(self._stage.ask("slow", ONE) for _ in range(1 + many // 5)),
                *(self._stage.write(name) for name in WRITERS[: 1 + many // 4]),
            )
            await asyncio.sleep(0.05)

    async def _end(self) -> None:
        await asyncio.sleep(self._lasts_s)
        self._over.set()


@asynccontextmanager
async def scene(home: Path) -> AsyncIterator[Stage]:
    repo = home / "models"
    repo.mkdir()
    await asyncio.to_thread(furnish, repo)
    admin, line = new_key("admin", [Scope.ADMIN])
    key, other = new_key("prometheus", [Scope.METRICS])
    keys = home / "keys.yaml"
    keys.write_text(f"keys:\n{line}\n{other}\n")
    keys.chmod(0o600)
    headers = {"authorization": f"Bearer {admin}"}
    async with (
        serving(repo, *FLAGS, "--api-keys", str(keys)) as server,
        httpx.AsyncClient(base_url=server.url, timeout=WITHIN_S, headers=headers) as client,
        told_by(server, headers) as told,
    ):
        await told.until(lambda event: event.kind == "server.ready")
        yield Stage(repo, server, client, told, key)
