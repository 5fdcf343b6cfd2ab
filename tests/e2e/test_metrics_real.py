"""Every series of the table, from a real server that loaded, served, failed, reloaded and evicted."""

from __future__ import annotations

import asyncio
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse
from prometheus_client.samples import Sample

from server.metrics import names, triton_names
from tests import models
from tests.e2e.processes import started, worker
from tests.e2e.server import CONFIG, WITHIN_S, add_model, serving

pytestmark = pytest.mark.e2e

TRACE = "0af7651916cd43dd8448eb211c80319c"
ASKED = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]}
MEMORY = "memory: 30MiB\n"  # two of them do not fit into BUDGET
BUDGET = ("--memory-budget", "cpu=50MiB", "--enable-inline-model-loading", "--min-residency", "0")
CACHE = ("--response-cache-size", "1MiB")
# What this server has no reason to show, and who sees to it that it is shown where there is one.
ELSEWHERE = {
    *(f for f in names.ALL if f.name.startswith("gpu_")),  # no GPU: tests/unit/test_metrics.py
    *(f for f in names.ALL if f.name.startswith("adapter_")),  # no adapters: as above
    names.TOKENS, names.FIRST_TOKEN,  # no texts: tests/integration/test_openai_text.py
    names.MODEL_LEAKED,  # nothing leaks on a CPU
}  # fmt: skip


def add(repo: Path, name: str, more: str = "") -> None:
    models.add_onnx(repo / name / "1" / "model.onnx")
    (repo / name / "config.yaml").write_text(MEMORY + more)


class Scraped:
    """The page as it is now, never an older one."""

    def __init__(self, client: httpx.AsyncClient, url: str) -> None:
        self._client, self._url = client, url

    async def text(self, accept: str = "") -> str:
        await asyncio.sleep(1.05)  # a page may be a second old, and no event tells of its end
        answer = await self._client.get(self._url, headers={"accept": accept})
        assert answer.status_code == 200
        return answer.text

    async def samples(self) -> list[Sample]:
        return [s for family in parse(await self.text()) for s in family.samples]

    async def until(self, name: str, **labels: str) -> float:
        """A sample with these labels is there and is not 0."""
        async with asyncio.timeout(WITHIN_S):
            while True:
                for sample in await self.samples():
                    is_it = sample.name == names.PREFIX + name and sample.value
                    if is_it and labels.items() <= sample.labels.items():
                        return sample.value


async def ask(client: httpx.AsyncClient, model: str, **headers: str) -> int:
    path = f"/v2/models/{model}/infer"
    return (await client.post(path, json=ASKED, headers=headers)).status_code


async def order(client: httpx.AsyncClient, verb: str, model: str, **more: Any) -> int:
    return (await client.post(f"/v1/models/{verb}", json={"model": model, **more})).status_code


async def promtool(page: str) -> str:
    tool = await asyncio.create_subprocess_exec(
        "promtool", "check", "metrics", stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    said, _ = await tool.communicate(page.encode())
    units = r"(?m)^nv_\w+_us metric names should not contain abbreviated units\n?"
    return re.sub(units, "", said.decode())


async def test_every_series_is_there_once_there_is_something_to_say(tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    add(repo, "a", "max_batch_size: 8\n")
    add(repo, "pinned")
    (repo / "pinned" / "config.yaml").write_text("memory: 1MiB\npin: true\n")
    add_model(repo, tmp_path, "breaks", load="")
    (repo / "breaks" / "model.py").write_text("class Model:\n    def load(self): 1 / 0\n")
    (repo / "breaks" / "config.yaml").write_text("memory: 1MiB\n" + CONFIG)
    async with started(repo, "--metrics-port", "0", *BUDGET, *CACHE) as (server, client, _):
        url = (await server.said(r"metrics (http://\S+)"))[1]
        page = Scraped(client, url)
        parent = f"00-{TRACE}-b7ad6b7169203331-01"
        assert await ask(client, "a", traceparent=parent) == 200
        assert await ask(client, "stranger-7") == 404
        rich = await page.text("application/openmetrics-text")
        found = [
            sample.exemplar.labels
            for family in parse_openmetrics(rich)  # type: ignore[no-untyped-call]
            for sample in family.samples
            if sample.exemplar
        ]
        assert {"trace_id": TRACE} in found

        models.add_onnx(repo / "a" / "1" / "model.onnx", 5.0)  # a reload, seen by the watcher
        await page.until("model_load_total", model="a", trigger="watch", outcome="success")
        add(repo, "b", "response_cache: true\n")
        await page.until("model_evictions_total", model="a", reason="memory")  # no room for both
        assert await ask(client, "b") == 200
        await page.until("model_unload_total", model="a", trigger="eviction")
        assert await order(client, "load", "breaks") == 500
        assert await order(client, "load", "b") == 200
        assert await order(client, "sleep", "b") == 200
        await page.until("model_asleep", model="b")
        await page.until("model_evictions_total", model="b", reason="manual")
        assert await order(client, "wake", "b") == 200
        await page.until("model_wakes_total", model="b")
        worker(server, "pinned").kill()
        await page.until("worker_restarts_total", model="pinned")

        text = await page.text()
        shown = {f.name: f for f in parse(text) if f.samples}
        missing = [f.full for f in names.ALL if f not in ELSEWHERE and f.full not in shown]
        assert missing == []
        nv = {group[0].full for group in triton_names.ALL if "gpu" not in group[0].full}
        assert nv - shown.keys() == set()
        requests = shown["modeldepot_inference_requests"].samples
        assert any(s.labels["model"] == "_unknown" for s in requests)
        assert "stranger" not in text and TRACE not in text
        phases = {
            s.labels["phase"] for s in shown["modeldepot_model_load_duration_seconds"].samples
        }
        assert {"queue", "read", "build", "warmup", "sleep", "wake", "total"} <= phases
        reclaimed = shown["modeldepot_model_memory_reclaimed_ratio"].samples
        assert {s.labels["model"]: s.value for s in reclaimed}["a"] == 1.0
        if shutil.which("promtool"):
            assert await promtool(text) == ""

        shutil.rmtree(repo / "b")
        async with asyncio.timeout(WITHIN_S):
            while re.search(r'model="b"', await page.text()):
                pass


async def test_tritons_names_can_be_left_out_and_a_taken_port_ends_the_start(
    tmp_path: Path,
) -> None:
    repo = tmp_path / "repo"
    repo.mkdir()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        async with serving(repo, "--metrics-port", str(port), wait_for="") as server:
            assert await server.code() == 1
            said = [line for line in server.log if "--metrics-port" in line]
            assert len(said) == 1 and f"127.0.0.1:{port}" in said[0]
    async with serving(repo, "--no-triton-metrics") as server, server.client() as client:
        page = (await client.get("/metrics")).text
        assert "modeldepot_server_ready" in page and "nv_" not in page
