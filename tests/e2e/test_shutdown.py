"""How a real server starts and ends: signals, exit codes, and what is left behind (nothing)."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from pathlib import Path

import httpx
import pytest

from tests.e2e.server import (
    REQUEST,
    Running,
    add_model,
    gone,
    open_gate,
    reached,
    serving,
)

pytestmark = pytest.mark.e2e


def left_behind(repo: Path) -> list[str]:
    """Files in the state folder that belong to a running server, and shared memory."""
    state = repo.parent / "state"
    found = [str(p) for p in state.rglob("*") if p.is_file() or p.is_socket()]
    kept = ("journal.", "needs.jsonl")
    found = [path for path in found if not Path(path).name.startswith(kept)]
    return found + [name for name in os.listdir("/dev/shm") if "modeldepot" in name]


async def ready(running: Running) -> None:
    await running.said(r"ready after")


async def test_in_flight_requests_are_answered_and_streams_end_before_a_clean_exit(
    repo: Path, gates: Path
) -> None:
    add_model(repo, gates, "slow", infer="slow")
    add_model(repo, gates, "quick")
    async with serving(repo) as server, server.client() as client:
        await ready(server)
        children = server.children()
        assert children
        async with client.stream("GET", "/v1/events") as events:
            lines = events.aiter_lines()
            assert (await anext(lines)).startswith(":")
            slow = asyncio.create_task(client.post("/v2/models/slow/infer", json=REQUEST))
            await reached(gates, "slow")
            server.signal(signal.SIGTERM)
            told = [line async for line in lines]
            assert "event: server.draining" in told
        open_gate(gates, "slow")
        answer = await slow
        assert answer.status_code == 200 and answer.json()["outputs"][0]["data"] == [1.0, 2.0]
        assert await server.code() == 0, server.log
        assert gone(children) and left_behind(repo) == []
        with pytest.raises(httpx.ConnectError):
            await client.get("/health")


async def test_ctrl_c_in_a_terminal_reaches_the_workers_too_and_still_nothing_is_lost(
    repo: Path, gates: Path
) -> None:
    add_model(repo, gates, "slow", infer="slow")
    async with serving(repo) as server, server.client() as client:
        await ready(server)
        slow = asyncio.create_task(client.post("/v2/models/slow/infer", json=REQUEST))
        await reached(gates, "slow")
        server.signal(signal.SIGINT, group=True)
        await server.said("draining")
        open_gate(gates, "slow")
        assert (await slow).status_code == 200
        assert await server.code() == 0


async def test_a_second_signal_ends_it_at_once_and_takes_the_workers_along(
    repo: Path, gates: Path
) -> None:
    add_model(repo, gates, "stuck", infer="never")
    async with serving(repo) as server, server.client() as client:
        await ready(server)
        children = server.children()
        stuck = asyncio.create_task(client.post("/v2/models/stuck/infer", json=REQUEST))
        await reached(gates, "never")
        server.signal(signal.SIGTERM)
        await server.said("draining")
        server.signal(signal.SIGTERM)
        assert await server.code() == 1
        assert gone(children)
        await asyncio.gather(stuck, return_exceptions=True)


@pytest.mark.parametrize("path", ["--fast-path", "--no-fast-path"])
async def test_a_request_that_never_ends_does_not_outlast_the_grace_and_is_told_so(
    repo: Path, gates: Path, path: str
) -> None:
    add_model(repo, gates, "stuck", infer="never")
    async with serving(repo, "--grace", "1", path) as server, server.client() as client:
        await ready(server)
        children = server.children()
        stuck = asyncio.create_task(client.post("/v2/models/stuck/infer", json=REQUEST))
        await reached(gates, "never")
        server.signal(signal.SIGTERM)
        answer = await stuck
        assert answer.status_code == 503 and "shutting down" in answer.json()["error"]
        assert answer.headers["retry-after"] == "5"
        assert await server.code() in (0, 1)
        assert gone(children) and left_behind(repo) == []


async def test_a_load_that_the_end_cuts_off_is_told_so(repo: Path, gates: Path) -> None:
    add_model(repo, gates, "slow", load="never")
    flags = ("--grace", "1", "--model-control-mode", "explicit")
    async with serving(repo, *flags) as server, server.client() as client:
        await ready(server)
        load = asyncio.create_task(client.post("/v1/models/load", json={"model_name": "slow"}))
        await reached(gates, "never")
        server.signal(signal.SIGTERM)
        answer = await load
        assert answer.status_code == 503, answer.text
        assert "shutting down" in answer.text
        assert await server.code() == 0, server.log


async def test_it_answers_while_its_models_still_load_and_is_ready_afterwards(
    repo: Path, gates: Path
) -> None:
    add_model(repo, gates, "slow", load="load")
    async with serving(repo) as server, server.client() as client:
        await reached(gates, "load")
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/v2/health/ready")).status_code == 400
        status = (await client.get("/v1/models/status")).json()
        assert status["loading_status"] == {"slow": "loading"}
        open_gate(gates, "load")
        await ready(server)
        assert (await client.get("/v2/health/ready")).status_code == 200
        assert (await client.get("/v1/models/status")).json()["loaded"] == ["slow"]


async def test_a_signal_while_models_load_ends_it_cleanly(repo: Path, gates: Path) -> None:
    add_model(repo, gates, "slow", load="never")
    async with serving(repo) as server:
        await reached(gates, "never")
        children = server.children()
        server.signal(signal.SIGTERM)
        assert await server.code() == 0, server.log
        assert gone(children) and left_behind(repo) == []


async def test_a_port_that_is_taken_is_said_in_one_line(repo: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        async with serving(repo, "--port", port, wait_for="") as server:
            assert await server.code() == 1
            assert any(port in line and "--port" in line for line in server.log)
            assert "Traceback" not in "\n".join(server.log)


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--host", "0.0.0.0"), "--api-keys"),
        (("--api-keys", "missing.yaml"), "missing.yaml"),
        (("--load-model", "../x"), "x"),
    ],
)
async def test_a_start_that_cannot_be_is_refused_in_one_line(
    repo: Path, flags: tuple[str, ...], word: str
) -> None:
    async with serving(repo, *flags, wait_for="") as server:
        assert await server.code() == 1
        assert any(word in line for line in server.log)
        assert "Traceback" not in "\n".join(server.log)


async def test_a_repository_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    async with serving(tmp_path / "none", wait_for="") as server:
        assert await server.code() == 1
        assert any("none" in line and "create it" in line for line in server.log)


async def test_with_exit_on_error_a_model_that_fails_at_start_ends_the_server(
    repo: Path, gates: Path
) -> None:
    add_model(repo, gates, "good")
    add_model(repo, gates, "bad")
    (repo / "bad" / "model.py").write_text("raise RuntimeError('no weights')\n")
    async with serving(repo, "--exit-on-error") as server:
        assert await server.code() == 1
        assert any("failed: bad" in line for line in server.log)
    async with serving(repo) as server, server.client() as client:
        await ready(server)
        assert (await client.get("/health")).json()["status"] == "degraded"


async def test_json_logs_are_one_object_a_line(repo: Path) -> None:
    wait_for = r'serving (http://[^\s"]+)'
    async with serving(repo, "--log-format", "json", wait_for=wait_for) as server:
        server.signal(signal.SIGTERM)
        assert await server.code() == 0
        lines = [json.loads(line) for line in server.log]
        assert all({"at", "level", "logger", "message"} <= set(line) for line in lines)
