"""Clients that ask a model y = x + value without a pause, in a process of their own.

    python -m tests.e2e.load URL MODEL CLIENTS LEAST [ROWS]

Each client keeps one connection and has one request under way. It goes on until stdin ends and all
of them together have made LEAST requests; then stdout gets one `Load` as JSON. Every element of an
answer must agree on the value: an answer from two generations, or to another's question, would not.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import msgspec
import numpy as np

ROWS = 8  # of a request, where nothing else is said
QUESTIONS = 16  # different ones that a client asks in turn


class Load(msgspec.Struct):
    """One entry per answer: wall seconds when it was asked and answered, and the value. `failed`
    says of each other request what came instead."""

    began: list[float] = msgspec.field(default_factory=list)
    ended: list[float] = msgspec.field(default_factory=list)
    values: list[float] = msgspec.field(default_factory=list)
    failed: list[str] = msgspec.field(default_factory=list)

    @property
    def count(self) -> int:
        return len(self.values) + len(self.failed)


class Asking:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def stop(self) -> Load:
        """Lets the clients finish; what they saw."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.stdout is not None
        out = await self._process.stdout.read()
        assert await self._process.wait() == 0
        assert out.endswith(b"}"), f"{len(out)} bytes, which end with {out[-80:]!r}"
        return msgspec.json.decode(out, type=Load)


@asynccontextmanager
async def asking(url: str, model: str, *, clients: int = 8, least: int) -> AsyncIterator[Asking]:
    """All clients have their first answer when the block begins."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.e2e.load", url, model, str(clients), str(least)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 30,
    )
    assert process.stdout is not None
    try:
        assert await process.stdout.readline() == b"asking\n"
        yield Asking(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


# the process -------------------------------------------------------------------------------------


def questions(
    url: str, model: str, client: int, rows: int = ROWS
) -> Iterator[tuple[bytes, np.ndarray]]:
    """Requests in the binary form, and the x of each."""
    host = url.removeprefix("http://")
    for number in range(QUESTIONS):
        x = np.arange(rows * 4, dtype=np.float32).reshape(rows, 4)
        x += 1000 * client + 100 * number  # sums are exact: all are small whole numbers
        size = {"binary_data_size": x.nbytes}
        tensor = {"name": "x", "datatype": "FP32", "shape": [rows, 4], "parameters": size}
        head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
        body = head + x.tobytes()
        lines = (
            f"POST /v2/models/{model}/infer HTTP/1.1",
            f"Host: {host}",
            f"Inference-Header-Content-Length: {len(head)}",
            f"Content-Length: {len(body)}",
        )
        yield "\r\n".join((*lines, "", "")).encode() + body, x


async def exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes
) -> tuple[int, int, bytes]:
    """(status, length of the JSON part, body)."""
    writer.write(request)
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    first, *lines = head[:-4].split(b"\r\n")
    fields = dict(line.split(b": ", 1) for line in lines)
    body = await reader.readexactly(int(fields[b"content-length"]))
    return int(first.split()[1]), int(fields.get(b"inference-header-content-length", 0)), body


def value_of(body: bytes, at: int, x: np.ndarray) -> float:
    y = np.frombuffer(body, np.float32, offset=at).reshape(x.shape)
    values = y - x
    least, most = float(values.min()), float(values.max())
    if least != most:
        raise ValueError(f"one answer with several values: {least} to {most}")
    return least


async def ask(url: str, model: str, number: int, rows: int, load: Load, told: Told) -> None:
    host, port = url.removeprefix("http://").split(":")
    asked = list(questions(url, model, number, rows))
    turn = 0
    while not told.over(load):
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            while not told.over(load):
                request, x = asked[turn % QUESTIONS]
                turn += 1
                began = time.time()
                status, at, body = await exchange(reader, writer, request)
                ended = time.time()
                if status != 200:
                    raise ValueError(f"{status}: {body!r}")
                load.values.append(value_of(body, at, x))
                load.began.append(began)
                load.ended.append(ended)
                told.answered(number)
        except (ValueError, OSError, asyncio.IncompleteReadError) as error:
            load.failed.append(f"{type(error).__name__}: {error}")
        finally:
            writer.close()


class Told:
    """When to say that all are asking, and when to stop."""

    def __init__(self, clients: int, least: int) -> None:
        self._silent = set(range(clients))
        self._least = least
        self.stop = False

    def answered(self, number: int) -> None:
        if self._silent:
            self._silent.discard(number)
            if not self._silent:
                sys.stdout.write("asking\n")
                sys.stdout.flush()

    def over(self, load: Load) -> bool:
        return self.stop and load.count >= self._least


async def run(url: str, model: str, clients: int, least: int, rows: int = ROWS) -> Load:
    load, told = Load(), Told(clients, least)
    async with asyncio.TaskGroup() as all_of_them:
        for number in range(clients):
            all_of_them.create_task(ask(url, model, number, rows, load, told))
        # A thread: it wakes at the end of the input and at nothing else.
        await asyncio.to_thread(sys.stdin.buffer.read)
        told.stop = True
    return load


def main() -> None:
    import uvloop

    url, model, *numbers = sys.argv[1:]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        load = runner.run(run(url, model, *map(int, numbers)))
    sys.stdout.buffer.write(msgspec.json.encode(load))
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
