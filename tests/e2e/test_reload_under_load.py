"""Models change while clients ask: no request fails, and each answer is that of one live generation.

The model is y = x + value, and the n-th reload brings the value n + 1. Clients and server share the
machine's clock, so what was live while a request was under way is known exactly.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import numpy as np
import onnx
import pytest
from onnx import helper

from tests import models
from tests.e2e.changes import Told, answer, shell, shown, told_by
from tests.e2e.load import Load, asking
from tests.e2e.server import Running, serving

pytestmark = pytest.mark.e2e

REQUESTS = 10_000
RELOADS = 10
FLAGS = ("--settle", "0.2")
OVERWRITE = (  # in place, by a rename over the file, and the whole folder
    "cp away/next/1/model.onnx models/m/1/model.onnx",
    "cp away/next/1/model.onnx models/m/1/.part; mv models/m/1/.part models/m/1/model.onnx",
    "mv models/m away/old && mv away/next models/m && rm -r away/old",
)
COUNTING = """
    import pathlib

    class Model:
        def load(self, *_):
            self.value = float(pathlib.Path({count!r}).read_text())

        def infer(self, inputs):
            return {{"y": inputs["x"] + self.value}}
"""
# Requests may be merged: then rows of several clients are in one batch, and must not be confused.
BATCHED = "max_batch_size: 32\n"
COUNTED = """
backend: python
max_batch_size: 32
inputs: [{name: x, datatype: FP32, shape: [4]}]
outputs: [{name: y, datatype: FP32, shape: [4]}]
"""


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    (tmp_path / "away").mkdir()
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


def add(folder: Path, value: float, config: str = BATCHED) -> Path:
    models.add_onnx(folder / "1" / "model.onnx", value)
    (folder / "config.yaml").write_text(config)
    return folder


@asynccontextmanager
async def watching(repo: Path) -> AsyncIterator[tuple[Running, httpx.AsyncClient, Told]]:
    async with (
        serving(repo, *FLAGS) as server,
        server.client() as client,
        told_by(server) as told,
    ):
        await told.ready("m")
        yield server, client, told


def assert_nothing_was_lost(load: Load, told: Told) -> None:
    """Every answer came from a generation that lived while the request was under way, and requests
    that began after a reload was reported ready were answered by it or a later one."""
    assert load.failed == [] and load.count >= REQUESTS
    came = [e.at for e in told.events if e.data.get("state") == "ready"]
    assert len(came) == RELOADS + 1 and told.failures() == []
    newest_before = np.searchsorted(came, load.began, side="left")
    newest_after = np.searchsorted(came, load.ended, side="right")
    values = np.array(load.values)
    assert np.all(newest_before <= values), "an old generation answered a new request"
    assert np.all(values <= newest_after), "a generation answered before it was ready"
    assert set(values) == set(range(1, RELOADS + 2)), "the load was to go on through all reloads"


async def test_overwriting_a_model_under_load_loses_no_request(repo: Path) -> None:
    add(repo / "m", 1)
    async with watching(repo) as (server, client, told):
        async with asking(server.url, "m", least=REQUESTS) as clients:
            for number in range(RELOADS):
                add(repo.parent / "away" / "next", number + 2)
                last = told.generations("m")[-1]
                await shell(OVERWRITE[number % len(OVERWRITE)], repo.parent)
                await told.ready("m", after=last)
                assert await answer(client, "m") == number + 2
            load = await clients.stop()
        assert_nothing_was_lost(load, told)


async def test_forced_reloads_under_load_lose_no_request(repo: Path) -> None:
    count = repo.parent / "count"
    count.write_text("1")
    models.python_model(repo / "m", COUNTING.format(count=str(count)))
    (repo / "m" / "config.yaml").write_text(COUNTED)
    async with watching(repo) as (server, client, told):
        async with asking(server.url, "m", least=REQUESTS) as clients:
            for number in range(RELOADS):
                count.write_text(str(number + 2))
                order = {"model_name": "m", "force_reload": True}
                assert (await client.post("/v1/models/load", json=order)).status_code == 200
                assert await answer(client, "m") == number + 2
            load = await clients.stop()
        assert_nothing_was_lost(load, told)


# broken ------------------------------------------------------------------------------------------


def no_such_operator(path: Path) -> None:
    """A whole ONNX file by its form; only loading it shows that it is none."""
    node = helper.make_node("Nonsense", ["x"], ["y"])
    model = models.onnx_model([node], [("x", "FP32", (-1, 4))], [("y", "FP32", (-1, 4))])
    onnx.save(model, path)


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def garbage(path: Path) -> None:
    path.write_bytes(np.random.default_rng(1).bytes(path.stat().st_size))


def zeros(path: Path) -> None:
    """What a crash, or a copy that reserves its space first, leaves: the right size, no content."""
    path.write_bytes(bytes(path.stat().st_size))


async def last_error(client: httpx.AsyncClient) -> dict[str, str]:
    """Of a model that serves."""
    found = await shown(client, "m")
    assert found["state"] == "loaded" and found["serving_version"] == 1
    error = found["last_error"]
    assert isinstance(error, dict)
    return error


async def test_broken_files_leave_the_old_generation_serving_until_they_are_mended(
    repo: Path,
) -> None:
    add(repo / "m", 1)
    path = repo / "m" / "1" / "model.onnx"
    async with watching(repo) as (_, client, told):
        value = 1
        for break_it, code, why in (
            (truncated, "folder_incomplete", "m/1/model.onnx"),
            (garbage, "folder_incomplete", "m/1/model.onnx"),
            (zeros, "folder_incomplete", "m/1/model.onnx"),
            (no_such_operator, "load_failed", "Nonsense"),
        ):
            seen = told.events[-1].id
            serving = told.generations("m")[-1]
            break_it(path)
            await (
                told.problem("m", after=seen)
                if code.startswith("folder")
                else told.failed("m", after=serving)
            )
            assert await answer(client, "m") == value
            error = await last_error(client)
            assert error["code"] == code and why in error["message"], break_it
            assert str(repo) not in error["message"]

            order = {"model_name": "m", "force_reload": True}
            assert (await client.post("/v1/models/load", json=order)).status_code == 500
            assert await answer(client, "m") == value, (
                "an order to load what is broken took it down"
            )

            value += 1
            serving = told.generations("m")[-1]
            models.add_onnx(path, value)
            await told.ready("m", after=serving)
            assert await answer(client, "m") == value
            assert (await shown(client, "m"))["last_error"] is None


async def test_a_model_that_fails_its_checks_does_not_replace_the_one_that_serves(
    repo: Path,
) -> None:
    def check(value: float) -> str:
        x = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [0, 1, 2, 3]}
        y = {**x, "name": "y", "data": [n + value for n in range(4)]}
        return json.dumps({"inputs": [x], "outputs": [y]})

    add(repo / "m", 1)
    golden = repo / "m" / "checks" / "count.json"
    golden.parent.mkdir()
    golden.write_text(check(1))
    async with watching(repo) as (_, client, told):
        serving = told.generations("m")[-1]
        models.add_onnx(repo / "m" / "1" / "model.onnx", 2)
        failed = await told.failed("m", after=serving)
        assert await answer(client, "m") == 1
        error = await last_error(client)
        assert error["code"] == "check_failed" and "checks/count.json" in error["message"]

        golden.write_text(check(2))
        await told.ready("m", after=failed.generation)
        assert await answer(client, "m") == 2
        assert (await shown(client, "m"))["last_error"] is None
