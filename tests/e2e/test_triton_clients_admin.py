"""What Triton's four clients may rely on when they look after a server: the same promises of each."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.e2e.lasting import Lasting, lasting
from tests.e2e.server import WITHIN_S
from tests.e2e.triton_clients import KINDS, Client, connected
from tests.e2e.triton_scene import DECOUPLED, write_python
from tests.integration.test_routes_keys import write_keys
from tests.triton_models import ELEMENTS, write_all, write_simple

pytestmark = pytest.mark.e2e

SUMS = {"INPUT0": np.ones((1, ELEMENTS), np.int32), "INPUT1": np.ones((1, ELEMENTS), np.int32)}
TRACE_ID, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
_NUMBERS = itertools.count(1)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("admin")
    repo = folder / "models"
    write_all(repo)
    for number in range(len(KINDS)):
        write_simple(repo, f"comes{number}")
    (repo / "broken" / "1").mkdir(parents=True)
    (repo / "broken" / "1" / "model.onnx").write_bytes(b"no model")
    write_python(
        repo, "repeat_int32", "repeat", {"IN": "INT32 [-1]", "DELAY": "UINT32 [-1]"},
        {"OUT": "INT32 [1]", "IDX": "UINT32 [1]"}, more=DECOUPLED,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[Lasting]:
    flags = (
        "--model-control-mode=explicit", "--load-model=simple", "--load-model=simple_identity",
        "--load-model=repeat_int32", "--server-name=triton",
        f"--trace-config=triton,file={home / 'trace.jsonl'}",
    )  # fmt: skip
    with lasting(home / "models", *flags, grpc=True) as running:
        yield running


@pytest.fixture(params=KINDS)
def client(server: Lasting, request: pytest.FixtureRequest) -> Iterator[Client]:
    with connected(request.param, server) as client:
        yield client


def until(found: Callable[[], Any], why: str) -> Any:
    """What another process does shows in a file, or in what it answers."""
    deadline = time.monotonic() + WITHIN_S
    while not (seen := found()):
        assert time.monotonic() < deadline, why
        threading.Event().wait(0.02)
    return seen


# what it says of itself ---------------------------------------------------------------------------


def test_health_and_metadata(client: Client) -> None:
    assert client.do("is_server_live") and client.do("is_server_ready")
    assert client.do("is_model_ready", "simple") and client.do("is_model_ready", "simple", "1")
    assert not client.do("is_model_ready", "nobody")
    assert not client.do("is_model_ready", "simple", "7")
    about = client.show("get_server_metadata")
    assert about["name"] == "triton" and about["version"]
    assert {"sequence", "statistics", "trace", "logging"} <= set(about["extensions"])
    model = client.show("get_model_metadata", "simple")
    assert (model["name"], model["versions"], model["platform"]) == (
        "simple", ["1"], "onnxruntime_onnx",
    )  # fmt: skip
    assert model["inputs"][0] == {"name": "INPUT0", "datatype": "INT32", "shape": [-1, ELEMENTS]}
    error = client.refused("get_model_metadata", "nobody")
    assert "Request for unknown model: 'nobody' is not found" in error


def test_a_models_config(client: Client) -> None:
    config = client.show("get_model_config", "simple")
    assert (config["name"], config["max_batch_size"]) == ("simple", 8)
    assert [(one["name"], one["data_type"]) for one in config["output"]] == [
        ("OUTPUT0", "TYPE_INT32"), ("OUTPUT1", "TYPE_INT32"),
    ]  # fmt: skip
    assert client.show("get_model_config", "repeat_int32", "1")["model_transaction_policy"] == {
        "decoupled": True
    }
    assert "unknown model: 'nobody'" in client.refused("get_model_config", "nobody")


# loads --------------------------------------------------------------------------------------------


def entry(client: Client, model: str) -> dict[str, Any]:
    each = [e for e in client.show("get_model_repository_index") if e["name"] == model]
    assert len(each) == 1, each
    (found,) = each
    return {key: value for key, value in found.items() if value}


def test_a_model_is_loaded_with_another_config_and_unloaded(client: Client) -> None:
    name = f"comes{list(KINDS).index(client.name)}"  # what a load brings stays

    def most() -> int:
        return int(client.show("get_model_config", name)["max_batch_size"])

    client.do("load_model", name)
    assert entry(client, name) == {"name": name, "version": "1", "state": "READY"}
    assert most() == 8
    client.do("load_model", name, config=json.dumps({"max_batch_size": 3}))
    assert most() == 3
    rows = {tensor: np.tile(array, (4, 1)) for tensor, array in SUMS.items()}
    assert f"must be <= 3 for '{name}'" in client.refused("infer", name, rows)
    assert "failed to load" in client.refused("load_model", name, config="{no json")
    assert most() == 3, "and it still serves"
    client.do("unload_model", name)
    gone = entry(client, name)
    assert (gone["state"], gone["reason"]) == ("UNAVAILABLE", "unloaded")
    assert not client.do("is_model_ready", name)
    assert f"Request for unknown model: '{name}'" in client.refused("infer", name, SUMS)
    assert client.do("is_server_ready"), "an unloaded model does not make a server unready"
    client.do("load_model", name)
    assert most() == 3
    client.do("unload_model", name)


def test_what_cannot_be_loaded_says_why_and_the_index_too(client: Client) -> None:
    error = client.refused("load_model", "broken")
    assert error.startswith("failed to load 'broken'")
    assert entry(client, "broken")["state"] == "UNAVAILABLE" and entry(client, "broken")["reason"]
    assert "failed to load 'nobody'" in client.refused("load_model", "nobody")
    client.do("unload_model", "broken")


# counts -------------------------------------------------------------------------------------------


def counts(client: Client, model: str, version: str = "") -> dict[str, Any]:
    (found,) = client.show("get_inference_statistics", model, version)["model_stats"]
    assert isinstance(found, dict) and (found["name"], found["version"]) == (model, "1")
    return found


def number(stats: dict[str, Any], kind: str) -> int:
    return int(stats.get("inference_stats", {}).get(kind, {}).get("count", 0))


def test_statistics_grow_by_what_was_asked(client: Client) -> None:
    client.infer("simple", SUMS)
    before = counts(client, "simple")
    rows = {name: np.tile(array, (5, 1)) for name, array in SUMS.items()}
    for asked in (SUMS, SUMS, rows):
        client.infer("simple", asked)
    client.refused("infer", "simple", {"INPUT0": SUMS["INPUT0"]})
    after = counts(client, "simple", "1")
    assert after["inference_count"] - before["inference_count"] == 7
    assert after["execution_count"] - before["execution_count"] == 3
    assert number(after, "success") - number(before, "success") == 3
    assert number(after, "fail") - number(before, "fail") == 1
    assert after["last_inference"] >= before["last_inference"] > 0
    assert after["inference_stats"]["compute_infer"]["ns"] > 0
    batches = {one["batch_size"]: one["compute_infer"]["count"] for one in after["batch_stats"]}
    assert batches[5] >= 1 and sum(batches.values()) == after["execution_count"]
    everyone = client.show("get_inference_statistics")["model_stats"]
    assert {"simple", "repeat_int32"} <= {one["name"] for one in everyone}
    error = client.refused("get_inference_statistics", "nobody")
    assert "requested model 'nobody' is not available" in error


def asked_so_far(server: Lasting, protocol: str) -> float:
    page = httpx.get(f"{server.url}/metrics").text
    wanted = (
        "modeldepot_inference_requests_total{",
        f'protocol="{protocol}"',
        'model="simple"',
        '"success"',
    )
    lines = [line for line in page.splitlines() if all(part in line for part in wanted)]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def test_metrics_tell_the_protocols_apart(server: Lasting, client: Client) -> None:
    other = "grpc" if client.protocol == "http" else "http"
    mine, others = asked_so_far(server, client.protocol), asked_so_far(server, other)
    client.infer("simple", SUMS)
    until(lambda: asked_so_far(server, client.protocol) == mine + 1, "the page never said so")
    assert asked_so_far(server, other) == others


# settings -----------------------------------------------------------------------------------------


def test_log_settings(client: Client) -> None:
    told = client.show("get_log_settings")
    assert told == {
        "log_file": "", "log_info": True, "log_warning": True, "log_error": True,
        "log_verbose_level": 0, "log_format": "default",
    }  # fmt: skip
    changed = client.show("update_log_settings", {"log_info": False, "log_verbose_level": 1})
    assert (changed["log_info"], changed["log_verbose_level"]) == (False, 1)
    assert client.show("update_log_settings", {"log_info": True, "log_verbose_level": 0}) == told
    assert "log file location" in client.refused("update_log_settings", {"log_file": "/tmp/x"})
    assert client.refused("update_log_settings", {"log_format": "of its own"})


def test_trace_settings_of_the_server_and_of_a_model(client: Client, home: Path) -> None:
    start = {
        "trace_level": ["OFF"], "trace_rate": "1000", "trace_count": "-1", "log_frequency": "0",
        "trace_file": str(home / "trace.jsonl"), "trace_mode": "triton",
    }  # fmt: skip
    assert client.show("get_trace_settings") == start
    changed = client.show(
        "update_trace_settings", "simple", {"trace_rate": "7", "trace_count": "3"}
    )
    assert changed == start | {"trace_rate": "7", "trace_count": "3"}
    assert client.show("get_trace_settings", "simple") == changed
    assert client.show("get_trace_settings") == start
    client.show("update_trace_settings", None, {"trace_rate": "9"})
    assert client.show("get_trace_settings", "simple_identity")["trace_rate"] == "9"
    assert client.show("get_trace_settings", "simple")["trace_rate"] == "7"
    clear: dict[str, Any] = {"trace_rate": None, "trace_count": None}
    assert client.show("update_trace_settings", "simple", clear)["trace_rate"] == "9"
    assert client.show("update_trace_settings", None, {"trace_rate": None}) == start
    error = client.refused("update_trace_settings", "simple", {"trace_rate": "x"})
    assert "Unable to parse 'trace_rate', got: x" in error
    error = client.refused("get_trace_settings", "nobody")
    assert "Request for unknown model : nobody" in error
    assert client.refused("update_trace_settings", "simple", {"trace_file": "/tmp/other"})


def traced(home: Path, id: str) -> dict[str, Any] | None:
    lines = (home / "trace.jsonl").read_text().splitlines(keepends=True)
    each = [json.loads(line) for line in lines if line.endswith("\n")]
    return next((one for one in each if one["request_id"] == id), None)


def test_a_trace_has_the_requests_id_its_times_in_order_and_its_tensors(
    client: Client, home: Path
) -> None:
    id = f"{client.name}-{next(_NUMBERS)}"
    before = time.time_ns()
    client.do("update_trace_settings", "simple", {"trace_level": ["TIMESTAMPS"], "trace_rate": "1"})
    headers = {"traceparent": f"00-{TRACE_ID}-{SPAN}-01"}
    client.infer("simple", SUMS, request_id=id, headers=headers)
    found = until(lambda: traced(home, id), "its trace never came")
    assert (found["model_name"], found["model_version"], found["outcome"]) == (
        "simple", 1, "success",
    )  # fmt: skip
    moments = {one["name"]: one["ns"] for one in found["timestamps"]}
    assert list(moments.values()) == sorted(moments.values()) and len(moments) == 11
    assert before <= moments[f"{client.protocol.upper()}_RECV_START"] < time.time_ns()
    assert moments["QUEUE_START"] <= moments["COMPUTE_START"] < moments["COMPUTE_END"]
    assert found["parent"] == {"trace_id": TRACE_ID, "span_id": SPAN}
    assert "tensors" not in found
    client.do("update_trace_settings", "simple", {"trace_level": ["TIMESTAMPS", "TENSORS"]})
    client.infer("simple", SUMS, "OUTPUT1", request_id=f"{id}-all")
    found = until(lambda: traced(home, f"{id}-all"), "its trace never came")
    told = [(t["activity"], t["name"], t["shape"], set(t["data"])) for t in found["tensors"]]
    assert told == [
        ("TENSOR_QUEUE_INPUT", "INPUT0", [1, ELEMENTS], {1}),
        ("TENSOR_QUEUE_INPUT", "INPUT1", [1, ELEMENTS], {1}),
        ("TENSOR_BACKEND_OUTPUT", "OUTPUT1", [1, ELEMENTS], {0}),
    ]
    client.do("update_trace_settings", "simple", {"trace_level": ["OFF"], "trace_rate": None})
    client.infer("simple", SUMS, request_id=f"{id}-off")
    client.do("update_trace_settings", "simple", {"trace_level": None})
    assert traced(home, f"{id}-off") is None


def test_a_stream_and_generate_are_traced_by_their_id(server: Lasting, home: Path) -> None:
    on = {"trace_level": ["TIMESTAMPS", "TENSORS"], "trace_rate": "1"}
    many = {"IN": np.array([5, 6], np.int32), "DELAY": np.zeros(2, np.uint32)}
    with connected("grpc.aio", server) as client:
        client.do("update_trace_settings", "repeat_int32", on)
        try:
            client.streamed(  # type: ignore[attr-defined]
                [{"model_name": "repeat_int32", "inputs": many, "request_id": "many"}]
            )
            found = until(lambda: traced(home, "many"), "its trace never came")
            assert found["tensors"][0]["data"] == [5, 6]
            asked = {"IN": [5], "DELAY": [0], "id": "told"}
            httpx.post(f"{server.url}/v2/models/repeat_int32/generate", json=asked)
            assert (
                until(lambda: traced(home, "told"), "its trace never came")["outcome"] == "success"
            )
        finally:
            cleared: dict[str, Any] = {"trace_level": None, "trace_rate": None}
            client.do("update_trace_settings", "repeat_int32", cleared)


# generate -----------------------------------------------------------------------------------------


def test_generate_and_generate_stream_over_both_kinds_of_models(server: Lasting) -> None:
    with httpx.Client(base_url=f"{server.url}/v2/models", timeout=40) as raw:
        row = {"INPUT0": [1] * ELEMENTS, "INPUT1": [1] * ELEMENTS, "id": "g"}
        found = raw.post("/simple/generate", json=row)
        assert found.headers["content-type"] == "application/json"
        assert found.json()["OUTPUT0"] == [2] * ELEMENTS and found.json()["model_version"] == "1"
        one = raw.post("/repeat_int32/generate", json={"IN": [4], "DELAY": [0]})
        assert (one.status_code, one.json()["OUT"], one.json()["IDX"]) == (200, 4, 0)
        many = raw.post("/repeat_int32/generate", json={"IN": [4, 2], "DELAY": [0, 0]})
        assert "generate expects model to produce exactly 1 response" in many.json()["error"]
        for model, asked, wanted in (
            ("repeat_int32", {"IN": [4, 2, 7], "DELAY": [0, 0, 0]}, [4, 2, 7]),
            ("simple", row, [[2] * ELEMENTS]),
        ):
            answer = raw.post(f"/{model}/generate_stream", json=asked)
            assert answer.headers["content-type"].startswith("text/event-stream")
            events = [json.loads(e.removeprefix("data: ")) for e in answer.text.split("\n\n") if e]
            output = "OUT" if model == "repeat_int32" else "OUTPUT0"
            assert [e[output] for e in events] == wanted
        wrong = raw.post("/nobody/generate_stream", json=row)
        assert wrong.status_code == 404 and "'nobody'" in wrong.json()["error"]


# who may ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lasting]:
    """Keys of its own for two groups, and API keys besides."""
    folder = tmp_path_factory.mktemp("locked")
    write_simple(folder / "models")
    keys = write_keys(folder / "keys.yaml", inference="key-i", admin="key-a")
    groups = "model-repository,statistics:x-admin=secret"
    flags = (
        f"--http-restricted-api={groups}", f"--grpc-restricted-protocol={groups}",
        f"--api-keys={keys}",
    )  # fmt: skip
    with lasting(folder / "models", *flags, grpc=True) as running:
        yield running


@pytest.mark.parametrize("name", KINDS)
def test_a_restricted_group_wants_its_header_and_a_key_besides(locked: Lasting, name: str) -> None:
    with connected(name, locked) as client:
        prefix = "triton-grpc-protocol-" if client.protocol == "grpc" else ""
        admin = {"authorization": "Bearer key-a"}
        opened = {f"{prefix}x-admin": "secret"}
        error = client.refused("get_model_repository_index", headers=admin)
        assert f"restricted, expecting header '{prefix}x-admin'" in error
        error = client.refused(
            "get_model_repository_index", headers={**admin, f"{prefix}x-admin": "wrong"}
        )
        assert "restricted" in error
        assert "API key missing" in client.refused("get_model_repository_index", headers=opened)
        index = client.show("get_model_repository_index", headers=admin | opened)
        assert [one["name"] for one in index] == ["simple"]
        assert client.do("is_server_live")
        assert "API key missing" in client.refused("infer", "simple", SUMS)
        key = {"authorization": "Bearer key-i"}
        answer = client.infer("simple", SUMS, headers=key)
        assert answer.arrays["OUTPUT0"][0, 0] == 2
        client.refused("unload_model", "simple", headers=key | opened)
        assert client.do("is_model_ready", "simple", headers=key)
