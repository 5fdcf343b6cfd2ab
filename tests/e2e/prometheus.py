"""A real Prometheus over what a test serves, and questions to it."""

from __future__ import annotations

import asyncio
import shutil
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.e2e.server import WITHIN_S

HOME = Path(__file__).resolve().parents[2]
GRAFANA = HOME / "grafana"
PROGRAM = shutil.which("prometheus")
needs_prometheus = pytest.mark.skipif(PROGRAM is None, reason="prometheus is not on PATH")
EVERY_S = 1


class Prometheus:
    """`$instance`, `$__range` and the like are put into expressions as Grafana would."""

    def __init__(self, url: str, client: httpx.AsyncClient) -> None:
        self.url = url
        self._client = client

    async def get(self, path: str, **params: Any) -> Any:
        answer = await self._client.get(path, params=params)
        said = answer.json()
        assert said["status"] == "success", f"{params}: {said}"
        return said["data"]

    async def ask(self, expr: str, **at: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (await self.get("/api/v1/query", query=expr, **at))["result"]
        return found

    async def series(
        self, expr: str, start: float, end: float, step: float
    ) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (
            await self.get("/api/v1/query_range", query=expr, start=start, end=end, step=step)
        )["result"]
        return found

    async def until(self, expr: str, wanted: Callable[[Any], bool] = bool) -> Any:
        """Its answer, once it is as wanted. There is no event: it is asked again and again."""
        found: Any = None
        try:
            async with asyncio.timeout(WITHIN_S):
                while not wanted(found := await self.ask(expr)):  # noqa: ASYNC110
                    await asyncio.sleep(0.2)
        except TimeoutError:
            raise AssertionError(f"{expr}: {found}") from None
        return found


def put(text: str, *, instance: str, window: str, step: str, shown: str) -> str:
    """An expression of a board with its variables filled in."""
    for name, value in (
        ("$__rate_interval", window), ("$__interval", step), ("$__range", shown),
        ("$instance", instance), ("$model", ".*"), ("$gpu", ".*"),
    ):  # fmt: skip
        text = text.replace(name, value)
    assert "$" not in text, text
    return text


def write_config(folder: Path, key: str, targets: dict[str, str], every_s: float = EVERY_S) -> Path:
    """The configuration that is committed, laid out as docker-compose.yaml mounts it, but for what is
    scraped (instance -> host:port) and how often."""
    folder.mkdir(exist_ok=True)
    shutil.copy(GRAFANA / "alerts.yml", folder)
    (folder / "metrics.key").write_text(key)
    config = yaml.safe_load((GRAFANA / "prometheus" / "prometheus.yml").read_text())
    every = f"{int(every_s * 1000)}ms"
    config["global"] = {"scrape_interval": every, "evaluation_interval": every}
    ours = config["scrape_configs"][0]
    ours["static_configs"] = [
        {"targets": [target], "labels": {"instance": instance}}
        for instance, target in targets.items()
    ]
    config["scrape_configs"] = [ours]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    return path


@asynccontextmanager
async def prometheus(config: Path) -> AsyncIterator[Prometheus]:
    """It keeps its series beside `config`, and is ready when the block begins."""
    assert PROGRAM is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{free.getsockname()[1]}"
    with (config.parent / "prometheus.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            PROGRAM, f"--config.file={config}", f"--storage.tsdb.path={config.parent / 'series'}",
            f"--web.listen-address={where}", "--enable-feature=exemplar-storage",
            "--log.level=warn", stdout=log, stderr=log,
        )  # fmt: skip
    try:
        async with httpx.AsyncClient(base_url=f"http://{where}", timeout=WITHIN_S) as client:
            async with asyncio.timeout(WITHIN_S):
                while not await _ready(client):
                    assert process.returncode is None, (
                        config.parent / "prometheus.log"
                    ).read_text()
                    await asyncio.sleep(0.05)
            yield Prometheus(f"http://{where}", client)
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _ready(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/-/ready")).status_code == 200
    except httpx.TransportError:
        return False
