"""What GET .../config says of models that are hard to come by: on GPUs, in Python, with sequences."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from google.protobuf import json_format
from tritonclient.grpc import model_config_pb2

from repository.config import Batching, Ensemble, EnsembleStep, ModelConfig, TensorConfig
from repository.folder.layering import merge
from repository.folder.read_pbtxt import read_pbtxt
from repository.lifecycle.placement import Placement
from repository.messages import Loaded, TensorSpec
from server.triton.config import whole_config
from tests.fakes.heart import newborn, spec

X = TensorConfig(name="x", datatype="BYTES", shape=(4,), reshape=(2, 2), optional=True)
Y = TensorConfig(name="y", datatype="FP32", shape=(1,), labels="names.txt")


def shown(
    config: ModelConfig, loaded: Loaded | None = None, *, devices: tuple[str, ...] = ("cpu",)
) -> dict[str, Any]:
    """As JSON that protobuf takes, 64-bit numbers and all."""
    backend = config.backend or "onnx"
    what = replace(spec("m"), config=config, backend=backend, model_file="model.onnx")
    gen = newborn(what)
    gen.placement = Placement(devices, {})
    found = whole_config(gen, loaded or Loaded(max_batch_size=config.max_batch_size))
    json_format.Parse(json.dumps(found), model_config_pb2.ModelConfig())
    return found


def of(text: str) -> ModelConfig:
    return merge([read_pbtxt(text.encode(), "m")])[0]


def test_our_own_config_is_told_in_tritons_words() -> None:
    batching = Batching(max_delay_us=5, timeout_us=2**40, timeout_action="delay", max_queue=3)
    config = ModelConfig(
        backend="torchscript", max_batch_size=8, inputs=(X,), outputs=(Y,), batching=batching
    )
    found = shown(config, devices=("cuda:1", "cuda:1", "cuda:0"))
    assert (found["platform"], found["backend"]) == ("pytorch_libtorch", "pytorch")
    assert found["input"][0]["data_type"] == "TYPE_STRING" and found["input"][0]["optional"]
    assert found["input"][0]["reshape"] == {"shape": [2, 2]}
    assert found["output"][0]["label_filename"] == "names.txt"
    policy = found["dynamic_batching"]["default_queue_policy"]
    assert policy == {
        "timeout_action": "DELAY", "default_timeout_microseconds": 2**40,
        "allow_timeout_override": True, "max_queue_size": 3,
    }  # fmt: skip
    assert found["dynamic_batching"]["preferred_batch_size"] == [8]
    assert [(g["name"], g["kind"], g["count"], g["gpus"]) for g in found["instance_group"]] == [
        ("m", "KIND_GPU", 2, [1]), ("m_1", "KIND_GPU", 1, [0]),
    ]  # fmt: skip


def test_a_group_that_leaves_the_place_to_the_server_is_shown_where_it_is() -> None:
    text = "backend: 'onnxruntime' instance_group [ { count: 2 }, { kind: KIND_CPU name: 'own' } ]"
    found = shown(of(text), devices=("cuda:0", "cuda:0", "cpu"))
    assert [(g["name"], g["kind"], g["count"], g["gpus"]) for g in found["instance_group"]] == [
        ("m_0", "KIND_GPU", 2, [0]), ("own", "KIND_CPU", 1, []),
    ]  # fmt: skip
    (group,) = shown(of("backend: 'onnxruntime' instance_group { }"))["instance_group"]
    assert (group["kind"], group["count"]) == ("KIND_CPU", 1)


def test_what_a_model_in_python_completed_is_there() -> None:
    completed = {
        "name": "m",
        "max_batch_size": 3,
        "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [2]}],
        "output": [{"name": "y", "data_type": "TYPE_FP32", "dims": [2]}],
        "dynamic_batching": {},
        "model_transaction_policy": {"decoupled": True},
        "instance_group": [{"name": "its_own_business"}],
    }
    loaded = Loaded(max_batch_size=3, details={"triton_config": completed})
    found = shown(of("backend: 'python'"), loaded)
    assert found["max_batch_size"] == 3 and found["input"][0]["dims"] == [2]
    assert found["dynamic_batching"]["preferred_batch_size"] == [3]
    assert found["model_transaction_policy"] == {"decoupled": True}
    assert found["instance_group"][0]["name"] == "m"
    assert (found["platform"], found["backend"]) == ("", "python")


def test_a_model_that_batches_nothing_by_itself_has_no_batcher_added() -> None:
    loaded = Loaded((TensorSpec("x", "FP32", (-1, 2)),), max_batch_size=3)
    assert "dynamic_batching" not in shown(of("backend: 'python'"), loaded)
    assert "dynamic_batching" not in shown(of("max_batch_size: 3 backend: 'onnxruntime'"), loaded)
    assert "dynamic_batching" in shown(of("backend: 'onnxruntime'"), loaded)


def test_sequences_have_their_defaults_written_out() -> None:
    found = shown(of("backend: 'onnxruntime' max_batch_size: 4 sequence_batching { }"))
    batching = found["sequence_batching"]
    assert batching["max_sequence_idle_microseconds"] == 1_000_000
    assert batching["direct"] == {
        "max_queue_delay_microseconds": 0, "minimum_slot_utilization": 0.0,
    }  # fmt: skip
    assert batching["iterative_sequence"] is False and "dynamic_batching" not in found
    oldest = "sequence_batching { oldest { max_candidate_sequences: 2 } }"
    found = shown(of(f"backend: 'onnxruntime' max_batch_size: 4 {oldest}"))
    assert found["sequence_batching"]["oldest"]["preferred_batch_size"] == [4]


def test_an_ensemble_has_no_instances_and_no_file() -> None:
    steps = (EnsembleStep(model="a", inputs={"x": "x"}, outputs={"y": "y"}),)
    config = ModelConfig(backend="ensemble", ensemble=Ensemble(steps=steps, max_inflight=2))
    found = shown(config)
    assert (found["platform"], found["backend"]) == ("ensemble", "")
    assert found["instance_group"] == [] and "optimization" not in found
    (step,) = found["ensemble_scheduling"]["step"]
    assert (step["model_name"], step["model_version"]) == ("a", -1)
    assert found["ensemble_scheduling"]["max_inflight_requests"] == 2


@pytest.mark.parametrize(
    "order",
    [
        "direct { max_queue_delay_microseconds: 7 minimum_slot_utilization: 0.5 }",
        "oldest { max_candidate_sequences: 4 preferred_batch_size: [ 2 ] preserve_ordering: true }",
    ],
)
def test_sequences_of_our_own_config_are_told_as_of_tritons(order: str) -> None:
    """A client that looks for `sequence_batching` finds it, and no `dynamic_batching` beside it."""
    config = of(
        'backend: "onnxruntime" max_batch_size: 4 sequence_batching { '
        + order
        + """
          max_sequence_idle_microseconds: 9
          control_input { name: "START" control { kind: 0 int32_false_true: [ 0, 1 ] } }
          control_input { name: "READY" control { kind: 1 fp32_false_true: [ 0.5, 2 ] } }
          control_input { name: "END" control { kind: 2 bool_false_true: [ false, true ] } }
          control_input { name: "ID" control { kind: 3 data_type: TYPE_STRING } }
          state { input_name: "a" output_name: "b" data_type: TYPE_FP32 dims: [ 2, -1 ]
                  initial_state { data_type: TYPE_FP32 dims: [ 2, 3 ] data_file: "first" } }
          state { input_name: "c" output_name: "d" data_type: TYPE_INT64 dims: [ 1 ] } }
        """
    )
    theirs, ours = shown(config), shown(msgspec.structs.replace(config, triton={}))
    assert ours["sequence_batching"] == theirs["sequence_batching"]
    assert "dynamic_batching" not in ours
