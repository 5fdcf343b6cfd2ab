"""Two real servers over the same models, one a route: bad input, hard leaving, and their end."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.e2e.server import REQUEST, add_model, open_gate, reached, serving
from tests.e2e.siege import Siege, besieged, four_models, request, until
from tests.e2e.test_bad_input import MAX_BODY, RAW, SHAPES, TEXTS, WHOLE, in_two
from tests.models import identity_onnx
from tests.routes import BOTH, difference, each_route, flags_of, plain
from tests.wire import Answer, connected, head, post

pytestmark = pytest.mark.e2e

MIB = 1 << 20
INFER = "/v2/models/add/infer"


@asynccontextmanager
async def pair(tmp_path: Path, *flags: str) -> AsyncIterator[list[Siege]]:
    async with AsyncExitStack() as stack:
        made = []
        for number, route in enumerate(BOTH):
            folder = tmp_path / f"{number}-{route}"
            folder.mkdir()
            made.append(stack.enter_async_context(besieged(folder, *flags, *flags_of(route))))
        yield list(await asyncio.gather(*made))


async def both_say(sieges: list[Siege], label: str, raw: bytes) -> bytes:
    """Until it hangs up on us: the request behind the good or bad one asks for that."""
    said = [plain(await last_words(siege.port, raw)) for siege in sieges]
    if said[0] != said[1]:
        pytest.fail(f"{label}: {difference([raw], *said)}", pytrace=False)
    return said[0]


async def last_words(port: int, raw: bytes) -> bytes:
    async with connected(port) as wire:
        await wire.send(raw + post(INFER, request(), "Connection: close"))
        return await wire.end()


async def test_all_bad_input_is_answered_with_the_same_bytes(tmp_path: Path) -> None:
    cases = {f"input: {k}": post(INFER, request(v)) for k, v in SHAPES.items()}
    cases |= {f"body: {k}": post(INFER, v) for k, v in WHOLE.items()}
    cases |= {f"text: {k}": post(INFER, v) for k, v in TEXTS.items()}
    cases |= {f"wire: {k}": v for k, v in RAW.items() if not k.startswith("chunks beyond")}
    async with pair(tmp_path, *MAX_BODY) as sieges:
        for label, raw in cases.items():
            heard = await both_say(sieges, label, raw)
            assert heard.startswith((b"HTTP/1.1 4", b"HTTP/1.1 5")), label
        counted = [await requests_of(siege) for siege in sieges]
    assert counted[0] == counted[1] and len(counted[0]) > 1


async def requests_of(siege: Siege) -> list[str]:
    page = (await siege.client.get("/metrics")).text
    kinds = ("modeldepot_inference_requests_total{", "modeldepot_load_shed_total{")
    return sorted(line for line in page.splitlines() if line.startswith(kinds))


def big_models(repo: Path) -> None:
    four_models(repo)
    identity_onnx(repo / "big" / "1" / "model.onnx", "FP32", (-1,))


def big(value: np.ndarray[Any, Any]) -> bytes:
    """Bytes both ways."""
    x = {"name": "x", "datatype": "FP32", "shape": list(value.shape),
         "parameters": {"binary_data_size": value.nbytes}}  # fmt: skip
    header = json.dumps(request(x, parameters={"binary_data_output": True})).encode()
    return in_two(header, value.tobytes(), "big")


def fds(siege: Siege) -> int:
    return int(psutil.Process(siege.running.process.pid).num_fds())


def tear(port: int, said: bytes, *, hear: int = 0) -> None:
    """Says it, hears so much, and is torn away."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
        sock.sendall(said)
        while hear > 0:
            hear -= len(sock.recv(hear))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@each_route
async def test_large_bodies_and_who_tears_them_off_leave_memory_and_files_as_they_were(
    tmp_path: Path, route: str
) -> None:
    value = np.arange(MIB, dtype=np.float32)
    whole = big(value)
    one = post("/v2/models/big/infer", request({"name": "x", "datatype": "FP32", "shape": [1],
                                                "data": [1]}))  # fmt: skip
    async with besieged(tmp_path, *flags_of(route), build=big_models) as siege:

        async def right() -> bool:
            async with connected(siege.port) as wire:
                await wire.send(whole + one + whole)
                first, second, third = [await wire.answer() for _ in range(3)]
            return data_of(first) == data_of(third) == value.tobytes() and second.status == 200

        for at in (100, len(whole) // 2, len(whole) - 1, len(whole)):
            await asyncio.gather(
                *(asyncio.to_thread(tear, siege.port, whole[:at]) for _ in range(4))
            )
        assert await right()
        files, rss = fds(siege), siege.rss()
        for n in range(100):
            await asyncio.to_thread(tear, siege.port, whole[: len(whole) // (1 + n % 3)])
        for _ in range(20):
            await asyncio.to_thread(tear, siege.port, whole, hear=1024)
        assert await right()
        await until(lambda: fds(siege) <= files)
        assert siege.rss() - rss < 64 * MIB
        shown = (await siege.client.get("/v1/models/big")).json()
        assert [g["leases"] for g in shown["generations"] if g["state"] == "ready"] == [0]
        assert not [line for line in siege.running.log if "Traceback" in line or "ERROR" in line]


def data_of(answer: Answer) -> bytes:
    return answer.body[int(answer.headers["inference-header-content-length"]) :]


@each_route
async def test_who_does_not_read_does_not_make_the_server_grow(tmp_path: Path, route: str) -> None:
    whole = big(np.arange(MIB // 4, dtype=np.float32))
    async with besieged(tmp_path, *flags_of(route), build=big_models) as siege:
        assert await siege.works()
        rss = siege.rss()
        async with AsyncExitStack() as stack:
            wires = [await stack.enter_async_context(connected(siege.port)) for _ in range(4)]
            for wire in wires:
                wire.writer.transport.pause_reading()  # type: ignore[attr-defined]
            sending = [asyncio.create_task(send_all(wire.writer, whole * 50)) for wire in wires]
            for _ in range(30):
                assert await siege.works()
            assert siege.rss() - rss < 192 * MIB
            for task in sending:
                task.cancel()
            for wire in wires:
                wire.writer.transport.abort()
        assert await siege.works()


async def send_all(writer: asyncio.StreamWriter, raw: bytes) -> None:
    with suppress(OSError):
        writer.write(raw)
        await writer.drain()


@each_route
async def test_requests_in_flight_are_answered_when_the_server_ends(
    tmp_path: Path, repo: Path, gates: Path, route: str
) -> None:
    """And hear that this was the last answer on their connection; idle ones are closed."""
    add_model(repo, gates, "held", infer="model")
    raw = post("/v2/models/held/infer", REQUEST)
    async with serving(repo, "--settle", "0.1", *flags_of(route)) as running:
        await running.said("ready after")
        port = int(running.url.rpartition(":")[2])
        async with connected(port) as busy, connected(port) as idle:
            await idle.send(head("GET", "/v2/health/live"))
            await idle.answer()
            await busy.send(raw)
            await reached(gates, "model")
            running.signal(signal.SIGTERM)
            await running.said("draining")
            assert await idle.end() == b""
            open_gate(gates, "model")
            answer = await busy.answer()
            assert answer.status == 200 and json.loads(answer.body)["outputs"][0]["data"] == [1, 2]
            assert await busy.end() == b""
        assert await running.code() == 0
