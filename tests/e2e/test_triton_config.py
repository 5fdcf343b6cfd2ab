"""GET .../config of a real server, as Triton's clients and protobuf's own classes understand it."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import tritonclient.http as triton
from google.protobuf import json_format
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException

from tests.e2e.lasting import Lasting, lasting
from tests.models import add_onnx
from tests.triton_models import write_simple

pytestmark = pytest.mark.e2e

AUTO = """\
parameters { key: "intra_op_thread_count" value { string_value: "1" } }
instance_group { count: 2 kind: KIND_CPU }
model_warmup { name: "w" batch_size: 2
  inputs { key: "x" value { data_type: TYPE_FP32 dims: 4 input_data_file: "rows" } } }
"""
RESHAPED = """\
max_batch_size: 8
input { name: "x" data_type: TYPE_FP32 dims: [ 2, 2 ] reshape { shape: 4 } }
output { name: "y" data_type: TYPE_FP32 dims: [ 4, 1 ] reshape { shape: 4 } }
dynamic_batching { max_queue_delay_microseconds: 100 default_queue_policy { timeout_action: DELAY } }
metric_tags { key: "team" value: "vision" }
"""
TEXTS = {"auto": AUTO, "reshaped": RESHAPED}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lasting]:
    repo = tmp_path_factory.mktemp("triton") / "models"
    write_simple(repo)
    for name, text in TEXTS.items():
        add_onnx(repo / name / "1" / "model.onnx")
        (repo / name / "config.pbtxt").write_text(text)
    (repo / "auto" / "warmup").mkdir()
    (repo / "auto" / "warmup" / "rows").write_bytes(bytes(2 * 4 * 4))
    add_onnx(repo / "ours" / "1" / "model.onnx")
    (repo / "ours" / "config.yaml").write_text("max_batch_size: 16\nbatching: {max_delay_us: 7}\n")
    with lasting(repo, "--no-allow-grpc") as running:
        yield running


@pytest.fixture
def client(server: Lasting) -> Iterator[triton.InferenceServerClient]:
    with closing(triton.InferenceServerClient(server.url.removeprefix("http://"))) as client:
        yield client


@pytest.mark.parametrize("model", ["simple", "auto", "reshaped", "ours"])
def test_every_config_is_one_that_protobuf_takes(client: Any, model: str) -> None:
    found = client.get_model_config(model, "1")
    message = json_format.ParseDict(found, model_config_pb2.ModelConfig())
    assert message.name == model and message.platform == "onnxruntime_onnx"
    assert message.version_policy.latest.num_versions == 1 and message.backend == "onnxruntime"
    assert message.default_model_filename == "model.onnx"
    assert message.optimization.output_pinned_memory.enable
    assert [t.name for t in (*message.input, *message.output)]
    assert {"cc_model_filenames", "metric_tags", "parameters", "model_warmup"} <= found.keys()


def test_what_was_written_is_shown_and_what_was_left_out_is_added(client: Any) -> None:
    auto = client.get_model_config("auto")
    assert auto["max_batch_size"] == 4 and auto["input"][0]["dims"] == [4]
    assert auto["dynamic_batching"]["preferred_batch_size"] == [4]
    (group,) = auto["instance_group"]
    assert (group["name"], group["count"], group["kind"]) == ("auto_0", 2, "KIND_CPU")
    assert auto["model_warmup"][0]["inputs"]["x"]["input_data_file"] == "rows"
    reshaped = client.get_model_config("reshaped")
    assert reshaped["input"][0]["reshape"] == {"shape": [4]}
    assert reshaped["metric_tags"] == {"team": "vision"}
    policy = reshaped["dynamic_batching"]["default_queue_policy"]
    assert policy["timeout_action"] == "DELAY" and policy["default_timeout_microseconds"] == 0
    ours = client.get_model_config("ours")
    assert ours["dynamic_batching"]["max_queue_delay_microseconds"] == 7
    assert ours["dynamic_batching"]["preferred_batch_size"] == [16]


def test_a_worker_answers_in_the_shapes_of_clients(client: Any) -> None:
    rows = np.arange(12, dtype=np.float32).reshape(3, 2, 2)
    asked = triton.InferInput("x", [3, 2, 2], "FP32")
    asked.set_data_from_numpy(rows)
    for _ in range(3):
        answer = client.infer("reshaped", [asked]).as_numpy("y")
        assert answer.shape == (3, 4, 1)
        assert np.array_equal(answer.reshape(-1), rows.reshape(-1) + 1)
    metadata = client.get_model_metadata("reshaped")
    assert metadata["inputs"][0]["shape"] == [-1, 2, 2]


def test_64_bit_numbers_are_numbers_and_the_body_is_compact(server: Lasting) -> None:
    with closing(http.client.HTTPConnection(urlsplit(server.url).netloc)) as connection:
        connection.request("GET", "/v2/models/simple/config")
        reply = connection.getresponse()
        body = reply.read()
    assert reply.status == 200 and reply.headers["Content-Type"] == "application/json"
    assert b'"dims":[16]' in body and b'": ' not in body
    assert json.loads(body)["input"][0]["dims"] == [16]


@pytest.mark.parametrize(
    ("model", "version", "why"),
    [
        ("nobody", "", "Request for unknown model: 'nobody' is not found"),
        ("simple", "7", "Request for unknown model: 'simple' version 7 is not found"),
    ],
)
def test_who_is_not_there_has_no_config(client: Any, model: str, version: str, why: str) -> None:
    with pytest.raises(InferenceServerException, match=why) as caught:
        client.get_model_config(model, version)
    assert caught.value.status() == "404"
