"""A real server that encrypts, asks for keys and for certificates, over HTTP and gRPC; what runs at its
end is answered. And ports that cannot be had."""

from __future__ import annotations

import re
import signal
import socket
import ssl
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tests.e2e.server import add_model, open_gate, reached, serving
from tests.integration.test_routes_keys import write_keys
from tests.tls import CA, CLIENT, CLIENT_KEY, FLAGS

pytestmark = pytest.mark.e2e

HTTPS = r"serving (https://\S+)"
CHECK = "/grpc.health.v1.Health/Check"
AUTHORIZED = (("authorization", "Bearer key-i"),)
LARGE = 600_000  # elements: more than is taken in with a request's head


def credentials(*, certificate: bool = True) -> Any:
    mine = (CLIENT_KEY.read_bytes(), CLIENT.read_bytes()) if certificate else (None, None)
    return grpc.ssl_channel_credentials(CA.read_bytes(), *mine)


def context(*, certificate: bool = True) -> ssl.SSLContext:
    found = ssl.create_default_context(cafile=str(CA))
    if certificate:
        found.load_cert_chain(CLIENT, CLIENT_KEY)
    return found


def asked_of(model: str, *values: float) -> service_pb2.ModelInferRequest:
    asked = service_pb2.ModelInferRequest(model_name=model)
    one = asked.inputs.add(name="x", datatype="FP32", shape=[len(values)])
    one.contents.fp32_contents.extend(values)
    return asked


async def test_both_protocols_are_encrypted_and_what_runs_at_the_end_is_answered(
    repo: Path, gates: Path, tmp_path: Path
) -> None:
    add_model(repo, gates, "held", infer="infer")
    add_model(repo, gates, "plain")
    keys = write_keys(tmp_path / "keys.yaml", inference="key-i", admin="key-a")
    flags = (*FLAGS, "--tls-client-ca", str(CA), "--api-keys", str(keys), "--metrics-port", "0")
    async with serving(repo, *flags, wait_for=HTTPS, grpc=True) as server:
        await server.said("ready after")
        await over_https(server.url, (await server.said(r"metrics (https://\S+)"))[1])
        await nobody_else(server.grpc)
        async with grpc.aio.secure_channel(server.grpc, credentials()) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            assert await channel.unary_unary(CHECK)(b"") == b"\x08\x01"
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await stub.ModelInfer(asked_of("plain", 1))
            assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED
            running = stub.ModelInfer(asked_of("held", 1, 2), metadata=AUTHORIZED)
            stream = stub.ModelStreamInfer(metadata=AUTHORIZED)
            await stream.wait_for_connection()
            await stream.write(asked_of("plain", 3))
            first = await stream.read()
            assert np.frombuffer(first.infer_response.raw_output_contents[0], "<f4") == [3]
            await reached(gates, "infer")
            server.signal(signal.SIGTERM)
            await server.said("draining")
            open_gate(gates, "infer")
            answer = await running
            assert np.frombuffer(answer.raw_output_contents[0], "<f4").tolist() == [1, 2]
            assert await stream.code() is grpc.StatusCode.UNAVAILABLE
        assert await server.code() == 0
    ours = re.compile(r"\d{4}-\d\d-\d\dT.* (INFO|WARNING) ")
    assert [line for line in server.log if not ours.match(line)] == []


async def over_https(url: str, metrics: str) -> None:
    """A small request, one whose body comes straight into its place, and the metrics' own port."""
    headers = {"x-api-key": "key-a"}
    async with httpx.AsyncClient(base_url=url, verify=context(), headers=headers) as client:
        assert (await client.get("/v2/health/live")).status_code == 200
        for count in (2, LARGE):
            values = np.arange(count, dtype=np.float32)
            head = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[%d],"parameters":' % count
            head += b'{"binary_data_size":%d}}],"parameters":{"binary_data_output":true}}' % (
                4 * count
            )
            answer = await client.post(
                "/v2/models/plain/infer",
                content=head + values.tobytes(),
                headers={"inference-header-content-length": str(len(head))},
            )
            assert answer.status_code == 200 and answer.content.endswith(values.tobytes())
        assert b"modeldepot_" in (await client.get(metrics)).content
    async with httpx.AsyncClient(base_url=url, verify=context(certificate=False)) as other:
        with pytest.raises(httpx.TransportError):
            await other.get("/v2/health/live")


async def nobody_else(address: str) -> None:
    """Without a certificate, or without TLS, nothing is answered."""
    channels = (
        grpc.aio.secure_channel(address, credentials(certificate=False)),
        grpc.aio.insecure_channel(address),
    )
    for channel in channels:
        async with channel:
            with pytest.raises(grpc.aio.AioRpcError):
                await channel.unary_unary(CHECK)(b"", timeout=10)


async def test_a_grpc_port_that_is_taken_is_told_before_anything_is_started(repo: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        flags = ("--allow-grpc", "--grpc-port", str(taken.getsockname()[1]))
        async with serving(repo, *flags, wait_for="--grpc-port: cannot listen on (.*)") as server:
            assert "choose another with --grpc-port (or --no-allow-grpc)" in server.log[-1]
            assert await server.code() == 1


async def test_a_certificate_that_cannot_be_used_ends_the_start(repo: Path) -> None:
    flags = ("--tls-certificate", str(CA), "--tls-key", str(CLIENT_KEY))
    async with serving(repo, *flags, wait_for="--tls-key: (.*)") as server:
        assert "'client.key' is not the key of 'ca.pem'" in server.log[-1]
        assert await server.code() == 1


async def test_a_second_signal_ends_it_at_once_whatever_runs(repo: Path, gates: Path) -> None:
    add_model(repo, gates, "held", infer="infer")
    async with serving(repo, grpc=True) as server:
        await server.said("ready after")
        async with grpc.aio.insecure_channel(server.grpc) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            running = stub.ModelInfer(asked_of("held", 1))
            await reached(gates, "infer")
            server.signal(signal.SIGTERM)
            await server.said("draining")
            server.signal(signal.SIGTERM)
            with pytest.raises(grpc.aio.AioRpcError):
                await running
        assert await server.code() == 1


async def test_it_listens_where_it_is_told_also_over_ipv6(repo: Path) -> None:
    async with serving(repo, "--host", "::1", grpc=True) as server:
        assert server.grpc.startswith("[::1]:")
        async with grpc.aio.insecure_channel(server.grpc) as channel:
            assert await channel.unary_unary(CHECK)(b"", wait_for_ready=True)
