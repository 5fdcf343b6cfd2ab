"""The image without an engine: its build is carried out step by step, and what it made is run as a
container would run it: another user id, HOME unset, no /dev/shm, and nothing that can be written but the
state folder.

Not carried out: what downloads (the base, apt, the dependencies, which are those of this Python).
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from tests.contained import PACKAGES, Place, impossible
from tests.dockerfile import (
    Ignore,
    Step,
    chain_of,
    copies_of,
    environment_of,
    last,
    stages_of,
)
from tests.e2e.server import REQUEST, WITHIN_S, Running, add_model
from tests.models import add_onnx

HOME = Path(__file__).resolve().parents[2]
STAGES = stages_of((HOME / "Dockerfile").read_text())
SYSTEM = "/usr/local/bin:/usr/bin:/bin"
STEPS = chain_of(STAGES, "cpu")
VENV = "/opt/venv"

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(bool(impossible()), reason=f"no container here: {impossible()}"),
]


class Built:
    """The folders that the steps of a stage wrote to."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.folders = {at: home / at.strip("/") for at in (VENV, "/src", "/tmp")}
        for folder in [home / "root", *self.folders.values()]:
            folder.mkdir(parents=True)

    def carry_out(self, stage: str) -> None:
        steps = chain_of(STAGES, stage)
        environ = environment_of(steps, {"PATH": f"{Path(sys.executable).parent}:{SYSTEM}"})
        place = Place(
            self.home / "root", written=dict(self.folders), environ=environ, folder="/src"
        )
        for step in steps:
            if step.word == "COPY":
                self._copy(step)
            elif step.word == "RUN":
                done = place.run("sh", "-c", step.text)
                assert done.returncode == 0, f"{step.text}\n{done.stdout}\n{done.stderr}"

    def _copy(self, step: Step) -> None:
        ignore = Ignore((HOME / ".dockerignore").read_text())
        for sources, _ in copies_of([step]):
            for path in [path for source in sources for path in ignore.files(HOME, source)]:
                there = self.folders["/src"] / path
                there.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(HOME / path, there)


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the image has in /opt/venv, with the dependencies of this Python in place of its own."""
    built = Built(tmp_path_factory.mktemp("image"))
    built.carry_out("own")
    made = built.folders[VENV]
    (packages,) = (made / "lib").glob("python*/site-packages")
    found = {path.name for path in packages.iterdir()}
    assert {"repository", "server"} <= found and not found & {"pip", "tests", "examples"}
    (packages / "depends.pth").write_text(f"{PACKAGES}\n")
    return made


def test_the_dependencies_of_each_image_are_written_as_pip_wants_them(tmp_path: Path) -> None:
    built = Built(tmp_path)
    built.carry_out("depends")
    lines = (tmp_path / "src/requirements.txt").read_text().splitlines()
    assert any(line.startswith("torch>=") for line in lines)
    assert not [line for line in lines if "onnxruntime" in line]
    assert (tmp_path / "opt/venv/constraints.txt").read_text() == (
        HOME / "constraints.txt"
    ).read_text()


class Container:
    """`models` and `state`: the folders outside."""

    def __init__(self, home: Path, venv: Path) -> None:
        self.models, self.state = home / "models", home / "state"
        for folder in (home / "root", self.models, self.state):
            folder.mkdir()
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = sock.getsockname()[1]
        user, group = map(int, last(STEPS, "USER").text.split(":"))
        os.chown(self.state, user, group)
        self.state.chmod(0o700)
        environ = environment_of(STEPS, {"PATH": SYSTEM})
        self.place = Place(
            home / "root",
            shown={VENV: venv, "/models": self.models},
            written={"/state": self.state},
            environ=environ
            | {
                "MODELDEPOT_PORT": str(self.port),
                "MODELDEPOT_GRPC_PORT": "0",
                "MODELDEPOT_SETTLE": "0.1",
            },
            user=f"{user}:{group}",
        )

    def entry(self) -> list[str]:
        """tini is left out where this machine has none."""
        words = last(STEPS, "ENTRYPOINT").form() or []
        return words if shutil.which("tini") else words[words.index("--") + 1 :]

    def healthy(self) -> bool:
        words = json.loads(last(STEPS, "HEALTHCHECK").text.partition("CMD ")[2])
        done = self.place.run(*words)
        assert done.returncode in (0, 1), done.stderr
        return done.returncode == 0

    @asynccontextmanager
    async def serving(self, **environ: str) -> AsyncIterator[tuple[Running, httpx.AsyncClient]]:
        self.place.environ |= environ
        process = await self.place.start(*self.entry(), *(last(STEPS, "CMD").form() or []))
        running = Running(process)
        try:
            await running.said(r"serving (http://\S+)")
            running.url = f"http://127.0.0.1:{self.port}"
            await running.said(r"ready after")
            async with running.client() as client:
                yield running, client
        finally:
            await running.end()


@pytest.fixture
def container(tmp_path: Path, venv: Path) -> Container:
    return Container(tmp_path, venv)


async def infer(client: httpx.AsyncClient, model: str) -> list[float]:
    rows = {**REQUEST["inputs"][0], "shape": [1, 4], "data": [1, 2, 3, 4]}
    got = await client.post(f"/v2/models/{model}/infer", json={"inputs": [rows]})
    assert got.status_code == 200, got.text
    values: list[float] = got.json()["outputs"][0]["data"]
    return values


async def test_it_serves_with_nothing_to_write_to_but_its_state(container: Container) -> None:
    add_onnx(container.models / "plus/1/model.onnx", 1)
    add_model(container.models, container.models, "echo")
    assert not container.healthy()
    trusting = {"MODELDEPOT_INSECURE": "1", "MODELDEPOT_TRUST_CODE": "1"}
    async with container.serving(**trusting) as (running, client):
        assert await asyncio.to_thread(container.healthy)
        assert await infer(client, "plus") == [2, 3, 4, 5]
        got = await client.post("/v2/models/echo/infer", json=REQUEST)
        assert got.json()["outputs"][0]["data"] == [1, 2]

        at = len(running.log)
        add_onnx(container.models / "plus/1/model.onnx", 10)
        await running.said(r"model=plus .*→ready", at)
        assert await infer(client, "plus") == [11, 12, 13, 14]

        said = await asyncio.to_thread(container.place.run, "modeldepot", "doctor", "--ready")
        assert (said.returncode, said.stderr) == (0, "") and said.stdout.startswith("ok ready: ")

        (await client.post("/v1/models/unload", json={"model": "echo"})).raise_for_status()
        (await client.post("/v1/models/load", json={"model": "plus"})).raise_for_status()
        os.kill(running.process.pid, 15)
        assert await running.code() == 0
    assert not container.healthy()
    left = [path for path in container.state.rglob("*") if path.is_file()]
    assert left and all(path.parent == container.state for path in left)  # no copy, no scratch

    async with container.serving() as (_, client):
        status = (await client.get("/v1/models/status")).json()["loading_status"]
        assert status == {"plus": "loaded", "echo": "unloaded"}


async def test_torch_models_need_no_temporary_folder_of_the_machine(container: Container) -> None:
    shutil.copytree(HOME / "examples/models/digits_torch", container.models / "digits_torch")
    trusting = {"MODELDEPOT_INSECURE": "1", "MODELDEPOT_TRUST_CODE": "1"}
    async with container.serving(**trusting) as (running, client):
        status = (await client.get("/v1/models/status")).json()["loading_status"]
        assert status == {"digits_torch": "loaded"}, "\n".join(running.log)


def test_without_keys_it_does_not_start_and_says_what_to_do(container: Container) -> None:
    done = container.place.run(*container.entry(), "serve")
    assert done.returncode == 1
    assert "MODELDEPOT_API_KEYS" in done.stderr and "MODELDEPOT_INSECURE=1" in done.stderr


async def test_with_keys_it_starts_and_its_health_needs_none(container: Container) -> None:
    keys = container.place.run(
        *container.entry(), "keys", "new", "--name", "ci", "--scope", "admin"
    )
    assert keys.returncode == 0 and keys.stdout.startswith("md_")
    (container.models.parent / "secrets").mkdir()
    written = container.models.parent / "secrets/keys.yaml"
    written.write_text(keys.stderr[keys.stderr.rindex("keys:") :])
    container.place.shown["/run/secrets"] = written.parent
    async with container.serving(MODELDEPOT_API_KEYS="/run/secrets/keys.yaml") as (_, client):
        assert await asyncio.to_thread(container.healthy)
        assert (await client.get("/v1/models/status")).status_code == 401
        headers = {"x-api-key": keys.stdout.strip()}
        assert (await client.get("/v1/models/status", headers=headers)).status_code == 200


def test_a_state_folder_that_cannot_be_written_stops_it_with_the_reason(
    container: Container,
) -> None:
    container.place.shown["/state"] = container.place.written.pop("/state")
    container.place.environ["MODELDEPOT_INSECURE"] = "1"
    done = container.place.run(*container.entry(), "serve", timeout=WITHIN_S)
    assert done.returncode == 1 and "--state-dir" in done.stderr
    container.models.chmod(0o700)
    doctor = container.place.run(*container.entry(), "doctor")
    assert doctor.returncode == 1 and "Read-only file system" in doctor.stdout
    assert "'/models' cannot be read: Permission denied" in doctor.stdout
