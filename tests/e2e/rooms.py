"""Models that take room: of bytes that a config declares, or of real ones; and a server with few."""

from __future__ import annotations

import asyncio
import json
import os
import textwrap
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil

from tests.e2e.changes import Told, answer, shown
from tests.e2e.lasting import Lasting, lasting
from tests.e2e.processes import name_of
from tests.e2e.server import WITHIN_S

MIB = 2**20
EXPLICIT = ("--model-control-mode", "explicit")
DEVICE = ("--memory-budget", "cpu=1GiB")
GOOD = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [0.0] * 4}]}

# y = x + value. `hold` waits at a gate, as in `tests.e2e.server`.
SOURCE = """
import pathlib, time
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
        return {{"y": inputs["x"] + {value}}}
"""
SLEEPS = """
    def sleep(self):
        pass

    def wake(self):
        pass
"""
TENSORS = """
inputs: [{name: x, datatype: FP32, shape: [-1, 4]}]
outputs: [{name: y, datatype: FP32, shape: [-1, 4]}]
"""
WEIGHTS = """
import torch

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros({count}), requires_grad=False)

    def forward(self, x):
        return {{"y": x + self.w[0] + self.w[-1]}}
"""


def add(
    repo: Path,
    name: str,
    mib: int = 300,
    more: str = "",
    *,
    sleeps: bool = False,
    load: str = "pass",
    infer: str = "pass",
    value: float = 1.0,
) -> None:
    """A model of declared bytes. `load`, `infer`: a statement that it runs then."""
    folder = repo / name
    folder.mkdir(parents=True, exist_ok=True)
    here = str(repo.parent / "gates")
    source = SOURCE.format(here=here, load=load, infer=infer, value=value)
    put(folder / "model.py", source + (SLEEPS if sleeps else ""))
    put(folder / "config.yaml", f"backend: python{TENSORS}warmup: []\nmemory: {mib}MiB\n{more}")


def add_real(repo: Path, name: str, mib: int = 300, more: str = "", value: float = 1.0) -> None:
    """A model of as many bytes of weights, all of them zero but for the first: y = x + value. The file
    is sparse: it costs no disk."""
    folder = repo / name / "1"
    folder.mkdir(parents=True, exist_ok=True)
    count = mib * MIB // 4
    (folder / "model.py").write_text(textwrap.dedent(WEIGHTS.format(count=count)))
    put_weights(folder / "model.safetensors", count, value)
    put(repo / name / "config.yaml", f"backend: torch_module{TENSORS}{more}")


def put_weights(path: Path, count: int, value: float, *, missing: int = 0) -> None:
    """`missing`: bytes that the file is too short by."""
    import numpy as np

    head = {"w": {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}}
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    new = path.with_name(".new")
    with open(new, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(np.float32(value).tobytes())
        file.truncate(8 + len(text) + 4 * count - missing)
    os.replace(new, path)


def put(path: Path, text: str) -> None:
    """In one piece: whoever looks sees the old one or the new one."""
    new = path.with_name(f".{path.name}")
    new.write_text(text)
    os.replace(new, path)


class Room:
    """A server as these tests speak to it. `told`: of what happened since the test began."""

    def __init__(self, pid: int, client: httpx.AsyncClient, told: Told) -> None:
        self.pid = pid
        self.client = client
        self.told = told

    async def ask(self, verb: str, model: str, **more: Any) -> httpx.Response:
        return await self.client.post(f"/v1/models/{verb}", json={"model": model, **more})

    async def done(self, verb: str, model: str, **more: Any) -> dict[str, Any]:
        got = await self.ask(verb, model, **more)
        assert got.status_code == 200, got.text
        found: dict[str, Any] = got.json()
        return found

    async def load(self, *names: str) -> None:
        for name in names:
            await self.done("load", name)

    async def foretold(self, model: str) -> dict[str, Any]:
        """What a load would do; it must not have done any of it."""
        before = await self.books()
        found = await self.done("load", model, dry_run=True)
        assert await self.books() == before
        return found

    async def books(self) -> dict[str, tuple[str, int]]:
        """Of every model: its state and the bytes that it holds."""
        pages = [await self.page(name) for name in (await self.status())["loading_status"]]
        return {page["name"]: (page["state"], page["memory"]["reserved"]) for page in pages}

    async def status(self) -> dict[str, Any]:
        found: dict[str, Any] = (await self.client.get("/v1/models/status")).json()
        return found

    async def loaded(self) -> set[str]:
        return set((await self.status())["loaded"])

    async def asleep(self) -> set[str]:
        return set((await self.status())["asleep"])

    async def page(self, model: str) -> Any:
        return await shown(self.client, model)

    async def reserved(self) -> dict[str, int]:
        """By device; never more than the budget, and the sum of what the models hold."""
        devices = (await self.client.get("/v1/devices")).json()["devices"]
        assert all(0 <= d["reserved"] <= d["budget"] for d in devices), devices
        return {d["device"]: d["reserved"] for d in devices}

    async def value(self, model: str) -> float:
        return await answer(self.client, model)

    async def page_with(self, model: str, wanted: Callable[[Any], bool]) -> Any:
        """For what no event tells of."""
        async with asyncio.timeout(WITHIN_S):
            while not wanted(page := await self.page(model)):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        return page

    def evicted(self) -> list[tuple[str, str]]:
        """Who had to leave, and why."""
        return [(e.model, e.data["reason"]) for e in self.told.events if e.kind == "model.evicted"]

    def states(self, model: str, generation: int = 0) -> list[str]:
        """That its generations (or one) stepped into."""
        return [
            e.data["state"]
            for e in self.told.events
            if e.kind == "model.state" and e.model == model and generation in (0, e.generation)
        ]

    async def step(self, model: str, state: str) -> Any:
        """The first time that one of its generations stepped into this."""
        return await self.told.until(lambda e: e.model == model and e.data.get("state") == state)

    def worker(self, model: str) -> psutil.Process:
        everybody = psutil.Process(self.pid).children(recursive=True)
        (found,) = [p for p in everybody if name_of(p).startswith(f"md:{model}:")]
        return found


class Ground(NamedTuple):
    """A server that lasts. `gates`: where its models wait."""

    server: Lasting
    repo: Path
    gates: Path

    @asynccontextmanager
    async def room(self, *, empty: bool = True) -> AsyncIterator[Room]:
        """Emptied first: no model runs, none is pinned by call. From then on it hears what happens."""
        url = self.server.url
        async with httpx.AsyncClient(base_url=url, timeout=WITHIN_S) as client:
            if empty:
                await _empty(client)
            async with told_from_now(url) as told:
                room = Room(self.server.process.pid, client, told)
                assert not empty or set((await room.reserved()).values()) == {0}
                yield room


async def _empty(client: httpx.AsyncClient) -> None:
    for name in (await client.get("/v1/models/status")).json()["loading_status"]:
        await client.post("/v1/models/pin", json={"model": name, "pinned": False})
    assert (await client.post("/v1/models/unload-all")).json()["errors"] == []


@contextmanager
def ground_in(home: Path, *flags: str) -> Iterator[Ground]:
    """Serves `home`/models, and has tried all that it was to load, when the block begins."""
    (home / "gates").mkdir(exist_ok=True)
    with lasting(home / "models", *flags) as server:
        yield Ground(server, home / "models", home / "gates")


@asynccontextmanager
async def told_from_now(url: str) -> AsyncIterator[Told]:
    told = Told()
    async with (
        httpx.AsyncClient(base_url=url, timeout=None) as client,
        client.stream("GET", "/v1/events") as stream,
    ):
        lines = stream.aiter_lines()
        await anext(lines)  # a sign of life: from here on nothing is missed
        reader = asyncio.create_task(told.read(lines))
        try:
            yield told
        finally:
            reader.cancel()
            await asyncio.wait([reader])
