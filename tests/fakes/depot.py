"""A server that says what a test told it to say: plain HTTP on a free port of 127.0.0.1.

It remembers what it was asked. `/v1/events` sends one `streams` entry per connection and then hangs
up; when they are used up, it answers `after_streams`, or is silent until the test ends.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeAlias
from urllib.parse import unquote


@dataclass(frozen=True)
class Asked:
    method: str
    path: str  # decoded, without the query
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


Said: TypeAlias = tuple[int, Any, dict[str, str]]


@dataclass
class FakeDepot:
    """`answers`: (method, path) -> (status, body, headers), one after the other, the last for ever.
    None as the body never answers."""

    url: str = ""
    answers: dict[tuple[str, str], list[Said]] = field(default_factory=dict)
    after_streams: Said | None = None
    streams: list[list[bytes]] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def say(
        self, method: str, path: str, body: Any, status: int = 200, *, then: Any = None, **head: str
    ) -> None:
        """`then`: what it says from the second time on."""
        said = [(status, body, head)] + ([(status, then, head)] if then is not None else [])
        self.answers[method, path] = said

    def of(self, path: str) -> list[Asked]:
        return [a for a in self.asked if a.path == path]


def frame(number: int, state: str, model: str = "m", generation: int = 1, **data: Any) -> bytes:
    """A model.state event as the server sends it."""
    event = {
        "id": number, "kind": "model.state", "at": 1.7e9, "model": model, "version": 1,
        "generation": generation, "data": {"state": state, **data},
    }  # fmt: skip
    body = json.dumps(event, ensure_ascii=False)
    return f"id: {number}\nevent: model.state\ndata: {body}\n\n".encode()


class _Server(ThreadingHTTPServer):
    fake: FakeDepot


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        fake = self.server.fake
        path = unquote(self.path.partition("?")[0])
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        headers = {k.lower(): v for k, v in self.headers.items()}
        fake.asked.append(Asked(self.command, path, headers, body))
        found = fake.answers.get((self.command, path))
        if found:
            self._send(*(found.pop(0) if len(found) > 1 else found[0]))
        elif path == "/v1/events" and not fake.streams and fake.after_streams:
            self._send(*fake.after_streams)
        elif path == "/v1/events":
            self._stream(fake.streams.pop(0) if fake.streams else None)
        else:
            self._send(404, {"error": {"message": f"no {path}", "code": "not_found"}}, {})

    def _send(self, status: int, said: Any, headers: dict[str, str]) -> None:
        if said is None:
            self.server.fake.over.wait()
            return
        body = said if isinstance(said, bytes) else json.dumps(said).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _stream(self, frames: list[bytes] | None) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        self.wfile.write(b": keep-alive\n\n")
        for one in frames or ():
            self.wfile.write(one)
        if frames is None:
            self.server.fake.over.wait()


@contextmanager
def depot() -> Iterator[FakeDepot]:
    server = _Server(("127.0.0.1", 0), _Handler)
    fake = server.fake = FakeDepot(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield fake
    finally:
        fake.over.set()
        server.shutdown()
        server.server_close()
        thread.join()
