"""On both routes: large JSON is read and written elsewhere, and a client does not see the difference."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
import psutil

from server.scribes.scribes import LARGE_ANSWER, LARGE_JSON
from tests.routes import (
    CLOSE,
    Depot,
    answers_in,
    asking,
    both,
    each_route,
    in_uvloop,
    infer,
    play,
    routed,
    same,
)
from tests.wire import connected, head

SIZE = 4 * LARGE_ANSWER


def padded(text: str) -> bytes:
    """The same, so long that a scribe has to read it."""
    return text.encode() + b" " * LARGE_JSON


LARGE = padded(json.dumps(asking(1, 2, 3, float("nan"))))
BROKEN = padded(json.dumps(asking(1, 2, 3, 4)).replace("[2, 2]", "[2, 3]"))


def scribes() -> list[int]:
    return [p.pid for p in psutil.Process().children() if "server.scribes.child" in p.cmdline()]


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


async def warm(depot: Depot) -> int:
    """The scribe that has read a request."""
    await play(depot.port, [infer("double", LARGE, CLOSE)])
    (pid,) = scribes()
    return pid


@each_route
@in_uvloop
async def test_a_small_request_needs_no_scribe_and_a_large_one_does(route: str) -> None:
    async with routed(route) as depot:
        await play(depot.port, [infer("double", None, CLOSE)])
        assert scribes() == []
        (answer,) = answers_in(await play(depot.port, [infer("double", LARGE, CLOSE)]))
        assert answer.status == 200
        values = json.loads(answer.body)["outputs"][0]["data"]
        assert np.array_equal(values, [2, 4, 6, np.nan], equal_nan=True)
        assert len(scribes()) == 1
    assert scribes() == []


@each_route
@in_uvloop
async def test_a_large_answer_is_written_by_a_scribe(route: str) -> None:
    async with routed(route) as depot:
        (answer,) = answers_in(await play(depot.port, [infer("large", asking(SIZE, 0), CLOSE)]))
        assert len(scribes()) == 1
        told = json.loads(answer.body)
        assert answer.headers["content-type"] == "application/json"
        assert np.array_equal(told["outputs"][0]["data"], np.arange(SIZE).astype("u1"))


@each_route
@in_uvloop
async def test_others_are_answered_while_a_scribe_is_busy(route: str) -> None:
    async with routed(route) as depot, connected(depot.port) as patient:
        pid = await warm(depot)
        with stopped(pid):
            await patient.send(infer("double", LARGE))
            (answer,) = answers_in(await play(depot.port, [infer("double", None, CLOSE)]))
            assert answer.status == 200
            (answer,) = answers_in(
                await play(depot.port, [head("GET", "/health", CLOSE) + b"\r\n"])
            )
            assert answer.status == 200
        assert (await patient.answer()).status == 200


@each_route
@in_uvloop
async def test_a_scribe_that_dies_is_the_servers_failure_and_safe_to_retry(route: str) -> None:
    async with routed(route) as depot, connected(depot.port) as client:
        pid = await warm(depot)
        with stopped(pid):
            await client.send(infer("double", LARGE))
            for _ in range(20):  # in the same loop: meanwhile the large one has been taken in
                await play(depot.port, [infer("double", None, CLOSE)])
            os.kill(pid, signal.SIGKILL)
            answer = await client.answer()
        assert (answer.status, answer.headers["x-modeldepot-code"]) == (500, "worker_died")
        assert answer.headers["retry-after"] == "1"
        await client.send(infer("double", LARGE))
        assert (await client.answer()).status == 200


@each_route
@in_uvloop
async def test_a_client_that_leaves_its_large_request_leaves_nothing(route: str) -> None:
    async with routed(route) as depot:
        pid = await warm(depot)
        with stopped(pid):
            async with connected(depot.port) as client:
                await client.send(infer("double", LARGE))
                await play(depot.port, [infer("double", None, CLOSE)])
            await depot.quiet()
        assert (await play(depot.port, [infer("double", LARGE, CLOSE)])).startswith(b"HTTP/1.1 200")


@in_uvloop
async def test_the_routes_say_the_same_of_large_json() -> None:
    async with both() as depots:
        for model, body in (
            ("double", LARGE),
            ("double", BROKEN),
            ("double", padded("{")),
            ("nobody", LARGE),
            ("large", asking(SIZE, 0)),
            ("large", asking(SIZE, 0, id="7", outputs=[{"name": "other"}])),
        ):
            assert await same(depots, infer(model, body, CLOSE))


@each_route
@in_uvloop
async def test_large_json_is_refused_in_the_words_for_small(route: str) -> None:
    async with routed(route) as depot:
        heard = [
            answers_in(await play(depot.port, [infer("double", body, CLOSE)]))[0]
            for body in (BROKEN, BROKEN.strip())
        ]
        assert heard[0].status == heard[1].status == 500  # as Triton counts elements
        assert heard[0].text == heard[1].text
