"""HTTP byte by byte, for what no client library would send."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple

WITHIN_S = 40.0


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        """What it tells a person: V2's error, or ours."""
        found = json.loads(self.body)
        error = found["error"]
        return str(error if isinstance(error, str) else error["message"])


class Wire:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, raw: bytes) -> None:
        """A server that has hung up is no reason to stop."""
        self.writer.write(raw)
        with suppress(OSError):
            async with asyncio.timeout(WITHIN_S):
                await self.writer.drain()

    async def answer(self, *, head: bool = False) -> Answer:
        """The next one; `head`: of a HEAD request, which has no body."""
        async with asyncio.timeout(WITHIN_S):
            top = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            first, *lines = top.strip().split("\r\n")
            headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
            length = 0 if head else int(headers.get("content-length", 0))
            return Answer(int(first.split()[1]), headers, await self.reader.readexactly(length))

    async def end(self) -> bytes:
        """What comes until the server hangs up."""
        async with asyncio.timeout(WITHIN_S):
            try:
                return await self.reader.read()
            except OSError:
                return b""


@asynccontextmanager
async def connected(port: int) -> AsyncGenerator[Wire]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield Wire(reader, writer)
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def asked(port: int, raw: bytes) -> Answer:
    """One answer to these bytes, on a connection of their own."""
    async with connected(port) as wire:
        await wire.send(raw)
        return await wire.answer(head=raw.startswith(b"HEAD"))


def head(method: str, path: str, *headers: str) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: t", *headers, "", ""]).encode("latin-1")


def post(path: str, body: bytes | Any, *headers: str) -> bytes:
    """`body` other than bytes is sent as JSON."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    said = [] if any(h.lower().startswith("content-type") for h in headers) else [JSON]
    return head("POST", path, f"Content-Length: {len(raw)}", *said, *headers) + raw


JSON = "Content-Type: application/json"
