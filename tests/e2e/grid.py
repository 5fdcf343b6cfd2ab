"""A real server with keys, as PolarGrid's and Marqo's clients meet it: models that do nothing, that
wait at a gate, that fail, that do not fit; and names that no model may have."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.server import CONFIG, REQUEST, WITHIN_S, Running, add_model, serving

ADMIN, USER = "pg_your_api_key", "pg_another_key"  # of the documents' own examples
RESERVED = ("status", "load", "unload", "unload-all", "sleep", "wake", "pin")
HUGE = 1 << 50


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def key_file(folder: Path) -> Path:
    rows = [
        {"name": scope, "sha256": hashlib.sha256(key.encode()).hexdigest(), "scopes": [scope]}
        for key, scope in ((ADMIN, "admin"), (USER, "inference"))
    ]
    path = folder / "keys.yaml"
    path.write_text(json.dumps({"keys": rows}))
    return path


def is_native_error(answer: httpx.Response, status: int, code: str) -> str:
    """Both spellings, and the id. Its text."""
    body = answer.json()
    assert answer.status_code == status, answer.text
    assert body["error"]["code"] == code and body["error"]["type"], body
    assert body["detail"] == body["error"]["message"] and body["detail"]
    assert answer.headers["x-request-id"] and answer.headers["content-type"] == "application/json"
    return str(body["detail"])


class Grid:
    """`client` sends the admin's key."""

    def __init__(self, running: Running, client: httpx.AsyncClient, home: Path) -> None:
        self.running, self.client = running, client
        self.gates = home / "gates"
        self.get, self.post, self.delete = client.get, client.post, client.delete

    async def load(self, name: str, **more: Any) -> httpx.Response:
        return await self.post("/v1/models/load", json={"model_name": name, **more})

    async def unload(self, name: str) -> httpx.Response:
        return await self.post("/v1/models/unload", json={"model_name": name})

    async def infer(self, name: str) -> httpx.Response:
        return await self.post(f"/v2/models/{name}/infer", json=REQUEST)

    async def clear(self, *loaded: str) -> None:
        """Nothing is loaded but these."""
        assert (await self.post("/v1/models/unload-all")).status_code == 200
        for name in loaded:
            assert (await self.load(name)).status_code == 200

    async def states(self) -> dict[str, str]:
        found: dict[str, str] = (await self.get("/v1/models/status")).json()["loading_status"]
        return found

    async def serials(self, name: str) -> list[int]:
        """Of its generations that count, newest first."""
        return [g["serial"] for g in (await self.get(f"/v1/models/{name}")).json()["generations"]]


@asynccontextmanager
async def grid_in(home: Path, *names: str, **gated: dict[str, str]) -> AsyncIterator[Grid]:
    """`names` do nothing; `gated`: the gates of a model, as `add_model` takes them ("_" in its name
    becomes "-"). Nothing is loaded."""
    repo, gates = home / "models", home / "gates"
    for folder in (repo, gates):
        folder.mkdir()
    for name in (*names, *RESERVED):
        add_model(repo, gates, name)
        if name.rpartition("/")[2].isdecimal():  # without a version folder it would be one itself
            (repo / name / "1").mkdir()
            (repo / name / "model.py").rename(repo / name / "1" / "model.py")
    for name, at in gated.items():
        add_model(repo, gates, name.replace("_", "-"), **at)
    add_model(repo, gates, "huge")
    (repo / "huge" / "config.yaml").write_text(CONFIG + f"memory: {HUGE}\n")
    add_model(repo, gates, "broken")
    (repo / "broken" / "model.py").write_text("raise ValueError('no weights today')\n")
    flags = ("--api-keys", str(key_file(home)), "--settle", "0.1")
    async with (
        serving(repo, "--model-control-mode", "explicit", *flags) as running,
        httpx.AsyncClient(base_url=running.url, timeout=WITHIN_S, headers=bearer(ADMIN)) as client,
    ):
        await running.said(r"ready after")
        yield Grid(running, client, home)
