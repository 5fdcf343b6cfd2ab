"""The boards and alerts against a real Prometheus that scrapes a real server: every expression has an
answer. A mistyped name of a series is no error to Prometheus, only an empty picture."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from grafana.boards import BOARDS
from grafana.panels import VARIABLES, Panel
from tests.e2e.prometheus import (
    EVERY_S,
    GRAFANA,
    Prometheus,
    needs_prometheus,
    prometheus,
    write_config,
)
from tests.e2e.prometheus import put as filled
from tests.e2e.scene import TRACE, Stage, scene
from tests.e2e.server import serving
from tests.fakes.metrics import Shown, fill

pytestmark = [
    pytest.mark.e2e,
    needs_prometheus,
    pytest.mark.timeout(180),
    # PEFT asks transformers by a name that it will lose.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]
REAL, RECORDED = "real", "recorded"  # instances
# What this machine may lack is asked of a page that the real collector made of a machine that has it.
ELSEWHERE = ("gpu", "leak")


def put(expr: str, instance: str) -> str:
    return filled(expr, instance=instance, window="10s", step="10s", shown="5m")


def instance_of(panel: Panel) -> str:
    return RECORDED if panel.needs in ELSEWHERE else REAL


@asynccontextmanager
async def page(text: str) -> AsyncIterator[str]:
    """host:port where /metrics is always this text."""
    head = (
        f"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {len(text.encode())}\r\n"
    )

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"{head}connection: close\r\n\r\n{text}".encode())
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def recorded() -> str:
    """What a server with a GPU shows, by the real collector."""
    shown = Shown()
    fill(shown)
    return await shown.page()


@asynccontextmanager
async def watched(home: Path) -> AsyncIterator[tuple[Stage, Prometheus]]:
    async with scene(home) as stage, page(await recorded()) as elsewhere:
        targets = {REAL: stage.server.url.removeprefix("http://"), RECORDED: elsewhere}
        config = write_config(home / "prometheus", stage.key, targets)
        async with prometheus(config) as asked:
            await asked.until("sum(up) == 2")
            yield stage, asked


async def play(stage: Stage) -> None:
    """Everything that a board shows."""
    await stage.round()
    await stage.turns()
    await stage.mishaps()
    await stage.nap()
    await stage.adopt()
    await stage.reload(2.0)
    await stage.crash()
    await stage.turns()
    await stage.spoil()
    await stage.unload("guest-b")
    await stage.round()


@asynccontextmanager
async def traffic(stage: Stage) -> AsyncIterator[None]:
    """Rates need more than one scrape between them."""

    async def again() -> None:
        while True:
            await stage.round()
            await stage.mishaps()

    task = asyncio.create_task(again())
    try:
        yield
        assert not task.done(), task.exception()
    finally:
        task.cancel()
        await asyncio.wait([task])


async def silent(asked: Prometheus, questions: dict[str, str]) -> dict[str, str]:
    """Those that have no answer with a number."""
    answers = await asyncio.gather(*(asked.ask(expr) for expr in questions.values()))
    return {
        name: expr
        for (name, expr), found in zip(questions.items(), answers, strict=True)
        if not any(value_of(one) == value_of(one) for one in found)  # NaN is not itself
    }


def value_of(series: dict[str, Any]) -> float:
    return float(series["value"][1])


def questions() -> dict[str, str]:
    found = {}
    for board in BOARDS:
        for panel in board.panels:
            for number, query in enumerate(panel.queries):
                name = f"{board.title}, {panel.title}, {'ABCDEF'[number]}"
                found[name] = put(query.expr, instance_of(panel))
        for mark in board.marks:
            # A mark is there for a moment; it is asked over all that was.
            whole = filled(mark.expr, instance=REAL, window="5m", step="5m", shown="5m")
            found[f"{board.title}, mark {mark.name}"] = whole
    return found


async def variables(asked: Prometheus) -> dict[str, list[str]]:
    """Their values, as Grafana's `label_values(series, label)` asks for them."""
    found = {}
    for variable in VARIABLES:
        match = re.fullmatch(r"label_values\((.*), (\w+)\)", variable.query)
        assert match is not None
        series = put(match[1], ".*")
        found[variable.name] = await asked.get(
            f"/api/v1/label/{match[2]}/values", **{"match[]": series}
        )
    return found


async def test_every_expression_of_the_boards_has_an_answer(tmp_path: Path) -> None:
    async with watched(tmp_path) as (stage, asked):
        await play(stage)
        async with traffic(stage):
            waiting = questions()
            began = time.monotonic()
            while waiting and time.monotonic() - began < 20:
                await asyncio.sleep(EVERY_S)  # until the next scrape
                waiting = await silent(asked, waiting)
            assert waiting == {}
            mistyped = {"mistyped": "modeldepot_model_states"}
            assert await silent(asked, mistyped) == mistyped

            found = await variables(asked)
            assert found["instance"] == [REAL, RECORDED]
            assert {"adder", "slow", "writer", "broken", "guest-a", "guest-b"} <= {*found["model"]}
            assert found["gpu"] == ["0"]
            await exemplars(asked)
        await alerts(asked)


async def test_a_server_without_keys_is_scraped_with_an_empty_key_file(repo: Path) -> None:
    """As docker-compose.yaml mounts it, where METRICS_KEY is not set."""
    async with serving(repo) as server:
        target = {"keyless": server.url.removeprefix("http://")}
        async with prometheus(write_config(repo.parent / "prometheus", "", target)) as asked:
            await asked.until('up{instance="keyless"} == 1')


async def exemplars(asked: Prometheus) -> None:
    """A point of the panel Duration leads to the trace of one request."""
    now = time.time()
    name = "modeldepot_inference_duration_seconds_bucket"
    found = await asked.get("/api/v1/query_exemplars", query=name, start=now - 120, end=now + 10)
    traced = {
        (one["seriesLabels"]["model"], each["labels"].get("trace_id"))
        for one in found
        for each in one["exemplars"]
    }
    assert ("adder", TRACE) in traced, found


async def alerts(asked: Prometheus) -> None:
    """Those that the scene gives cause for are on their way; the others' series are there."""
    rules = yaml.safe_load((GRAFANA / "alerts.yml").read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            for part in sides(rule["expr"]):
                assert await asked.ask(part), f"{rule['alert']}: nothing answers {part}"
    active = {
        one["labels"]["alertname"]: one for one in (await asked.get("/api/v1/alerts"))["alerts"]
    }
    assert {"ModelFailed", "ReloadFailing"} <= active.keys()
    assert "ServerDown" not in active
    for one in active.values():
        assert one["annotations"]["summary"] and one["annotations"]["description"]
        assert (
            "<no value>" not in str(one["annotations"])
            and "error" not in one["annotations"]["summary"]
        )


def sides(expr: str) -> list[str]:
    """An alert's expression without its comparisons: each series that it looks at must be there."""
    names = set(re.findall(r"(?:modeldepot_\w+|up)(?:\{[^}]*\})?", expr))
    return sorted(names)
