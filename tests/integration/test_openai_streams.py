"""Streams of text, byte by byte, and what becomes of them when somebody leaves, fails or is slow."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from typing import Any

import openai
import pytest

from repository.errors import WorkerDiedError
from repository.generate import Ended, Piece
from tests.fakes.writers import Writers
from tests.openai_clients import writing
from tests.wire import Wire, connected, post

HI: Any = [{"role": "user", "content": "hi"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def chat(**more: Any) -> bytes:
    return post(CHAT, {"model": "held", "messages": HI, "stream": True, **more})


async def chunk(wire: Wire) -> bytes:
    """One piece of a chunked body, as it was sent; b"" at the end."""
    async with asyncio.timeout(20):
        size = int(await wire.reader.readuntil(b"\r\n"), 16)
        return (await wire.reader.readexactly(size + 2))[:-2]


async def head(wire: Wire) -> str:
    async with asyncio.timeout(20):
        return (await wire.reader.readuntil(b"\r\n\r\n")).decode()


async def test_the_bytes_of_a_chat_are_those_that_openai_sends() -> None:
    async with writing() as (depot, models, _), connected(depot.port) as wire:
        await wire.send(chat(stream_options={"include_usage": True}))
        await models.asked.wait()
        (pen,) = models.pens
        pen.write("Hé")
        top = await head(wire)
        assert top.startswith("HTTP/1.1 200 OK\r\n")
        assert "content-type: text/event-stream; charset=utf-8\r\n" in top
        assert "cache-control: no-store\r\n" in top and "x-request-id: " in top
        first = await chunk(wire)
        pen.write("")  # half a character: nothing to tell
        pen.write("llo")
        second = await chunk(wire)
        pen.end("length")
        last = await chunk(wire)
        assert await chunk(wire) == b""
        id, created = re.findall(rb'"id":"(chatcmpl-[0-9a-f]{24})".*?"created":(\d+)', first)[0]
        same = (
            b'{"id":"%s","object":"chat.completion.chunk","created":%s,"model":"held",'
            b'"system_fingerprint":"fp_print-held-1","choices":[' % (id, created)
        )
        choice = b'data: %s{"index":0,"delta":%s,"logprobs":null,"finish_reason":%s}],"usage":null}'

        def event(delta: bytes, finish: bytes = b"null") -> bytes:
            return choice % (same, delta, finish) + b"\n\n"

        role = event(b'{"role":"assistant","content":"","refusal":null}')
        assert first == role + event('{"content":"Hé"}'.encode())
        assert second == event(b'{"content":"llo"}')
        usage = b'{"prompt_tokens":5,"completion_tokens":3,"total_tokens":8}'
        assert last == (
            event(b"{}", b'"length"')
            + b'data: %s],"usage":%s}\n\n' % (same, usage)
            + b"data: [DONE]\n\n"
        )


async def test_the_bytes_of_a_completion_are_those_that_openai_sends() -> None:
    async with writing() as (depot, models, _), connected(depot.port) as wire:
        await wire.send(post(TEXT, {"model": "held", "prompt": "x", "stream": True}))
        await models.asked.wait()
        models.pens[0].write("a")
        await head(wire)
        first = await chunk(wire)
        models.pens[0].end()
        last = await chunk(wire)
        events = [json.loads(e[6:]) for e in (first + last).split(b"\n\n") if e[6:7] == b"{"]
        for found in events:
            assert found.pop("created") and found.pop("id").startswith("cmpl-")
            assert (found.pop("object"), found.pop("model")) == ("text_completion", "held")
            assert found.pop("system_fingerprint") == "fp_print-held-1"
        none = {"index": 0, "logprobs": None}
        assert events == [
            {"choices": [{"text": "a", "finish_reason": None, **none}]},
            {"choices": [{"text": "", "finish_reason": "stop", **none}]},
        ]
        assert last.endswith(b"\n\ndata: [DONE]\n\n")


async def test_an_error_after_the_first_piece_is_the_last_event_and_not_followed_by_done() -> None:
    async with writing() as (depot, models, client):
        async with connected(depot.port) as wire:
            await wire.send(chat(n=2))
            await depot.until(lambda: len(models.pens) == 2)
            models.pens[0].write("a")
            await head(wire)
            await chunk(wire)
            models.pens[1].fail(WorkerDiedError("its worker has died"))
            event = await chunk(wire)
            assert await chunk(wire) == b""
            assert event.startswith(b'data: {"error":{') and event.count(b"\n\n") == 1
            error = json.loads(event[6:])["error"]
            assert error == {
                "message": "its worker has died", "type": "server_error", "param": None,
                "code": "worker_died",
            }  # fmt: skip
            assert models.pens[0].gone
            await wire.send(post(TEXT, {"model": "plain", "prompt": "the connection lives on"}))
            assert (await wire.answer()).status == 200
        models.pens.clear()
        stream = await asyncio.gather(_told(client), _failing(depot, models))
        with pytest.raises(openai.APIError, match="its worker has died"):
            [c async for c in stream[0]]
        counts = await depot.counts()
        assert any("held" in k and "backend_error" in k and v == 2 for k, v in counts.items())


async def _told(client: openai.AsyncOpenAI) -> Any:
    return await client.chat.completions.create(model="held", messages=HI, stream=True)


async def _failing(depot: Any, models: Writers) -> None:
    await depot.until(lambda: bool(models.pens))
    models.pens[0].write("a")
    await asyncio.sleep(0)
    models.pens[0].fail(WorkerDiedError("its worker has died"))


async def test_a_client_that_leaves_frees_its_sequences_at_once() -> None:
    """With a stream before and after its first piece, and without a stream."""
    for stream, pieces in ((True, 1), (True, 0), (False, 1)):
        async with writing() as (depot, models, _):
            async with connected(depot.port) as wire:
                await wire.send(chat(stream=stream, n=2))
                await depot.until(lambda models=models: len(models.pens) == 2)
                for _ in range(pieces):
                    models.pens[0].write("a")
                if stream and pieces:
                    await head(wire)
            await depot.until(lambda models=models: all(pen.gone for pen in models.pens))
            await depot.until(lambda models=models: models.leases == 0)
            counts = await depot.counts()
            assert any('"canceled"' in k and v == 1 for k, v in counts.items()), counts


async def test_a_client_that_hangs_up_politely_is_noticed_too() -> None:
    async with writing() as (depot, models, client):
        asking = asyncio.ensure_future(_told(client))
        await models.asked.wait()
        models.pens[0].write("a")
        stream = await asking
        await anext(stream)
        await stream.close()
        await depot.until(lambda: models.pens[0].gone)


async def test_a_slow_reader_holds_up_nobody_and_gets_what_waits_in_one_go() -> None:
    async with writing() as (depot, models, client):
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(sock, ("127.0.0.1", depot.port))
            await loop.sock_sendall(sock, chat())
            await models.asked.wait()
            (pen,) = models.pens
            text = "x" * 4000
            for _ in range(2000):  # 8 MB, much more than sockets and buffers hold
                pen.write(text)
            pen.end()
            other = await client.completions.create(model="talker", prompt="quick")
            assert other.choices[0].finish_reason == "stop" and models.leases == 1
            heard = bytearray()
            while not heard.endswith(b"0\r\n\r\n"):
                heard += await loop.sock_recv(sock, 1 << 20)
            assert heard.count(text.encode()) == 2000 and b"data: [DONE]" in heard
            assert heard.count(b"\r\n") < 200  # lines of the head, and two for each send


async def test_a_model_that_takes_long_gives_signs_of_life_that_the_client_does_not_see() -> None:
    async with writing(keepalive=0.1) as (depot, models, client):
        async with connected(depot.port) as wire:
            await wire.send(chat())
            assert (await head(wire)).startswith("HTTP/1.1 200")
            assert [await chunk(wire) for _ in range(2)] == [b": keep-alive\n\n"] * 2
            models.pens[0].write("a")
            async with asyncio.timeout(20):
                while (said := await chunk(wire)) == b": keep-alive\n\n":
                    pass
            assert b'"content":"a"' in said
            models.pens[0].end()
        models.pens.clear()
        stream = await _told(client)  # told that it lives before there was a piece
        models.pens[0].write("a")
        models.pens[0].end()
        assert "".join([c.choices[0].delta.content or "" async for c in stream]) == "a"


async def test_pieces_that_come_at_once_wait_for_nothing_and_stay_in_order() -> None:
    async with writing() as (_, models, client):
        stream, _ = await asyncio.gather(_told(client), _many(models))
        texts = [c.choices[0].delta.content or "" async for c in stream]
        assert "".join(texts) == "".join(map(str, range(300)))


async def _many(models: Writers) -> None:
    await models.asked.wait()
    for number in range(300):
        models.pens[0].write(str(number))
        if number % 7 == 0:
            await asyncio.sleep(0)
    models.pens[0].end()


async def test_a_stream_that_runs_when_the_server_drains_is_written_to_its_end() -> None:
    async with writing() as (depot, models, client):
        asking = asyncio.ensure_future(_told(client))
        await models.asked.wait()
        models.pens[0].write("a")
        stream = await asking
        models.drain()
        depot.server.drain("the test says so")
        models.pens[0].write("b")
        models.pens[0].end()
        assert "".join([c.choices[0].delta.content or "" async for c in stream]) == "ab"


async def test_a_text_that_is_broken_off_unasked_is_an_error_and_not_an_end() -> None:
    async with writing() as (_, models, client):
        asking = asyncio.ensure_future(
            client.completions.create(model="held", prompt="x", stream=False)
        )
        await models.asked.wait()
        models.pens[0]._tell(Piece("a", [1]))
        models.pens[0].answer.set_result(Ended("cancelled", 1, 1))
        with pytest.raises(openai.InternalServerError, match="broken off"):
            await asking
