"""What the `modeldepot` command promises: to people at a terminal, and to scripts by its exit codes."""

from __future__ import annotations

import hashlib
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repository.events import Event
from server.cli import COMMANDS
from server.cli.steps import Steps
from tests.cli import model, run
from tests.fakes.depot import FakeDepot, depot, frame

HEAVY = {"httpx", "rich", "litestar", "uvicorn", "numpy", "msgspec", "yaml", "asyncio", "torch"}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDepot]:
    with depot() as fake:
        monkeypatch.setenv("MODELDEPOT_URL", fake.url)
        monkeypatch.delenv("MODELDEPOT_API_KEY", raising=False)
        yield fake


# the command itself -------------------------------------------------------------------------------


def test_help_imports_nothing_that_is_slow() -> None:
    code = (
        "import sys; from server.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    )
    code += "print(sorted(m for m in sys.modules if '.' not in m))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(said.stdout.splitlines()[-1].strip("[]").replace("'", "").split(", "))
    assert "click" in loaded
    assert loaded & HEAVY == set()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str) -> None:
    assert "Usage:" in run(name, "--help").stdout


def test_a_command_that_does_not_exist_is_a_usage_error() -> None:
    assert run("lode").exit_code == 2


# errors and exit codes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code", "exit_code"),
    [
        (400, "rejected", 1),
        (401, "unauthorized", 4),
        (403, "forbidden", 4),
        (404, "model_not_found", 3),
        (409, "superseded", 1),
        (500, "load_failed", 1),
        (500, "load_timeout", 5),
        (503, "draining", 1),
        (503, "timeout", 5),
        (507, "no_room", 1),
    ],
)
def test_a_servers_refusal_becomes_its_exit_code_and_its_own_words(
    server: FakeDepot, status: int, code: str, exit_code: int
) -> None:
    server.say("POST", "/v1/models/load", {"error": {"message": "because", "code": code}}, status)
    result = run("load", "m")
    assert result.exit_code == exit_code
    assert "Error: because" in result.stderr
    assert result.stdout == ""


def test_only_who_lacks_memory_is_sent_to_look_at_it(server: FakeDepot) -> None:
    for code, looks in (("no_room", True), ("not_kept", False), ("no_disk", False)):
        answer = {"error": {"message": "because", "code": code}}
        server.say("POST", "/v1/models/pin", answer, 507)
        assert ("modeldepot devices" in run("pin", "m").stderr) is looks, code


def test_nobody_listening_is_unreachable_and_says_what_to_do() -> None:
    with socket.socket() as taken:  # bound, not listening: refuses
        taken.bind(("127.0.0.1", 0))
        result = run("status", "--url", f"http://127.0.0.1:{taken.getsockname()[1]}")
    assert result.exit_code == 6
    assert "modeldepot serve" in result.stderr


def test_no_answer_in_time_is_a_timeout(server: FakeDepot) -> None:
    server.say("GET", "/v1/models/status", None)
    result = run("status", "--timeout", "0.05")
    assert result.exit_code == 5
    assert "--timeout" in result.stderr


def test_another_sort_of_server_is_told_from_ours(server: FakeDepot) -> None:
    server.say("GET", "/v1/models/status", b"<html>hello</html>")
    result = run("status")
    assert result.exit_code == 6
    assert "--url" in result.stderr


@pytest.mark.parametrize(
    "args",
    [
        ("status", "--url", "nonsense"),
        ("load", "../etc"),
        ("load", "m", "--timeout", "0"),
        ("unload",),
        ("unload", "m", "--all"),
        ("status", "-w", "--json"),
    ],
)
def test_what_cannot_be_meant_is_a_usage_error_and_nobody_is_asked(
    server: FakeDepot, args: tuple[str, ...]
) -> None:
    assert run(*args).exit_code == 2
    assert server.asked == []


def test_the_key_goes_with_every_request_and_may_come_from_the_environment(
    server: FakeDepot,
) -> None:
    server.say("GET", "/v1/models/m", model())
    run("status", "m", env={"MODELDEPOT_API_KEY": "sesame"})
    run("status", "m", "--api-key", "other", env={"MODELDEPOT_API_KEY": "sesame"})
    assert [a.headers["authorization"] for a in server.asked] == ["Bearer sesame", "Bearer other"]


# status -------------------------------------------------------------------------------------------


def test_status_shows_every_model_on_one_line_with_its_whole_last_error(
    server: FakeDepot,
) -> None:
    why = "the graph is " + "very " * 40 + "bad"
    bad = model("bad", "failed", last_error={"message": why}, generations=[], serving_version=None)
    server.say("GET", "/v1/models/status", {"loading_status": {"m": "loaded", "bad": "failed"}})
    server.say("GET", "/v1/models/m", model(reloading=True))
    server.say("GET", "/v1/models/bad", bad)
    head, first, second = run("status").stdout.splitlines()
    assert head.split()[:3] == ["MODEL", "STATE", "VERSION"]
    assert first.startswith("bad") and why in first
    assert second.split() == ["m", "loaded", "(reloading)", "2", "cpu", "2KiB", "2KiB", "1", "-"]


def test_status_of_one_model_tells_its_generations_and_its_story(server: FakeDepot) -> None:
    server.say("GET", "/v1/models/org/m", model("org/m"))
    said = run("status", "org/m").stdout
    assert "#3" in said and "The story of #3:" in said


def test_status_as_json_is_what_the_server_said(server: FakeDepot) -> None:
    server.say("GET", "/v1/models/m", model())
    assert json.loads(run("status", "m", "--json").stdout) == model()


def test_watching_asks_again_after_an_event_and_prints_what_changed(
    server: FakeDepot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.cli.status.TOGETHER_S", 0)
    monkeypatch.setattr("server.cli.client.AGAIN_S", (0.0,))
    server.say("GET", "/v1/models/m", model(state="loading"), then=model(state="loaded"))
    server.streams = [[frame(1, "ready")]]
    server.after_streams = (401, {"error": {"message": "key revoked"}}, {})
    result = run("status", "m", "-w")
    assert [line.split()[1] for line in result.stdout.splitlines()] == ["loading", "loaded"]
    assert result.exit_code == 4


def test_a_model_that_leaves_between_two_questions_is_left_out(server: FakeDepot) -> None:
    server.say("GET", "/v1/models/status", {"loading_status": {"m": "loaded", "gone": "loaded"}})
    server.say("GET", "/v1/models/m", model())
    assert len(run("status").stdout.splitlines()) == 2


# load, unload, reload -----------------------------------------------------------------------------


def test_load_shows_each_step_on_stderr_and_the_result_on_stdout(server: FakeDepot) -> None:
    states = ["queued", "loading", "warming", "ready"]
    server.streams = [[frame(i, state) for i, state in enumerate(states)]]
    server.say("POST", "/v1/models/load", {"message": "Model m loaded successfully"})
    result = run("load", "m")
    assert result.exit_code == 0
    assert result.stdout == "Model m loaded successfully\n"
    assert [line.split()[-1] for line in result.stderr.splitlines()] == states
    assert server.of("/v1/models/load")[0].json == {"model_name": "m", "force_reload": False}


def test_the_events_are_heard_before_the_load_is_asked_for(server: FakeDepot) -> None:
    server.say("POST", "/v1/models/load", {"message": "ok"})
    run("load", "m")
    assert [a.path for a in server.asked] == ["/v1/events", "/v1/models/load"]


def test_a_key_that_may_not_see_events_may_still_load(server: FakeDepot) -> None:
    server.say("GET", "/v1/events", {"error": {"message": "no", "code": "forbidden"}}, 403)
    server.say("POST", "/v1/models/load", {"message": "ok"})
    assert run("load", "m").exit_code == 0


def test_reload_and_load_force_ask_for_a_forced_load(server: FakeDepot) -> None:
    server.say("POST", "/v1/models/load", {"message": "ok"})
    run("reload", "m")
    run("load", "m", "--force")
    assert [a.json["force_reload"] for a in server.of("/v1/models/load")] == [True, True]


def test_a_dry_run_tells_the_numbers_and_who_would_leave(server: FakeDepot) -> None:
    said = {
        "message": "it would be loaded", "would_load": True, "bytes_needed": 2048,
        "bytes_free": 1024, "device": "cpu", "would_evict": ["old"],
    }  # fmt: skip
    server.say("POST", "/v1/models/load", said)
    result = run("load", "m", "--dry-run")
    assert "needs 2KiB on cpu" in result.stdout and "free: 1KiB on cpu" in result.stdout
    assert "would make room: old" in result.stdout and "gap" not in result.stdout
    assert server.asked[0].json["dry_run"] is True


def test_unload_says_what_came_back(server: FakeDepot) -> None:
    server.say("POST", "/v1/models/unload", {"message": "gone", "freed_bytes": 3 * 2**20})
    assert run("unload", "m").stdout == "gone; 3MiB are free again\n"


def test_unload_all_fails_if_one_did_not_go_and_names_it(server: FakeDepot) -> None:
    errors = [{"model": "stuck", "error": "busy"}]
    server.say("POST", "/v1/models/unload-all", {"total_unloaded": 2, "errors": errors})
    result = run("unload", "--all")
    assert result.exit_code == 1
    assert "2 models unloaded" in result.stdout and "stuck: busy" in result.stderr


def test_steps_are_timed_and_other_models_are_left_out() -> None:
    now = 0.0
    steps = Steps("m", clock=lambda: now)
    for at, state in ((0.0, "queued"), (1.5, "loading"), (4.0, "ready")):
        now = at
        steps.see(Event(1, "model.state", 0.0, "m", 1, 7, {"state": state}))
        assert steps.see(Event(2, "model.state", 0.0, "n", 1, 8, {"state": state})) is None
    assert steps.generations[7].line(now) == "m:1 #7  queued 1.5s → loading 2.5s → ready"
    assert not steps.rising


# events -------------------------------------------------------------------------------------------


def test_events_come_back_with_the_last_id_they_saw_and_stop_at_a_refusal(
    server: FakeDepot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.cli.client.AGAIN_S", (0.0,))
    server.streams = [[frame(4, "loading"), frame(5, "ready", note="a\u2028b")]]
    said: list[str] = []

    def lost(message: str, **_: Any) -> None:
        said.append(message)
        server.say("GET", "/v1/events", {"error": {"message": "key revoked"}}, 401)

    monkeypatch.setattr("server.cli.events.tell_lost", lost)
    result = run("events", "--json", "--model", "m")
    assert [json.loads(line)["id"] for line in result.stdout.split("\n")[:2]] == [4, 5]
    assert "a\u2028b" in result.stdout
    assert server.asked[1].headers["last-event-id"] == "5"
    assert result.exit_code == 4


# infer --------------------------------------------------------------------------------------------

METADATA = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}]}


def binary_answer(array: np.ndarray[Any, Any]) -> tuple[bytes, dict[str, str]]:
    raw = array.tobytes()
    output = {
        "name": "y", "datatype": "FP32", "shape": list(array.shape),
        "parameters": {"binary_data_size": len(raw)},
    }  # fmt: skip
    head = json.dumps({"model_name": "m", "model_version": "2", "outputs": [output]}).encode()
    return head + raw, {"inference_header_content_length": str(len(head))}


@pytest.mark.parametrize("kind", ["npz", "json"])
def test_infer_sends_arrays_as_the_model_wants_them_and_saves_what_comes_back(
    server: FakeDepot, tmp_path: Path, kind: str
) -> None:
    source, target = tmp_path / f"in.{kind}", tmp_path / "out.npz"
    if kind == "npz":
        np.savez(source, x=np.array([[1.0, 2.0]]))  # float64; the model wants FP32
    else:
        source.write_text('{"x": [[1, 2]]}')
    server.say("GET", "/v2/models/m", METADATA)
    body, headers = binary_answer(np.array([[0.25, 0.5]], np.float32))
    server.say("POST", "/v2/models/m/infer", body, 200, **headers)
    result = run("infer", "m", "-f", str(source), "--output", str(target))
    assert result.exit_code == 0, result.stderr
    asked = server.of("/v2/models/m/infer")[0]
    length = int(asked.headers["inference-header-content-length"])
    assert json.loads(asked.body[:length])["inputs"][0]["datatype"] == "FP32"
    assert asked.body[length:] == np.array([1, 2], np.float32).tobytes()
    with np.load(target) as found:
        assert found["y"].tolist() == [[0.25, 0.5]]


def test_infer_passes_a_whole_v2_request_on_unchanged(server: FakeDepot, tmp_path: Path) -> None:
    raw = '{"inputs": [{"name": "x", "shape": [1], "datatype": "INT8", "data": [NaN]}]}'
    output = {"name": "y", "datatype": "BYTES", "shape": [2], "data": ["a", "b"]}
    answer = {"model_name": "m", "model_version": "1", "outputs": [output]}
    server.say("POST", "/v2/models/m/versions/1/infer", answer)
    result = run("infer", "m", "-f", "-", "--version", "1", "--json", input=raw)
    assert server.asked[0].body.decode() == raw
    assert json.loads(result.stdout)["outputs"][0]["data"] == ["a", "b"]


def test_infer_says_which_inputs_there_are(server: FakeDepot, tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text('{"z": 1}')
    server.say("GET", "/v2/models/m", METADATA)
    result = run("infer", "m", "-f", str(tmp_path / "in.json"))
    assert result.exit_code == 2
    assert "no input 'z'; it has x" in result.stderr


@pytest.mark.parametrize(
    ("name", "content", "code"), [("no.npz", None, 3), ("a.npz", "x", 2), ("a.json", "[", 2)]
)
def test_an_input_that_cannot_be_read_is_no_traceback(
    tmp_path: Path, name: str, content: str | None, code: int
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    assert run("infer", "m", "-f", str(tmp_path / name)).exit_code == code


# keys ---------------------------------------------------------------------------------------------


def test_a_new_key_is_alone_on_stdout_and_its_line_knows_it_by_its_hash() -> None:
    result = run("keys", "new", "--name", "ci", "--scope", "inference", "--scope", "metrics")
    key = result.stdout.strip()
    assert hashlib.sha256(key.encode()).hexdigest() in result.stderr
    assert key not in result.stderr
    assert "scopes: [inference, metrics]" in result.stderr
