"""A server that is loaded and unloaded as Aphrodite was, with models that do as their config says."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from tests.e2e.changes import Told, shown
from tests.e2e.processes import started
from tests.e2e.server import REQUEST, Running

LOAD, UNLOAD = "/v1/load_model", "/v1/unload_model"
KIB = 1024
SOURCE = """
import pathlib, time
HERE = pathlib.Path({here!r})

def hold(gate):
    (HERE / f"{{gate}}.reached").touch()
    while not (HERE / f"{{gate}}.open").exists():
        time.sleep(0.005)

class Model:
    inputs = outputs = [("x", "FP32", (-1,))]

    def load(self, context):
        self.said = context.parameters
        if "fail" in self.said:
            raise RuntimeError("it was told to fail")
        if "load" in self.said:
            hold(self.said["load"])

    def infer(self, inputs):
        if "infer" in self.said:
            hold(self.said["infer"])
        return {{"x": inputs["x"] + self.said.get("add", 0)}}
"""
CONFIG = "backend: python\nwarmup: []\nmemory: {memory}\n"
ALPHA_BYTES, BETA_BYTES = 1000 * KIB, 24 * KIB  # what their configs say that they need


class Depot(NamedTuple):
    """`alpha` is the default model; `beta` has an aphrodite_config.yaml. `root`: an allowed one."""

    server: Running
    client: httpx.AsyncClient
    told: Told
    repo: Path
    gates: Path
    root: Path

    async def load(self, body: Any = None, **how: Any) -> httpx.Response:
        return await self.client.post(LOAD, **({"json": body} if body is not None else {}), **how)

    async def unload(self, body: Any = None) -> httpx.Response:
        return await self.client.post(UNLOAD, **({"json": body} if body is not None else {}))

    async def loaded(self, *names: str) -> None:
        """These serve, as their folders say, and nothing else."""
        assert (await self.unload()).status_code == 200
        for name in names:
            answer = await self.load({"model": name})
            assert answer.json()["status"] == "success", answer.text

    async def infer(self, model: str) -> httpx.Response:
        return await self.client.post(f"/v2/models/{model}/infer", json=REQUEST)

    async def value(self, model: str) -> float:
        """What is added to a number that goes in."""
        answer = await self.infer(model)
        assert answer.status_code == 200, answer.text
        return float(answer.json()["outputs"][0]["data"][0]) - 1.0

    async def truth(self) -> dict[str, list[Any]]:
        """Which generations live."""
        status = (await self.client.get("/v1/models/status")).json()
        found = {name: await shown(self.client, name) for name in status["loading_status"]}
        return {
            name: [g["serial"] for g in view["generations"] if g["state"] not in ("gone", "failed")]
            for name, view in found.items()
        }


def write(folder: Path, gates: Path, memory: int = 24 * KIB, **files: str) -> None:
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(SOURCE.format(here=str(gates)))
    (folder / "config.yaml").write_text(CONFIG.format(memory=memory))
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)


@asynccontextmanager
async def depot_in(home: Path) -> AsyncIterator[Depot]:
    repo, gates, root = home / "models", home / "gates", home / "elsewhere"
    gates.mkdir()
    write(repo / "alpha", gates, ALPHA_BYTES)
    write(repo / "beta", gates, BETA_BYTES, aphrodite_config="served-model-name: second\n")
    write(repo / "org/broken", gates)
    (repo / "org/broken/config.yaml").write_text(
        "backend: python\noptions: {parameters: {fail: true}}\n"
    )
    write(root / "far", gates)
    flags = ("--model-control-mode", "explicit", "--default-model", "alpha")
    flags += ("--allowed-root", str(root), "--memory-budget", "cpu=1GiB")
    async with started(repo, *flags) as (server, client, told):
        yield Depot(server, client, told, repo, gates, root)


def form(yaml: str | bytes, **fields: str) -> dict[str, Any]:
    """As curl's -F config=@config.yaml -F model=M."""
    return {"files": {"config": ("config.yaml", yaml, "application/octet-stream")}, "data": fields}


def adding(value: int, **more: Any) -> dict[str, Any]:
    """A config of ours that shows in what the model answers."""
    return {"options": {"parameters": {"add": value, **more}}}


def adds_up(found: dict[str, Any]) -> None:
    drain_s, shutdown_s, total_s = (found[f"{k}_time_s"] for k in ("drain", "shutdown", "total"))
    assert round(drain_s + shutdown_s, 2) == total_s == round(total_s, 2)
    assert min(drain_s, shutdown_s) >= 0


def is_aphrodites(answer: httpx.Response, status: int) -> str:
    """The message of an error in Aphrodite's shape."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    phrase = HTTPStatus(status).phrase
    assert error == {"message": error["message"], "type": phrase, "param": None, "code": status}
    assert list(answer.json()) == ["error"]
    return str(error["message"])
