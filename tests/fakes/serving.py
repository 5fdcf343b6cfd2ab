"""The real app over any repository, in the test's own event loop: without a socket, or with one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

from repository.repository import Repository
from server.app import ModelDepot, build_app
from server.run import Server, bind, url_of
from server.settings import Settings


class Client(httpx.AsyncClient):
    """`app` is what it speaks to."""

    app: ModelDepot


@asynccontextmanager
async def serving(models: Repository, key: str = "", **settings: Any) -> AsyncIterator[Client]:
    """`settings` as `Settings` takes them; `key` is sent with every request."""
    app = build_app(models, Settings(**settings))
    headers = {"authorization": f"Bearer {key}"} if key else {}
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.lifespan(),
        Client(transport=transport, base_url="http://test", headers=headers) as client,
    ):
        client.app = app
        yield client


@asynccontextmanager
async def staying(models: Repository, key: str = "", **settings: Any) -> AsyncIterator[Client]:
    """`serving` for a fixture, which is begun in one task and ended in another."""
    up: asyncio.Future[Client] = asyncio.get_running_loop().create_future()
    over = asyncio.Event()

    async def stay() -> None:
        async with serving(models, key, **settings) as client:
            up.set_result(client)
            await over.wait()

    task = asyncio.create_task(stay())
    await asyncio.wait([task, up], return_when=asyncio.FIRST_COMPLETED)
    try:
        if up.done():
            yield up.result()
    finally:
        over.set()
        await task


@asynccontextmanager
async def listening(models: Repository, **settings: Any) -> AsyncIterator[tuple[Server, str]]:
    """The server on a real socket, and its URL. At the end it drains as after a signal."""
    chosen = Settings(**settings)
    server = Server(build_app(models, chosen), chosen)
    sock = bind("127.0.0.1", 0)
    url = url_of(sock)
    running = asyncio.create_task(server.serve([sock]))
    try:
        await server.up.wait()
        yield server, url
    finally:
        server.drain("the test is over")
        await running
