"""What `modeldepot doctor` says of ports and keys, and as a whole; `--live` and `--ready`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.auth import Scope, new_key
from server.cli.checkup import doors
from server.cli.checkup.examine import examine
from server.cli.checkup.finding import Finding, Level, ok
from tests.checkup import only, settings
from tests.cli import run
from tests.fakes.depot import FakeDepot, depot
from tests.models import add_onnx

OK, WARN, FAIL = Level.OK, Level.WARN, Level.FAIL


@pytest.fixture
def server() -> Iterator[FakeDepot]:
    with depot() as fake:
        yield fake


def port_of(server: FakeDepot) -> int:
    return int(server.url.rpartition(":")[2])


# ports --------------------------------------------------------------------------------------------


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock.getsockname()[1]


def test_a_free_port_stays_free(tmp_path: Path, taken: int) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    for _ in range(2):
        assert only(doors.ports(settings(tmp_path, port=port))).level is OK
    assert only(doors.ports(settings(tmp_path, port=0))).level is OK


def test_a_taken_port_and_who_has_it(tmp_path: Path, taken: int) -> None:
    one = only(doors.ports(settings(tmp_path, port=taken), within_s=0.05))
    assert one.level is FAIL and f"pid {os.getpid()}" in one.said and "--port" in one.todo


def test_a_taken_metrics_port(tmp_path: Path, taken: int) -> None:
    found = doors.ports(settings(tmp_path, port=0, metrics_port=taken), within_s=0.05)
    assert [one.level for one in found] == [OK, WARN]


def test_a_taken_grpc_port(tmp_path: Path, taken: int) -> None:
    here = settings(tmp_path, port=0, allow_grpc=True, grpc_port=taken)
    one = only(doors.ports(here, within_s=0.05), "grpc port")
    assert one.level is WARN and f"pid {os.getpid()}" in one.said


def test_an_address_of_another_machine_and_a_name_of_none(tmp_path: Path) -> None:
    for host in ("192.0.2.1", "nobody.invalid"):
        one = only(doors.ports(settings(tmp_path, host=host)))
        assert one.level is FAIL and "--host" in one.todo


def test_our_own_server_may_have_the_port(tmp_path: Path, server: FakeDepot) -> None:
    said = {"status": "healthy", "backend": {"info": {"name": "modeldepot", "version": "1.0"}}}
    server.say("GET", "/health", said)
    one = only(doors.ports(settings(tmp_path, port=port_of(server))))
    assert one.level is OK and "modeldepot 1.0 (healthy)" in one.said


# keys ---------------------------------------------------------------------------------------------


def key_file(tmp_path: Path, mode: int = 0o600, scope: Scope = Scope.ADMIN) -> Path:
    path = tmp_path / "keys.yaml"
    path.write_text("keys:\n" + new_key("ci", {scope})[1] + "\n")
    path.chmod(mode)
    return path


@pytest.mark.parametrize(
    ("mode", "scope", "level"),
    [
        (0o600, Scope.ADMIN, OK),
        (0o640, Scope.ADMIN, OK),
        (0o644, Scope.ADMIN, WARN),
        (0o666, Scope.ADMIN, FAIL),
        (0o600, Scope.INFERENCE, WARN),
    ],
)
def test_who_else_may_read_or_change_the_keys(
    tmp_path: Path, mode: int, scope: Scope, level: Level
) -> None:
    here = settings(tmp_path, api_keys=key_file(tmp_path, mode, scope), host="0.0.0.0")
    assert only(doors.keys(here)).level is level


def test_keys_that_cannot_be_read(tmp_path: Path) -> None:
    assert only(doors.keys(settings(tmp_path, api_keys=tmp_path / "none"))).level is FAIL
    (tmp_path / "bad").write_text("keys: 7\n")
    assert only(doors.keys(settings(tmp_path, api_keys=tmp_path / "bad"))).level is FAIL


def test_an_open_address_without_keys(tmp_path: Path) -> None:
    assert only(doors.keys(settings(tmp_path))).level is OK
    assert only(doors.keys(settings(tmp_path, host="0.0.0.0"))).level is FAIL
    assert only(doors.keys(settings(tmp_path, host="0.0.0.0", insecure=True))).level is WARN


# the command --------------------------------------------------------------------------------------


def test_a_check_that_hangs_or_breaks_is_a_failure_of_its_own_name() -> None:
    over = threading.Event()

    def hangs() -> list[Finding]:
        over.wait()
        return []

    def breaks() -> list[Finding]:
        raise ZeroDivisionError

    def may_not() -> list[Finding]:
        raise PermissionError(13, "Permission denied", "/models")

    every = [
        ("one", hangs),
        ("two", breaks),
        ("three", may_not),
        ("four", lambda: [ok("four", "")]),
    ]
    found = examine(every, 0.05)
    over.set()
    assert [one.level for one in found] == [FAIL, FAIL, FAIL, OK]
    assert found[2].said == "/models: Permission denied" and "user id" in found[2].todo
    assert "no answer within" in found[0].said and "ZeroDivisionError" in found[1].said


@pytest.mark.parametrize("word", ["live", "ready"])
def test_live_and_ready_ask_the_server_that_runs(server: FakeDepot, word: str) -> None:
    flags = ("doctor", f"--{word}", "--host", "0.0.0.0", "--port", str(port_of(server)))
    server.say("GET", f"/v2/health/{word}", b"")
    result = run(*flags, env={"MODELDEPOT_API_KEYS": "/nowhere"})
    assert result.exit_code == 0 and result.stdout.startswith(f"ok {word}: http://127.0.0.1:")
    assert len(result.stdout.splitlines()) == 1
    assert {name for asked in server.asked for name in asked.headers} & {"authorization"} == set()
    for status in (503, 400, 404):
        server.answers.clear()
        server.say("GET", f"/v2/health/{word}", b"", status)
        result = run(*flags)
        assert result.exit_code == 1 and str(status) in result.stdout


def test_live_gives_up_soon_on_a_server_that_hangs(server: FakeDepot) -> None:
    server.say("GET", "/v2/health/live", None)
    result = run("doctor", "--live", "--port", str(port_of(server)), "--timeout", "0.05")
    assert result.exit_code == 1 and "within 0.05 s" in result.stdout


def test_live_where_nobody_or_somebody_else_listens(taken: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = run("doctor", "--live", env={"MODELDEPOT_PORT": str(free.getsockname()[1])})
    assert nobody.exit_code == 1 and "Connection refused" in nobody.stdout
    assert run("doctor", "--live", "--port", str(taken), "--timeout", "0.05").exit_code == 1
    assert run("doctor", "--live", "--port", "0").exit_code == 1


def test_settings_that_cannot_be_are_a_failure_too() -> None:
    for flag in ((), ("--live",)):
        result = run("doctor", *flag, "--port", "many")
        assert result.exit_code == 1 and "--port" in result.stdout


def test_live_imports_nothing_that_is_slow() -> None:
    code = (
        "import sys; from server.cli import main\n"
        "try: main(['doctor', '--live', '--port', '1'])\nexcept SystemExit: pass\n"
        "print(sorted(m for m in sys.modules if '.' not in m))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(said.stdout.splitlines()[-1].replace("'", '"')))
    slow = {"httpx", "rich", "litestar", "uvicorn", "numpy", "msgspec", "yaml", "asyncio", "psutil"}
    assert loaded & slow == set()


def test_the_whole_examination_of_this_machine(tmp_path: Path) -> None:
    add_onnx(tmp_path / "models/plus/1/model.onnx")
    flags = (
        "doctor",
        str(tmp_path / "models"),
        "--state-dir",
        str(tmp_path / "state"),
        "--port",
        "0",
    )
    said = json.loads(run(*flags, "--json").stdout)
    found = {one["check"]: one for one in said["checks"]}
    assert found.keys() >= {
        "versions", "repository", "watch", "state", "port", "keys", "memory", "cores", "files",
        "shared memory", "clock", "gpu", "torch", "onnxruntime",
    }  # fmt: skip
    assert said["ok"] is all(one["level"] != "fail" for one in said["checks"])
    assert found["repository"]["level"] == "ok"
