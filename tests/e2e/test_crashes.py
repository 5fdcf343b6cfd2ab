"""Whatever dies, hangs or is killed: the rest goes on, what can come back does, nothing is left."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from tests import models
from tests.e2e.changes import Told, answer, shown
from tests.e2e.processes import (
    inside,
    left_behind,
    name_of,
    snapshots,
    started,
    worker,
    workers,
    zygote,
)
from tests.e2e.server import (
    CONFIG,
    REQUEST,
    add_model,
    gone,
    open_gate,
    reached,
)

pytestmark = pytest.mark.e2e
log = logging.getLogger(__name__)  # times are told (--log-cli-level=info), not judged

OTHERS = ("a", "b", "c")
RETRYABLE = {(500, "worker_died"), (503, "model_not_ready")}
ECHO = "    def infer(self, inputs):\n        return {'y': inputs['x']}\n"


def add_onnx(repo: Path, name: str, value: float = 1.0) -> None:
    models.add_onnx(repo / name / "1" / "model.onnx", value)


def add_python(repo: Path, name: str, source: str) -> None:
    models.python_model(repo / name, source)
    (repo / name / "config.yaml").write_text(CONFIG)


async def infer(client: httpx.AsyncClient, model: str) -> httpx.Response:
    return await client.post(f"/v2/models/{model}/infer", json=REQUEST)


class Callers:
    """Clients that ask a model again and again; every request must succeed."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.answered: Counter[str] = Counter()
        self._client = client
        self._some = asyncio.Condition()

    async def ask(self, model: str) -> None:
        while True:
            assert await answer(self._client, model) == 1.0
            async with self._some:
                self.answered[model] += 1
                self._some.notify_all()

    async def further(self, more: int) -> None:
        """Every model has answered `more` times from now on."""
        goal = {model: count + more for model, count in self.answered.items()}
        async with self._some:
            await self._some.wait_for(
                lambda: all(self.answered[model] >= count for model, count in goal.items())
            )


@asynccontextmanager
async def under_load(client: httpx.AsyncClient, *names: str) -> AsyncIterator[Callers]:
    """Two clients each. The block fails as soon as one request does."""
    callers = Callers(client)
    callers.answered.update(dict.fromkeys(names, 0))
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(callers.ask(name)) for name in names for _ in range(2)]
        await callers.further(5)
        yield callers
        await callers.further(20)
        for task in tasks:
            task.cancel()


async def test_a_killed_worker_costs_only_its_own_requests_and_is_back_by_itself(
    repo: Path, gates: Path
) -> None:
    add_model(repo, gates, "hit", infer="hit")
    for name in OTHERS:
        add_onnx(repo, name)
    async with started(repo) as (server, client, told), under_load(client, *OTHERS) as callers:
        (old,) = told.generations("hit")
        asked = [asyncio.create_task(infer(client, "hit")) for _ in range(5)]
        await reached(gates, "hit")
        await inside(client, "hit", 5)
        worker(server, "hit").kill()
        killed_at = time.time()
        for got in await asyncio.gather(*asked):
            assert got.status_code == 500, got.text
            assert got.headers["x-modeldepot-code"] == "worker_died"
            assert int(got.headers["retry-after"]) >= 1
            assert "SIGKILL" in got.json()["error"]
        open_gate(gates, "hit")
        back = await told.ready("hit", after=old)
        log.info("served again %.3f s after the kill", back.at - killed_at)
        assert (await infer(client, "hit")).status_code == 200
        await callers.further(20)
        assert {e.model for e in told.failures()} == {"hit"}
        assert server.process.returncode is None


async def test_who_asks_again_as_told_gets_an_answer_however_often_the_worker_is_killed(
    repo: Path,
) -> None:
    """A crash loop waits longer each time; meanwhile requests are told to come again."""
    add_onnx(repo, "hit")
    add_onnx(repo, "a")
    async with started(repo) as (server, client, told), under_load(client, "a"):
        refused: Counter[tuple[int, str]] = Counter()
        stop = asyncio.Event()

        async def insist() -> int:
            answered = 0
            while not (stop.is_set() and answered):  # asks until it has been answered
                x = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [0.0] * 4}
                got = await client.post("/v2/models/hit/infer", json={"inputs": [x]})
                answered += got.status_code == 200
                if got.status_code != 200:
                    assert "retry-after" in got.headers, got.text
                    refused[got.status_code, got.headers["x-modeldepot-code"]] += 1
                    await asyncio.sleep(0.01)
            return answered

        clients = [asyncio.create_task(insist()) for _ in range(3)]
        for _ in range(3):
            serving_now = told.generations("hit")[-1]
            worker(server, "hit").kill()
            await told.ready("hit", after=serving_now)
        assert (await infer_x(client)).status_code == 200
        stop.set()
        assert all(count > 0 for count in await asyncio.gather(*clients))
        assert set(refused) <= RETRYABLE, refused


async def infer_x(client: httpx.AsyncClient) -> httpx.Response:
    x = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [0.0] * 4}
    return await client.post("/v2/models/hit/infer", json={"inputs": [x]})


@pytest.mark.parametrize(
    ("death", "reason"),
    [
        ("os._exit(3)", "exit code 3"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
    ],
)
async def test_a_model_that_dies_while_loading_is_given_up_until_asked_for_or_mended(
    repo: Path, death: str, reason: str
) -> None:
    class_ = "import os, signal\nclass Model:\n"
    add_python(repo, "dies", f"{class_}    def load(self, *_):\n        {death}\n{ECHO}")
    add_onnx(repo, "good")
    add_onnx(repo, "clock")
    (repo / "clock" / "config.yaml").write_text("ttl_s: 1.5")
    wanted = ("--model-control-mode", "explicit", "--load-model", "dies", "--load-model", "good")
    async with started(repo, *wanted) as (server, client, told):
        tried = await three_tries(told, after=0)
        # Longer than the next pause would have been: another model comes and its time runs out.
        assert (await client.post("/v1/models/load", json={"model": "clock"})).status_code == 200
        await told.until(lambda e: e.kind == "model.evicted" and e.model == "clock")
        assert told.generations("dies")[-1] == tried
        found = await shown(client, "dies")
        error = found["last_error"]
        assert found["state"] == "failed" and isinstance(error, dict)
        assert error["code"] == "worker_died" and reason in error["message"]
        assert reason in (await infer(client, "dies")).json()["error"]

        asked = await client.post("/v1/models/load", json={"model": "dies"})
        assert asked.status_code == 500 and asked.json()["error"]["code"] == "worker_died"
        tried = await three_tries(told, after=tried)

        (repo / "dies" / "model.py").write_text(f"class Model:\n{ECHO}")
        await told.ready("dies", after=tried)
        assert (await infer(client, "dies")).status_code == 200
        assert {e.model for e in told.failures()} == {"dies"}
        assert server.process.returncode is None


async def three_tries(told: Told, after: int) -> int:
    """All of them failed. The last one's number."""
    for _ in range(3):
        after = (await told.failed("dies", after=after)).generation
    return after


@pytest.mark.parametrize("framework", ["onnx", "python"])
async def test_a_killed_zygote_takes_its_own_models_along_and_all_come_back(
    repo: Path, gates: Path, framework: str
) -> None:
    for name in OTHERS:
        add_onnx(repo, name)
    for name in ("p", "q"):
        add_model(repo, gates, name)
    hit, spared = (OTHERS, ("p", "q")) if framework == "onnx" else (("p", "q"), OTHERS)
    async with started(repo) as (server, client, told):
        before = {name: told.generations(name)[-1] for name in (*hit, *spared)}
        kept = [worker(server, name).pid for name in spared]
        lost = [worker(server, name) for name in hit]
        zygote(server, framework).kill()
        for name in hit:
            await told.ready(name, after=before[name])
        assert gone(lost)
        assert [worker(server, name).pid for name in spared] == kept
        for name in OTHERS:
            assert await answer(client, name) == 1.0
        for name in ("p", "q"):
            assert (await infer(client, name)).status_code == 200
        assert all(told.generations(name) == [before[name]] for name in spared)


FORKS = """
import os, subprocess, sys, time
class Model:
    def load(self, *_):
        subprocess.Popen(["sleep", "600"])
        subprocess.Popen(["sleep", "600"], start_new_session=True)  # leaves the process group
        if os.fork() == 0:
            if os.fork() == 0:  # as daemons are made: nobody's child, in a session of its own
                os.setsid()
                open("/proc/self/comm", "w").write("daemon")
                time.sleep(600)
            os._exit(0)
        os.wait()
"""


def add_forking(repo: Path) -> None:
    add_python(repo, "forks", FORKS + ECHO)


async def test_unloading_a_model_ends_every_process_that_it_started(repo: Path) -> None:
    add_forking(repo)
    add_onnx(repo, "a")
    async with started(repo) as (server, client, _):
        forks = worker(server, "forks")
        family = [forks, *forks.children(recursive=True)]
        assert [name_of(p) for p in family[1:]].count("sleep") == 2 and len(family) == 4
        got = await client.post("/v1/models/unload", json={"model": "forks"})
        assert got.status_code == 200
        assert gone(family)
        assert await answer(client, "a") == 1.0


async def test_nothing_of_a_killed_server_is_left_and_the_next_start_sweeps_its_copies(
    repo: Path,
) -> None:
    add_forking(repo)
    add_onnx(repo, "a")
    models.external_onnx(repo / "copied" / "1" / "model.onnx")
    async with started(repo) as (server, _, _):
        family = server.children()
        names = [name_of(p) for p in family]
        assert len(workers(server)) == 3 and names.count("sleep") == 2 and len(family) == 8
        old = snapshots(repo)
        assert len(old) == 2  # of the python model and of the one with external data
        server.process.kill()
        await server.process.wait()
        assert gone(family)
        assert snapshots(repo) == old
    async with started(repo) as (server, client, _):
        assert len(snapshots(repo)) == 2 and not set(snapshots(repo)) & set(old)
        assert (await infer(client, "forks")).status_code == 200
        server.signal(signal.SIGTERM)
        assert await server.code() == 0
    assert left_behind(repo) == []


async def test_a_model_that_hangs_in_load_is_unloaded_at_once(repo: Path, gates: Path) -> None:
    add_model(repo, gates, "hangs", load="never")
    add_onnx(repo, "a")
    modes = ("--model-control-mode", "explicit", "--load-model", "a")
    async with started(repo, *modes) as (server, client, _):
        loading = asyncio.create_task(client.post("/v1/models/load", json={"model": "hangs"}))
        await reached(gates, "never")
        process = worker(server, "hangs")
        got = await client.post("/v1/models/unload", json={"model": "hangs"})
        assert got.status_code == 200 and got.json()["freed_bytes"] > 0
        assert gone([process])
        overtaken = await loading
        assert overtaken.status_code == 409, overtaken.text
        assert (await shown(client, "hangs"))["state"] == "unloaded"
        assert await answer(client, "a") == 1.0


STUBBORN = """
import pathlib, signal, time
class Model:
    def load(self, *_):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    def unload(self):
        while True:
            time.sleep(1)
"""


async def test_a_model_that_ignores_sigterm_and_never_unloads_is_gone_after_unload(
    repo: Path,
) -> None:
    add_python(repo, "stubborn", STUBBORN + ECHO)
    async with started(repo) as (server, client, _):
        process = worker(server, "stubborn")
        got = await client.post("/v1/models/unload", json={"model": "stubborn"})
        assert got.status_code == 200 and got.json()["freed_bytes"] > 0
        assert gone([process])
        assert snapshots(repo) == []


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "tiny"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a tiny tmpfs needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


async def test_a_full_state_folder_is_a_clear_reason_and_leaves_no_half_copy(
    repo: Path, tiny_disk: Path
) -> None:
    add_python(repo, "large", "class Model:\n" + ECHO)
    (repo / "large" / "weights.bin").write_bytes(os.urandom(3 << 20))
    add_python(repo, "small", "class Model:\n" + ECHO)
    # While the large copy is tried there may be no room for the small one, which then comes later.
    flags = ("--state-dir", str(tiny_disk), "--load-slots", "1")
    async with started(repo, *flags) as (_, client, told):
        found = await shown(client, "large")
        error = found["last_error"]
        assert found["state"] == "failed" and isinstance(error, dict)
        assert error["code"] == "no_disk"
        assert "No space left" in error["message"] and "--state-dir" in error["message"]
        assert str(tiny_disk) not in error["message"]
        await told.ready("small")
        got = await client.post("/v1/models/unload", json={"model": "large"})  # not tried again
        assert got.status_code == 200, got.text
        assert len(os.listdir(tiny_disk / "snapshots")) == 1  # of the small one
        assert (await infer(client, "small")).status_code == 200
        (repo / "large" / "weights.bin").unlink()
        got = await client.post("/v1/models/load", json={"model": "large"})
        assert got.status_code == 200, got.text
