"""On both routes of a real server: the clients that people have, none of them changed."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.e2e.siege import GOOD, besieged
from tests.routes import each_route, flags_of

pytestmark = pytest.mark.e2e

INFER = "/v2/models/add/infer"
TIMES = 12  # on one connection: what is remembered of a connection comes into play
X = np.array([[1, 2, 3, 4]], np.float32)
LARGE = np.arange(80_000, dtype=np.float32).reshape(-1, 4)


def is_right(body: bytes) -> bool:
    return bool(json.loads(body)["outputs"][0]["data"] == [2, 3, 4, 5])


def triton(port: int) -> None:
    client_of = pytest.importorskip("tritonclient.http", reason="needs tritonclient[http]")
    utils = pytest.importorskip("tritonclient.utils")
    with client_of.InferenceServerClient(f"127.0.0.1:{port}") as client:
        for n in range(TIMES):
            for value in (X + n, LARGE + n) if n % 10 == 0 else (X + n,):
                given = client_of.InferInput("x", list(value.shape), "FP32")
                given.set_data_from_numpy(value, binary_data=n % 3 > 0 or value is not X)
                wanted = [client_of.InferRequestedOutput("y", binary_data=n % 2 == 0)]
                found = client.infer("add", [given], outputs=wanted, request_id=str(n))
                assert np.array_equal(found.as_numpy("y"), value + 1)
                assert found.get_response()["id"] == str(n)
        with pytest.raises(utils.InferenceServerException, match="unknown model: 'no'"):
            client.infer("no", [given])
        # compressed bodies are read, and the connection is none the worse
        squeezed = client.infer("add", [given], request_compression_algorithm="gzip")
        assert np.array_equal(squeezed.as_numpy("y"), value + 1)
        pending = [client.async_infer("add", [given]) for _ in range(8)]
        assert all(p.get_result().as_numpy("y") is not None for p in pending)
        assert client.is_model_ready("add")


def standard(port: int) -> None:
    """Head and body in packets of their own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    for n in range(TIMES):
        if n % 10 == 9:
            pieces = [json.dumps(GOOD).encode()[i : i + 20] for i in range(0, 200, 20)]
            connection.request("POST", INFER, body=iter(pieces), encode_chunked=True,
                               headers={"Transfer-Encoding": "chunked"})  # fmt: skip
        else:
            connection.request(
                "POST", INFER, json.dumps(GOOD), {"Content-Type": "application/json"}
            )
        answer = connection.getresponse()
        assert answer.status == 200 and is_right(answer.read())
    connection.close()


def with_urllib3(port: int) -> None:
    """What `requests` stands on."""
    urllib3 = pytest.importorskip("urllib3")
    with urllib3.PoolManager() as pool:
        for n in range(TIMES):
            url = f"http://127.0.0.1:{port}{INFER}"
            body = GOOD if n % 5 else {"inputs": []}
            answer = pool.request("POST", url, json=body, timeout=30, retries=False)
            assert answer.status == (200 if n % 5 else 400)
            assert n % 5 == 0 or is_right(answer.data)


def with_httpx(port: int) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        for _ in range(TIMES):
            assert is_right(client.post(INFER, json=GOOD).content)
            assert client.get("/v2/models/add").json()["name"] == "add"
        assert is_right(client.post("/v2/models/a%64d/infer?x=y", json=GOOD).content)
        big = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [20_000, 4],
                           "data": LARGE.ravel().tolist()}]}  # fmt: skip
        answer = client.post(INFER, json=big).json()["outputs"][0]["data"]
        assert answer[:2] == [1, 2] and len(answer) == 80_000


def with_aiohttp(port: int) -> None:
    aiohttp = pytest.importorskip("aiohttp")

    async def speak() -> None:
        async with aiohttp.ClientSession() as session:
            url = f"http://127.0.0.1:{port}{INFER}"

            async def ask(n: int) -> bytes:
                async with session.post(url, json=GOOD, expect100=n % 4 == 0) as answer:
                    return bytes(await answer.read())

            assert all(map(is_right, await asyncio.gather(*map(ask, range(40)))))

    asyncio.run(speak())


def one_that_waits_to_be_asked(port: int) -> None:
    """As curl does with a large body."""
    body = json.dumps(GOOD).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
        heard = sock.makefile("rb")
        for _ in range(3):
            sock.sendall(b"POST %s HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n"
                         b"Expect: 100-continue\r\n\r\n" % (INFER.encode(), len(body)))  # fmt: skip
            assert heard.readline() == b"HTTP/1.1 100 Continue\r\n" and heard.readline() == b"\r\n"
            sock.sendall(body)
            assert b" 200 " in heard.readline()
            length = next(int(line.split()[1]) for line in heard if line.startswith(b"content-len"))
            assert heard.readline() == b"\r\n" and is_right(heard.read(length))
        heard.close()


CLIENTS: tuple[Callable[[int], Any], ...] = (
    triton, standard, with_urllib3, with_httpx, with_aiohttp, one_that_waits_to_be_asked
)  # fmt: skip


@each_route
async def test_clients_work_as_they_are_alone_and_all_at_once(tmp_path: Path, route: str) -> None:
    async with besieged(tmp_path, *flags_of(route)) as siege:
        for client in CLIENTS:
            await asyncio.to_thread(client, siege.port)
        await asyncio.gather(*(asyncio.to_thread(client, siege.port) for client in CLIENTS))
        assert not [line for line in siege.running.log if "Traceback" in line or "ERROR" in line]
