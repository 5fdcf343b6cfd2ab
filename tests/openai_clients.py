"""The depot with models that write, and the pip `openai` client speaking to it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, cast

from openai import AsyncOpenAI, OpenAI

from tests.fakes.manners import Manners
from tests.fakes.writers import Writers
from tests.routes import Depot, routed

KEY = "any"


def url_of(port: int) -> str:
    return f"http://127.0.0.1:{port}/v1"


@asynccontextmanager
async def writing(
    models: Writers | None = None, *, retries: int = 0, key: str = KEY, **settings: Any
) -> AsyncGenerator[tuple[Depot, Writers, AsyncOpenAI]]:
    """The server in this loop, its models, and a client."""
    found = models or Writers()
    async with routed("protocol", cast("Manners", found), **settings) as depot:
        async with AsyncOpenAI(
            base_url=url_of(depot.port), api_key=key, max_retries=retries, timeout=30
        ) as client:
            yield depot, found, client
        await depot.quiet()


def in_a_thread(port: int) -> OpenAI:
    return OpenAI(base_url=url_of(port), api_key=KEY, max_retries=0, timeout=30)
