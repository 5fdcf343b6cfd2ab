"""What uvicorn costs without a model server: the limits that `bench.compare` measures against.

    python -m bench.bare echo REPO MODEL...      reads the body, answers the same bytes every time
    python -m bench.bare thread REPO MODEL...    onnxruntime in a thread, nothing parsed or checked

Prints its port when it serves. `thread` answers /MODEL, one request at a time, and /MODEL/batched,
where requests that wait while others run are joined: the batcher of a page that everybody writes.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn

from bench.dialects import HEADER_LENGTH, answer_binary
from bench.direct import session_of
from bench.subjects import SUBJECTS, Array, Subject

Answer = Callable[[bytes, int], Awaitable[tuple[list[tuple[bytes, bytes]], list[Any]]]]
JOIN_BELOW = 65536  # bytes up to which one write is cheaper than two


async def _body(receive: Any) -> bytes:
    message = await receive()
    if not message.get("more_body"):
        body: bytes = message["body"]
        return body
    chunks = [message["body"]]
    while message.get("more_body"):
        message = await receive()
        chunks.append(message["body"])
    return b"".join(chunks)


def application(routes: dict[str, Answer]) -> Any:
    name = HEADER_LENGTH.lower().encode()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        answer = routes[scope["path"]]
        body = await _body(receive)
        length = next(int(value) for key, value in scope["headers"] if key == name)
        headers, parts = await answer(body, length)
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for part in parts[:-1]:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": parts[-1]})

    return app


def _parts(subject: Subject) -> tuple[list[tuple[bytes, bytes]], bytes, bytes]:
    """The headers of every answer, its JSON, and the data of the right one."""
    y = subject.expect(subject.question())
    message = answer_binary(subject.name, y)
    headers = {**message.headers, "Content-Length": str(len(message.body))}
    raw = [(key.lower().encode(), value.encode()) for key, value in headers.items()]
    head = message.body[: int(message.headers[HEADER_LENGTH])]
    return raw, head, y.tobytes()


def echo(subject: Subject) -> Answer:
    headers, head, data = _parts(subject)
    parts = [head + data]

    async def answer(body: bytes, length: int) -> tuple[list[tuple[bytes, bytes]], list[Any]]:
        return headers, parts

    return answer


def served(subject: Subject, run: Callable[[Array], Awaitable[Array]]) -> Answer:
    headers, head, data = _parts(subject)
    small = len(data) < JOIN_BELOW

    async def answer(body: bytes, length: int) -> tuple[list[tuple[bytes, bytes]], list[Any]]:
        x = np.frombuffer(body, np.float32, offset=length).reshape(1, -1)
        y = await run(x)
        return headers, [head + y.tobytes()] if small else [head, y.data.cast("B")]

    return answer


def in_thread(session: Any) -> Callable[[Array], Awaitable[Array]]:
    def work(x: Array) -> Array:
        y: Array = session.run(None, {"x": x})[0]
        return y

    async def run(x: Array) -> Array:
        return await asyncio.get_running_loop().run_in_executor(None, work, x)

    return run


class NaiveBatcher:
    """One batch runs; who comes meanwhile waits, and goes with the next."""

    def __init__(self, run: Callable[[Array], Awaitable[Array]], most: int) -> None:
        self._run, self._most = run, most
        self._waiting: list[tuple[Array, asyncio.Future[Array]]] = []
        self._work: asyncio.Task[None] | None = None

    async def __call__(self, x: Array) -> Array:
        future: asyncio.Future[Array] = asyncio.get_running_loop().create_future()
        self._waiting.append((x, future))
        if self._work is None:
            self._work = asyncio.create_task(self._all())
        return await future

    async def _all(self) -> None:
        while self._waiting:
            batch = self._waiting[: self._most]
            del self._waiting[: self._most]
            y = await self._run(np.concatenate([x for x, _ in batch]))
            for row, (_, future) in enumerate(batch):
                if not future.done():  # its client may have gone
                    future.set_result(y[row : row + 1])
        self._work = None


def routes_of(kind: str, repo: Path, names: list[str]) -> dict[str, Answer]:
    routes: dict[str, Answer] = {}
    for subject in (SUBJECTS[name] for name in names):
        if kind == "echo":
            routes[f"/{subject.name}"] = echo(subject)
            continue
        run = in_thread(session_of(repo, subject.name))
        routes[f"/{subject.name}"] = served(subject, run)
        if subject.batch:
            batcher = NaiveBatcher(run, subject.batch)
            routes[f"/{subject.name}/batched"] = served(subject, batcher)
    return routes


def main() -> None:
    kind, repo, *names = sys.argv[1:]
    app = application(routes_of(kind, Path(repo), names))
    config = uvicorn.Config(
        app, loop="uvloop", http="httptools", lifespan="off", access_log=False, log_config=None,
        interface="asgi3", server_header=False, date_header=False, proxy_headers=False,
    )  # fmt: skip
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as sock:
        print(sock.getsockname()[1], flush=True)
        uvicorn.Server(config).run(sockets=[sock])


if __name__ == "__main__":
    main()
