"""The `modeldepot` command against a server that runs: processes, sockets and signals, all real."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

pytestmark = pytest.mark.e2e

COMMAND = [sys.executable, "-m", "server"]
DOUBLE = """
import numpy as np

class Model:
    def load(self, *args, **kwargs):
        pass

    def infer(self, inputs):
        return {"y": inputs["x"] * 2}
"""
CONFIG = """\
backend: python
inputs: [{name: x, datatype: FP32, shape: [-1]}]
outputs: [{name: y, datatype: FP32, shape: [-1]}]
"""


@contextmanager
def serving(repo: Path, *flags: str, state: str = "state") -> Iterator[str]:
    """The URL of a server over `repo`; ends it with SIGTERM and wants exit code 0. `state`: a folder
    that no other server has."""
    server = subprocess.Popen(
        [*COMMAND, "serve", str(repo), "--port", "0", "--no-allow-grpc", "--trust-code",
         "--settle", "0.1", *flags, "--state-dir", str(repo.parent / state)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ(),
    )  # fmt: skip
    assert server.stdout is not None
    log: list[str] = []
    url = ""
    for line in server.stdout:
        log.append(line)
        found = re.search(r"serving (http://\S+)", line)
        if found:
            url = found[1]
            break
    drain = threading.Thread(target=log.extend, args=(server.stdout,))
    drain.start()
    try:
        assert url, "".join(log)
        yield url
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(30)
        drain.join()
        server.stdout.close()
    assert code == 0, "".join(log)


def environ(url: str = "") -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MODELDEPOT_")}
    return clean | ({"MODELDEPOT_URL": url} if url else {})


class Shell:
    def __init__(self, url: str) -> None:
        self.url = url

    def run(self, *args: str, code: int = 0, **rest: str) -> subprocess.CompletedProcess[str]:
        env = environ(self.url) | rest
        done = subprocess.run(
            [*COMMAND, *args], capture_output=True, text=True, env=env, timeout=60, check=False
        )
        assert done.returncode == code, done.stderr
        return done

    @contextmanager
    def started(self, *args: str) -> Iterator[subprocess.Popen[str]]:
        with subprocess.Popen(
            [*COMMAND, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environ(self.url),
        ) as process:  # fmt: skip
            try:
                yield process
            finally:
                process.kill()


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    (root / "repo/double").mkdir(parents=True)
    (root / "repo/double/config.yaml").write_text(CONFIG)
    (root / "repo/double/model.py").write_text(DOUBLE)
    return root / "repo"


@pytest.fixture(scope="module")
def shell(repo: Path) -> Iterator[Shell]:
    with serving(repo, "--model-control-mode", "explicit") as url:
        yield Shell(url)


def test_a_model_is_loaded_used_reloaded_and_unloaded(shell: Shell, tmp_path: Path) -> None:
    load = shell.run("load", "double")
    assert load.stdout == "Model double loaded successfully\n"
    states = re.findall(r"#\d+  (\w+)", load.stderr)
    assert states[:4] == ["queued", "loading", "warming", "ready"]

    (tmp_path / "in.json").write_text('{"x": [1, 2.5]}')
    said = shell.run("infer", "double", "-f", str(tmp_path / "in.json"), "--json").stdout
    assert json.loads(said)["outputs"][0]["data"] == [2.0, 5.0]

    shell.run("reload", "double")
    found = json.loads(shell.run("status", "double", "--json").stdout)
    assert found["state"] == "loaded"
    assert found["generations"][0]["serial"] > 1

    assert "are free again" in shell.run("unload", "double").stdout
    assert "unloaded" in shell.run("status").stdout


def test_a_model_that_is_not_there_is_exit_code_3(shell: Shell) -> None:
    assert "Error: " in shell.run("load", "nope", code=3).stderr


def test_a_model_that_fails_is_exit_code_1_with_the_reason(shell: Shell, repo: Path) -> None:
    made = repo.parent / "broken.py"
    made.write_text("raise RuntimeError('the weights are sour')\n")
    shell.run("init", "broken", "--from", str(made), "--repo", str(repo))
    assert "the weights are sour" in shell.run("load", "broken", code=1).stderr
    assert "the weights are sour" in shell.run("status", "broken").stdout
    shutil.rmtree(repo / "broken")


def test_ctrl_c_ends_events_quietly_with_130(shell: Shell) -> None:
    with shell.started("events", "--json") as events:
        assert events.stdout is not None and events.stderr is not None
        until_one_line(shell, events.stdout)
        events.send_signal(signal.SIGINT)
        assert events.wait(10) == 130
        assert events.stderr.read() == ""


def test_a_reader_that_leaves_ends_events_quietly(shell: Shell) -> None:
    with shell.started("events") as events:
        assert events.stdout is not None and events.stderr is not None
        until_one_line(shell, events.stdout)
        events.stdout.close()
        while events.poll() is None:
            shell.run("reload", "double")
        assert events.stderr.read() == ""


def until_one_line(shell: Shell, out: IO[str]) -> None:
    """Returns once the process has printed something, which proves that it listens."""
    reader = threading.Thread(target=out.readline)
    reader.start()
    while reader.is_alive():
        shell.run("reload", "double")


def test_the_metrics_page_tells_what_happened(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text('{"x": [1]}')
    shell.run("load", "double")
    shell.run("infer", "double", "-f", str(tmp_path / "in.json"))
    page = httpx.get(f"{shell.url}/metrics").text
    series = {
        (s.name, s.labels.get("model")): s.value for f in parse(page) for s in f.samples
        if s.labels.get("state", "loaded") == "loaded"
    }  # fmt: skip
    for name in (
        "model_state", "model_info", "model_memory_reserved_bytes", "worker_up",
        "inference_requests_total", "inference_executions_total", "inference_in_flight",
        "inference_duration_seconds_count", "model_load_total",
    ):  # fmt: skip
        assert ("modeldepot_" + name, "double") in series
    assert series["modeldepot_model_state", "double"] == 1
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not on PATH: the page was parsed, not linted")
    check = ["promtool", "check", "metrics"]
    # Triton's names are Triton's, whatever a linter thinks of their units.
    ours = "".join(f"{row}\n" for row in page.splitlines() if "nv_" not in row)
    said = subprocess.run(check, input=ours, capture_output=True, text=True, check=False)
    assert (said.returncode, said.stdout + said.stderr) == (0, "")


def test_a_key_made_by_keys_new_opens_the_server(repo: Path, tmp_path: Path) -> None:
    made = Shell("").run("keys", "new", "--name", "ci", "--scope", "admin")
    key_file = tmp_path / "keys.yaml"
    key_file.write_text(made.stderr[made.stderr.rindex("keys:") :])
    flags = ("--api-keys", str(key_file), "--model-control-mode", "explicit")
    with serving(repo, *flags, state="with keys") as url:
        shell = Shell(url)
        assert "MODELDEPOT_API_KEY" in shell.run("load", "double", code=4).stderr
        shell.run("load", "double", code=4, MODELDEPOT_API_KEY="wrong")
        shell.run("load", "double", MODELDEPOT_API_KEY=made.stdout.strip())
