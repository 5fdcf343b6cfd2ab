"""Triton's own client loads and unloads: the cases of its lifecycle, on one real server for all that do
not end it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from tritonclient import http
from tritonclient.utils import InferenceServerException

from tests.e2e.lasting import Lasting, lasting
from tests.e2e.server import WITHIN_S, add_model, open_gate
from tests.models import add_onnx

pytestmark = pytest.mark.e2e

FLAGS = (
    "--model-control-mode=explicit", "--allow-grpc=false", "--allow-file-override=true",
    "--strict-readiness=true", "--model-load-retry-count=1", "--backend-directory=/opt/backends",
)  # fmt: skip
BATCHED = '{"max_batch_size": 8}'
FAILS = json.dumps({"output": [{"name": "z", "data_type": "TYPE_FP32", "dims": [-1, 4]}]})


class Stage:
    """A server on two folders. Clients are of the thread that asks for them."""

    def __init__(self, server: Lasting, repo: Path, other: Path, gates: Path) -> None:
        self.server, self.repo, self.other, self.gates = server, repo, other, gates
        self._workers = ThreadPoolExecutor(8)

    def end(self) -> None:
        self._workers.shutdown()

    def client(self) -> http.InferenceServerClient:
        return http.InferenceServerClient(
            self.server.url.removeprefix("http://"), network_timeout=WITHIN_S
        )

    def do(self, verb: str, *args: Any, **how: Any) -> Any:
        with closing(self.client()) as client:
            return getattr(client, verb)(*args, **how)

    def later(self, verb: str, *args: Any, **how: Any) -> Future[Any]:
        return self._workers.submit(self.do, verb, *args, **how)

    def refused(self, verb: str, *args: Any, **how: Any) -> str:
        with pytest.raises(InferenceServerException) as caught:
            self.do(verb, *args, **how)
        return str(caught.value)

    def ask(self, name: str, version: str = "") -> float:
        x = http.InferInput("x", [1, 4], "FP32")
        x.set_data_from_numpy(np.zeros((1, 4), np.float32))
        return float(self.do("infer", name, [x], version).as_numpy("y")[0, 0])

    def ask_gated(self, name: str) -> list[float]:
        x = http.InferInput("x", [2], "FP32")
        x.set_data_from_numpy(np.array([1, 2], np.float32))
        found: list[float] = self.do("infer", name, [x]).as_numpy("y").tolist()
        return found

    def entries(self, name: str) -> list[dict[str, str]]:
        index = self.do("get_model_repository_index")
        return [entry for entry in index if entry["name"] == name]

    def generation(self, name: str, version: int = 1) -> int:
        found = requests.get(f"{self.server.url}/v1/models/{name}", timeout=WITHIN_S).json()
        (gen,) = [
            g for g in found["generations"] if g["version"] == version and g["state"] == "ready"
        ]
        return int(gen["serial"])

    def drop(
        self, name: str, value: float = 1.0, version: int = 1, root: Path | None = None
    ) -> None:
        add_onnx((root or self.repo) / name / str(version) / "model.onnx", value=value)

    def reached(self, gate: str) -> None:
        until(lambda: (self.gates / f"{gate}.reached").exists())


def until(condition: Callable[[], bool]) -> None:
    """What another process does shows in a file, or in what it answers."""
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    home = tmp_path_factory.mktemp("triton")
    folders = [home / name for name in ("models", "other", "gates")]
    for folder in folders:
        folder.mkdir()
    repo, other, gates = folders
    with lasting(repo, *FLAGS, f"--model-repository={other}") as server:
        stage = Stage(server, repo, other, gates)
        try:
            yield stage
        finally:
            stage.end()


# availability ------------------------------------------------------------------------------------


def test_while_a_model_reloads_the_old_one_serves_and_nothing_else_waits(stage: Stage) -> None:
    """The new one stands at its gate for as long as the test looks: health, index, inference and loads
    of others are answered meanwhile."""
    add_model(stage.repo, stage.gates, "slow")
    stage.drop("quick")
    stage.do("load_model", "slow")
    stage.do("load_model", "quick")
    first = stage.generation("slow")
    shutil.rmtree(stage.repo / "slow")
    add_model(stage.repo, stage.gates, "slow", load="slow-load")
    reload = stage.later("load_model", "slow")
    stage.reached("slow-load")
    assert stage.entries("slow") == [
        {
            "name": "slow",
            "version": "1",
            "state": "READY",
            "reason": "a newer one is being loaded",
        }
    ]
    assert stage.do("is_server_live") and stage.do("is_server_ready"), "a reload counts for nothing"
    assert stage.do("is_model_ready", "slow") and stage.ask_gated("slow") == [1.0, 2.0]
    assert stage.ask("quick") == 1.0
    stage.drop("another")
    stage.do("load_model", "another")
    stage.do("unload_model", "another")
    assert stage.generation("slow") == first and not reload.done()
    open_gate(stage.gates, "slow-load")
    reload.result(WITHIN_S)
    assert stage.generation("slow") > first and stage.ask_gated("slow") == [1.0, 2.0]


def test_a_first_load_makes_a_strict_server_unready_and_an_unloaded_model_does_not(
    stage: Stage,
) -> None:
    assert stage.do("is_server_ready")
    add_model(stage.repo, stage.gates, "new", load="new-load")
    loading = stage.later("load_model", "new")
    stage.reached("new-load")
    assert not stage.do("is_server_ready") and stage.do("is_server_live")
    assert [entry["state"] for entry in stage.entries("new")] == ["LOADING"]
    open_gate(stage.gates, "new-load")
    loading.result(WITHIN_S)
    assert stage.do("is_server_ready")
    stage.do("unload_model", "new")
    assert not stage.do("is_model_ready", "new") and stage.do("is_server_ready")


def test_a_failed_reload_keeps_the_old_one_and_the_index_says_why(stage: Stage) -> None:
    stage.drop("steady")
    stage.do("load_model", "steady")
    first = stage.generation("steady")
    text = stage.refused("load_model", "steady", config=FAILS)
    assert "load failed for model 'steady': version 1 is at UNAVAILABLE state: Internal: " in text
    stage.server.said(r"steady:1#\d+: .*; tried again, 0 more")
    assert stage.generation("steady") == first and stage.ask("steady") == 1.0
    (entry,) = stage.entries("steady")
    assert entry["state"] == "READY" and "'z'" in entry["reason"]
    assert stage.do("is_server_ready")


def test_an_unknown_model_cannot_be_loaded_and_is_unloaded_already(stage: Stage) -> None:
    text = stage.refused("load_model", "unknown_model")
    assert "failed to load 'unknown_model', failed to poll from model repository" in text
    stage.do("unload_model", "unknown_model")
    assert "path traversal characters" in stage.refused("load_model", "a/../b")


# at once -----------------------------------------------------------------------------------------


def test_loads_of_different_models_run_beside_each_other(stage: Stage) -> None:
    """Each stands at its own gate: both must have begun before either may end."""
    for name in ("left", "right"):
        add_model(stage.repo, stage.gates, name, load=f"{name}-load")
    loads = [stage.later("load_model", name) for name in ("left", "right")]
    for name in ("left", "right"):
        stage.reached(f"{name}-load")
    for name in ("right", "left"):
        open_gate(stage.gates, f"{name}-load")
    for load in loads:
        load.result(WITHIN_S)
    assert stage.do("is_model_ready", "left") and stage.do("is_model_ready", "right")


def test_loads_of_one_model_at_once_are_one_load(stage: Stage) -> None:
    add_model(stage.repo, stage.gates, "one", load="one-load")
    loads = [stage.later("load_model", "one") for _ in range(3)]
    stage.reached("one-load")
    open_gate(stage.gates, "one-load")
    for load in loads:
        load.result(WITHIN_S)
    found = requests.get(f"{stage.server.url}/v1/models/one", timeout=WITHIN_S).json()
    assert len(found["generations"]) == 1


def test_an_unload_during_a_load_wins_and_the_load_says_so(stage: Stage) -> None:
    add_model(stage.repo, stage.gates, "torn", load="torn-load")
    loading = stage.later("load_model", "torn")
    stage.reached("torn-load")
    stage.do("unload_model", "torn")
    with pytest.raises(InferenceServerException, match="Newer operation has been applied"):
        loading.result(WITHIN_S)
    open_gate(stage.gates, "torn-load")
    assert not stage.do("is_model_ready", "torn")
    stage.do("load_model", "torn")
    assert stage.do("is_model_ready", "torn")


def test_an_unload_answers_at_once_and_lets_what_runs_end(stage: Stage) -> None:
    add_model(stage.repo, stage.gates, "busy", infer="busy-infer")
    stage.do("load_model", "busy")
    asked = stage._workers.submit(stage.ask_gated, "busy")
    stage.reached("busy-infer")
    stage.do("unload_model", "busy")
    assert not stage.do("is_model_ready", "busy")
    assert [entry["state"] for entry in stage.entries("busy")] == ["UNLOADING"]
    open_gate(stage.gates, "busy-infer")
    assert asked.result(WITHIN_S) == [1.0, 2.0]
    until(lambda: stage.entries("busy")[0].get("reason") == "unloaded")


# what counts as a change -------------------------------------------------------------------------


def test_a_new_version_is_loaded_and_the_others_stay_as_they_are(stage: Stage) -> None:
    stage.drop("versions", 1.0, version=1)
    (stage.repo / "versions" / "config.pbtxt").write_text("version_policy { all {} }\n")
    stage.do("load_model", "versions")
    first = stage.generation("versions", 1)
    stage.drop("versions", 2.0, version=2)
    stage.do("load_model", "versions")
    assert stage.generation("versions", 1) == first
    assert (stage.ask("versions"), stage.ask("versions", "1")) == (2.0, 1.0)
    assert [e["version"] for e in stage.entries("versions")] == ["1", "2"]


def test_a_rollback_by_rsync_is_seen(stage: Stage, tmp_path: Path) -> None:
    stage.drop("back", 1.0)
    for path in ("1/model.onnx", "1", "."):
        os.utime(stage.repo / "back" / path, (1.6e9, 1.6e9))
    subprocess.run(["rsync", "-a", f"{stage.repo}/back/", tmp_path / "old"], check=True)
    stage.drop("back", 2.0)
    stage.do("load_model", "back")
    assert stage.ask("back") == 2.0
    subprocess.run(["rsync", "-a", f"{tmp_path}/old/", stage.repo / "back"], check=True)
    stage.do("load_model", "back")
    assert stage.ask("back") == 1.0


def test_a_model_of_any_folder_is_served_and_one_of_two_is_not_loadable(stage: Stage) -> None:
    stage.drop("elsewhere", 4.0, root=stage.other)
    stage.do("load_model", "elsewhere")
    assert stage.ask("elsewhere") == 4.0
    stage.drop("twice", 1.0)
    stage.drop("twice", 2.0, root=stage.other)
    reason = "model appears in two or more repositories"
    assert reason in stage.refused("load_model", "twice")
    assert stage.entries("twice") == [{"name": "twice", "state": "UNAVAILABLE", "reason": reason}]
    shutil.rmtree(stage.other / "twice")
    stage.do("load_model", "twice")
    assert stage.ask("twice") == 1.0


# what a load brings ------------------------------------------------------------------------------


def test_a_config_that_a_load_brings_stays_until_the_files_change(stage: Stage) -> None:
    stage.drop("config")
    stage.do("load_model", "config")
    assert stage.do("get_model_config", "config").get("max_batch_size", 0) == 0
    stage.do("load_model", "config", config=BATCHED)
    assert stage.do("get_model_config", "config")["max_batch_size"] == 8
    brought = stage.generation("config")
    stage.do("load_model", "config")
    assert stage.generation("config") == brought
    text = stage.refused("load_model", "config", config='{"max_batch_sizes": 8}')
    assert "failed to load 'config', failed to poll from model repository" in text
    assert stage.generation("config") == brought
    stage.drop("config", 2.0)
    stage.do("load_model", "config")
    assert stage.do("get_model_config", "config").get("max_batch_size", 0) == 0
    assert stage.ask("config") == 2.0
    stage.do("load_model", "config", config=BATCHED)  # the same again, of other files
    assert stage.do("get_model_config", "config")["max_batch_size"] == 8


def test_files_that_a_load_brings_stand_in_place_of_the_folder(
    stage: Stage, tmp_path: Path
) -> None:
    stage.drop("files", 1.0, version=3)
    stage.do("load_model", "files")
    content = add_onnx(tmp_path / "made.onnx", value=5.0).read_bytes()
    text = stage.refused("load_model", "files", files={"file:1/model.onnx": content})
    assert "failed to load 'files', failed to poll from model repository" in text
    text = stage.refused("load_model", "files", config="{}", files={"file:CON": content})
    assert "the files hold no model" in text
    assert stage.do("is_model_ready", "files", "3")
    for name in ("files", "fresh"):
        stage.do("load_model", name, config="{}", files={"file:1/model.onnx": content})
        assert stage.do("is_model_ready", name, "1") and stage.ask(name) == 5.0
    assert not stage.do("is_model_ready", "files", "3")
    stage.do("load_model", "files")
    assert stage.do("is_model_ready", "files", "3") and stage.ask("files") == 1.0
    stage.do("unload_model", "fresh")
    assert "failed to load 'fresh'" in stage.refused("load_model", "fresh")
    assert sorted(os.listdir(stage.repo / "files")) == ["3"], "the repository is not written to"
    home = stage.repo.parent / "state" / "brought"
    until(lambda: not os.listdir(home))


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", "1/../../../evil", "..", "a/../../b"])
def test_a_file_that_leads_elsewhere_is_refused_and_nothing_is_written(
    stage: Stage, name: str
) -> None:
    before = {p for p in stage.repo.parent.rglob("*") if "evil" in p.name}
    text = stage.refused("load_model", "evil", config="{}", files={f"file:{name}": b"evil"})
    assert "invalid file name" in text and str(stage.repo.parent) not in text
    assert {p for p in stage.repo.parent.rglob("*") if "evil" in p.name} == before == set()
    assert stage.entries("evil") == []


# the start and the end ---------------------------------------------------------------------------


def test_the_log_says_which_flags_of_tritons_mean_nothing_here(stage: Stage) -> None:
    stage.server.said(r"taken and not used: --backend-directory=/opt/backends$")


def test_a_shutdown_ends_a_load_that_would_never_end(tmp_path: Path) -> None:
    """Its time is over before the model is loaded: the load is told so, and nothing stays."""
    repo, gates = tmp_path / "models", tmp_path / "gates"
    gates.mkdir()
    add_model(repo, gates, "m", load="load")
    add_model(repo, gates, "n")
    flags = ("--model-control-mode=explicit", "--no-allow-grpc", "--exit-timeout-secs=5")
    with lasting(repo, *flags, "--load-model=n") as server:
        with ThreadPoolExecutor(1) as other:
            load = f"{server.url}/v2/repository/models/m/load"
            loading = other.submit(requests.post, load, timeout=WITHIN_S)
            until((gates / "load.reached").exists)
            server.process.send_signal(signal.SIGTERM)
            reply = loading.result(WITHIN_S)
        assert reply.status_code in (400, 503) and "error" in reply.json(), reply.text
        assert server.process.wait(WITHIN_S) == 0


def test_a_server_that_runs_out_of_time_says_so_in_tritons_words(tmp_path: Path) -> None:
    repo, gates = tmp_path / "models", tmp_path / "gates"
    gates.mkdir()
    add_model(repo, gates, "m", infer="infer")
    flags = ("--no-allow-grpc", "--exit-timeout-secs=1")
    with lasting(repo, *flags) as server:
        body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2], "data": [1, 2]}]}

        def ask() -> None:
            with pytest.raises(requests.RequestException):
                requests.post(
                    f"{server.url}/v2/models/m/infer", json=body, timeout=WITHIN_S
                ).raise_for_status()

        with ThreadPoolExecutor(1) as other:
            asked = other.submit(ask)
            until((gates / "infer.reached").exists)
            server.process.send_signal(signal.SIGTERM)
            server.said("Exit timeout expired. Exiting immediately.")
            asked.result(WITHIN_S)
        assert server.process.wait(WITHIN_S) == 1
