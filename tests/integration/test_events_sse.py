"""GET /v1/events on a real socket: what is sent, to whom, and when it ends."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import httpx
import pytest

from repository.events import KEPT, PENDING
from server import streams
from tests.fakes.repository import FakeRepository
from tests.fakes.serving import listening, serving

Frame = dict[str, str]


class Reader:
    """Frames of one stream, one at a time; a comment is a frame with the key ""."""

    def __init__(self, lines: AsyncIterator[str]) -> None:
        self._lines = lines

    async def frame(self) -> Frame:
        found: Frame = {}
        async for line in self._lines:
            if line == "":
                return found
            key, _, value = line.partition(":")
            found[key] = value.strip()
        raise EOFError

    async def event(self) -> Frame:
        while "" in (found := await self.frame()):
            pass
        return found

    async def rest(self) -> list[Frame]:
        found: list[Frame] = []
        try:
            while True:
                found.append(await self.event())
        except EOFError:
            return found


@asynccontextmanager
async def following(
    url: str, query: str = "", headers: dict[str, str] | None = None
) -> AsyncIterator[Reader]:
    """Opened: what is published from now on is seen."""
    async with (
        httpx.AsyncClient(timeout=30) as client,
        client.stream("GET", f"{url}/v1/events{query}", headers=headers) as answer,
    ):
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        reader = Reader(answer.aiter_lines())
        assert "" in await reader.frame()
        yield reader


def listeners(models: FakeRepository) -> int:
    return len(models.events._listeners)


async def until(promise: Callable[[], bool]) -> None:
    """Gives the other tasks and the sockets their turns until it holds."""
    async with asyncio.timeout(10):
        while True:
            if promise():
                return
            await asyncio.sleep(0)


async def test_an_event_has_its_id_its_kind_and_one_line_of_json() -> None:
    models = FakeRepository()
    models.add("a")
    async with listening(models) as (_, url), following(url) as reader:
        gen = models.begin("a")
        gen.fault(RuntimeError("line one\nline two"))
        models.events.publish("model.problem", "a", message="line one\nline two")
        frame = await reader.event()
        assert frame["event"] == "model.state"
        body = json.loads(frame["data"])
        assert body["id"] == int(frame["id"])
        assert (body["model"], body["version"], body["generation"]) == ("a", 1, gen.serial)
        frame = await reader.event()
        assert json.loads(frame["data"])["data"]["message"] == "line one\nline two"


@pytest.mark.parametrize("way", ["header", "query"])
async def test_who_comes_back_gets_what_was_missed(way: str) -> None:
    models = FakeRepository()
    sent = [models.events.publish("tick", n=n) for n in range(400)]
    last = str(sent[9].id)
    query = f"?after={last}" if way == "query" else ""
    headers = {"last-event-id": last} if way == "header" else None
    async with listening(models) as (_, url), following(url, query, headers) as reader:
        for event in sent[10:]:
            assert (await reader.event())["id"] == str(event.id)


async def test_who_was_away_too_long_is_told_how_much_is_lost() -> None:
    models = FakeRepository()
    for n in range(KEPT + 100):
        models.events.publish("tick", n=n)
    async with listening(models) as (_, url), following(url, "?after=50") as reader:
        lost = await reader.event()
        assert lost["event"] == "lost"
        assert json.loads(lost["data"])["data"]["count"] == 50
        assert (await reader.event())["id"] == "101"


async def test_an_id_of_an_earlier_life_of_the_server_hides_nothing() -> None:
    models = FakeRepository()
    models.events.publish("tick")
    async with listening(models) as (_, url), following(url, "?after=99999") as reader:
        assert (await reader.event())["id"] == "1"


@pytest.mark.parametrize("after", ["x", "-1", "1.5", "9" * 40, "9" * 5000, "٣"])
async def test_an_id_that_is_no_number_is_400(after: str) -> None:
    async with serving(FakeRepository()) as client:
        answer = await client.get("/v1/events", params={"after": after})
        assert answer.status_code == 400 and "id" in answer.json()["detail"]


async def test_the_filter_keeps_one_model_and_what_belongs_to_none() -> None:
    models = FakeRepository()
    async with listening(models) as (_, url), following(url, "?model=org/a") as reader:
        models.events.publish("model.added", "b")
        models.events.publish("model.added", "org/a")
        models.events.publish("server.ready")
        assert json.loads((await reader.event())["data"])["model"] == "org/a"
        assert (await reader.event())["event"] == "server.ready"


async def test_a_quiet_stream_shows_signs_of_life() -> None:
    models = FakeRepository()
    async with listening(models, keepalive=0.01) as (_, url), following(url) as reader:
        for _ in range(3):
            assert "" in await reader.frame()
        models.events.publish("tick")
        assert (await reader.event())["event"] == "tick"


async def test_a_client_that_leaves_is_forgotten_at_once() -> None:
    models = FakeRepository()
    async with listening(models) as (_, url):
        async with following(url):
            assert listeners(models) == 1
        await until(lambda: listeners(models) == 0)


async def test_the_stream_ends_with_a_word_when_the_server_drains() -> None:
    models = FakeRepository()
    async with listening(models) as (server, url), following(url) as reader:
        server.drain("test")
        ended = await reader.rest()
        assert ended[-1]["event"] == "server.draining"


async def test_a_client_that_never_reads_holds_up_neither_events_nor_the_drain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streams, "LAST_WORDS_S", 0.05)
    models = FakeRepository()
    async with listening(models) as (server, url):
        address = ("127.0.0.1", httpx.URL(url).port)
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(deaf, address)
            await loop.sock_sendall(deaf, b"GET /v1/events HTTP/1.1\r\nhost: test\r\n\r\n")
            await until(lambda: listeners(models) == 1)
            async with following(url) as reader:
                for _ in range(3 * PENDING):
                    models.events.publish("tick", padding="x" * 20_000)
                    assert (await reader.event())["event"] in ("tick", "lost")
                server.drain("test")
                await reader.rest()
            await until(lambda: listeners(models) == 0)


async def test_a_slow_reader_is_told_how_many_it_missed() -> None:
    """Between two turns of the loop more happens than may wait."""
    models = FakeRepository()
    async with listening(models) as (_, url), following(url) as reader:
        for n in range(PENDING + 50):
            models.events.publish("tick", n=n)
        first = await reader.event()
        assert first["event"] == "lost"
        lost = json.loads(first["data"])["data"]["count"]
        numbers = [json.loads((await reader.event())["data"])["data"]["n"] for _ in range(PENDING)]
        assert lost == 50 and numbers == list(range(50, PENDING + 50))


def test_a_frame_is_what_the_standard_says() -> None:
    assert streams.frame(b"{}", id=3, event="a.b") == b"id: 3\nevent: a.b\ndata: {}\n\n"
    assert streams.frame(b"1") == b"data: 1\n\n"
