"""`--metrics-port`: the page on a port of its own, by the same rules, and nothing else there."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from repository.errors import ConfigError
from server.app import build_app
from server.metrics.http import Metrics
from server.metrics_port import MetricsPort
from server.run import Server, bind
from server.settings import Settings
from tests.fakes.manners import Manners
from tests.integration.test_routes_keys import KEYS, write_keys


class Both:
    """`main` and `scraped`: clients of the two ports."""

    def __init__(self, server: Server, main: httpx.AsyncClient, scraped: httpx.AsyncClient) -> None:
        self.server, self.main, self.scraped = server, main, scraped


def client_of(sock: socket.socket) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{sock.getsockname()[1]}")


@asynccontextmanager
async def two_ports(**more: Any) -> AsyncIterator[Both]:
    settings, models, metrics = Settings(grace=1.0, **more), Manners(), Metrics()
    app = build_app(models, settings, metrics)
    port = MetricsPort(app, bind("127.0.0.1", 0))
    main = bind("127.0.0.1", 0)
    server = Server(app, settings, scraped=port)
    async with client_of(main) as one, client_of(port.sock) as other:
        running = asyncio.create_task(server.serve([main]))
        await server.up.wait()
        try:
            yield Both(server, one, other)
        finally:
            models.release()
            server.should_exit = True
            await running


async def test_the_page_is_the_same_on_both_ports() -> None:
    async with two_ports() as both:
        one = await both.main.get("/metrics")
        other = await both.scraped.get("/metrics")
        assert one.status_code == other.status_code == 200
        assert one.content == other.content  # made once: it is kept for a second
        rich = {"accept": "application/openmetrics-text"}
        assert (await both.scraped.get("/metrics", headers=rich)).text.endswith("# EOF\n")
        assert (await both.scraped.head("/metrics")).content == b""


@pytest.mark.parametrize(
    "path", ["/", "/health", "/v2/health/ready", "/v1/models", "/metrics/", "//metrics"]
)
async def test_nothing_else_is_there(path: str) -> None:
    async with two_ports() as both:
        answer = await both.scraped.get(path)
        assert answer.status_code == 404 and "/metrics" in answer.json()["error"]


async def test_what_changes_something_cannot_be_reached_there() -> None:
    async with two_ports() as both:
        for path in ("/v1/models/load", "/v2/models/talker/infer", "/v1/completions"):
            assert (await both.scraped.post(path, json={})).status_code == 404
        assert (await both.scraped.post("/metrics", json={})).status_code == 405


async def test_it_asks_for_the_key_that_the_main_port_asks_for(tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys.yaml", **KEYS)
    async with two_ports(api_keys=keys) as both:
        for client in (both.main, both.scraped):
            assert (await client.get("/metrics")).status_code == 401
            wrong = {"x-api-key": KEYS["inference"]}
            assert (await client.get("/metrics", headers=wrong)).status_code == 403
            right = {"x-api-key": KEYS["metrics"]}
            assert (await client.get("/metrics", headers=right)).status_code == 200
        assert (await both.scraped.get("/v1/models")).status_code == 404


async def test_it_is_closed_with_the_server() -> None:
    async with two_ports() as both:
        assert (await both.scraped.get("/metrics")).status_code == 200
        url = both.scraped.base_url
    async with httpx.AsyncClient(base_url=url) as late:
        with pytest.raises(httpx.ConnectError):
            await late.get("/metrics")


def test_a_port_that_is_taken_is_refused_with_the_flag_that_named_it() -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}.*--metrics-port"):
            bind("127.0.0.1", port, flag="--metrics-port")
