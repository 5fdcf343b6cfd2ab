"""The whole app over real folders, asked for what Triton's repository control can do."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np

from repository.lifecycle.generation import Generation
from repository.messages import InferRequest
from repository.repository import Options, Repository
from repository.tensors import Tensor
from server.app import build_app
from server.settings import Settings
from tests.models import add_onnx

BATCHED = '{"max_batch_size": 8}'
FAILS = json.dumps({"output": [{"name": "z", "data_type": "TYPE_FP32", "dims": [-1, 4]}]})


class Depot(NamedTuple):
    models: Repository
    client: httpx.AsyncClient

    async def post(self, path: str, body: Any = None) -> httpx.Response:
        raw = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body)
        return await self.client.post(f"/v2/repository/{path}", content=raw)

    async def load(self, name: str, **parameters: Any) -> httpx.Response:
        body = {"parameters": parameters} if parameters else None
        return await self.post(f"models/{name}/load", body)

    async def unload(self, name: str) -> httpx.Response:
        return await self.post(f"models/{name}/unload")

    async def index(self) -> list[dict[str, str]]:
        found: list[dict[str, str]] = (await self.post("index")).json()
        return found

    def serves(self, name: str = "m") -> Generation:
        return self.models.lease(name).generation

    async def ask(self, name: str = "m") -> float:
        with self.models.lease(name) as gen:
            request = InferRequest([Tensor.of("x", np.zeros((1, 4), np.float32))])
            response = await self.models.infer(gen, request)
        return float(response.outputs[0].array()[0, 0])


@asynccontextmanager
async def depot(*roots: Path, files: bool = True, **options: Any) -> AsyncGenerator[Depot]:
    state = roots[0].parent / "state"
    options = {"mode": "explicit", "settle_s": 0.1, "default_host": "inline", **options}
    models = Repository(Options(roots[0], roots[1:], state_dir=state, **options))
    settings = Settings(repo=roots[0], state_dir=state, allow_file_override=files)
    app = build_app(models, settings)
    async with (
        models.running(),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client,
    ):
        yield Depot(models, client)


def drop(root: Path, name: str = "m", value: float = 1.0, version: int = 1) -> Path:
    return add_onnx(root / name / str(version) / "model.onnx", value=value)


def encoded(tmp_path: Path, value: float) -> str:
    raw = add_onnx(tmp_path / "made.onnx", value=value).read_bytes()
    return base64.b64encode(raw).decode()


def brought(root: Path) -> list[str]:
    home = root.parent / "state" / "brought"
    return sorted(os.listdir(home)) if home.exists() else []


def is_done(reply: httpx.Response) -> bool:
    return (reply.status_code, reply.content, reply.headers["content-type"]) == (
        200, b"", "application/json",
    )  # fmt: skip


async def until_swept(d: Depot, root: Path) -> None:
    await d.models._overrides.over()
    assert brought(root) == []
