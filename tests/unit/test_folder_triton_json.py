"""A ModelConfig as JSON: as it is kept, and as a request says it in place of a model's config file."""

from __future__ import annotations

import json
from typing import Any

import pytest
from google.protobuf import json_format
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2

from repository.errors import ConfigError
from repository.folder.layering import merge
from repository.folder.read_pbtxt import read_pbtxt, triton_layer
from repository.plain import plain
from tests.unit.test_folder_triton_queues import SEQUENCES


def test_the_message_is_kept_as_protobuf_writes_it_but_with_numbers_as_numbers() -> None:
    kept = read_pbtxt(SEQUENCES.encode(), "m").values["triton"]
    assert kept["name"] == "m" and kept["max_batch_size"] == 8
    batching = kept["sequence_batching"]
    assert batching["max_sequence_idle_microseconds"] == 5_000_000
    assert batching["direct"]["minimum_slot_utilization"] == 0.7
    assert batching["state"][0]["dims"] == [-1]
    assert batching["control_input"][3]["control"][0]["data_type"] == "TYPE_STRING"
    again = json_format.ParseDict(kept, model_config_pb2.ModelConfig())
    assert plain(again) == json.loads(json.dumps(kept))


def test_whole_it_says_what_was_left_out_but_for_messages() -> None:
    whole = plain(model_config_pb2.ModelConfig(name="m"), whole=True)
    assert whole["max_batch_size"] == 0 and whole["platform"] == ""
    assert whole["input"] == [] and whole["parameters"] == {}
    assert "optimization" not in whole and "dynamic_batching" not in whole


def test_a_request_says_the_same_in_json() -> None:
    text = json.dumps(
        {
            "backend": "onnxruntime",
            "maxBatchSize": "4",
            "input": [{"name": "x", "data_type": "type_fp32", "dims": ["-1", 4]}],
            "instance_group": [{"kind": "kind_cpu", "count": 2}],
            "dynamic_batching": {
                "defaultQueuePolicy": {"timeoutAction": "delay"},
                "priority_queue_policy": {},
            },
            "version_policy": {"specific": {"versions": ["1", 3]}},
            "parameters": {"intra_op_thread_count": {"string_value": "2"}},
        }
    )
    layer = triton_layer(text, "m")
    config, sources = merge([layer])
    assert config.max_batch_size == 4 and config.inputs is not None
    assert config.inputs[0].shape == (-1, 4) and config.inputs[0].datatype == "FP32"
    assert (config.device, config.instances) == ("cpu", 2)
    assert config.batching is not None and config.batching.timeout_action == "delay"
    assert config.version_policy.specific == (1, 3)
    assert layer.values["triton"]["input"][0]["data_type"] == "TYPE_FP32"
    assert sources["max_batch_size"] == "request"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "no JSON"),
        ("[]", "is a JSON object"),
        ('{"pin": true}', "unknown key 'pin' in ModelConfig"),
        ('{"input": [{"name": "x", "dimms": [1]}]}', "unknown key 'dimms' in ModelConfig.input[0]"),
        ('{"input": [{"data_type": "TYPE_FOO"}]}', "TYPE_FOO"),
        ('{"max_batch_size": "many"}', "max_batch_size"),
        ('{"name": "other"}', "directory name must equal model name"),
        ('{"backend": "tensorrt"}', "'tensorrt' is not supported"),
        ('{"max_batch_size": -1}', "at least 0"),
        ('{"input":' + "[" * 100_000, "no JSON"),
        ('{"a":' + "1" * 5000 + "}", "no JSON"),
        ('{"name": "' + "x" * 300_000 + '"}', "more than 256 KiB"),
    ],
)
def test_a_request_that_is_wrong_is_told_so(text: str, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        triton_layer(text, "m")
    assert caught.value.where == "request" and why in caught.value.message
    assert len(str(caught.value)) < 1000


_WORDS = [*"{}[]:,\"' 1-", "input", "dims", "null", "TYPE_FP32", '"input"', '"dims"', '"kind"']


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from(_WORDS), max_size=30).map("".join))
def test_no_request_whatever_raises_anything_but_a_config_error(text: str) -> None:
    for said in (text, f'{{"input": {text}}}', f'{{"instance_group": [{text}]}}'):
        try:
            triton_layer(said, "m")
        except ConfigError as error:
            assert error.where == "request"  # noqa: PT017


def _some(kind: Any, depth: int) -> st.SearchStrategy[dict[str, Any]]:
    """Any message of that type, in protobuf's JSON: few fields of it, each of its own type."""
    fields = {
        f.name: _of(f, depth)
        for f in kind.fields
        if f.containing_oneof is None and (f.message_type is None or depth)
    }
    for oneof in kind.oneofs if depth else ():
        field = oneof.fields[depth % len(oneof.fields)]  # one of them, or protobuf refuses it all
        fields[field.name] = _of(field, depth)
    return st.fixed_dictionaries({}, optional=fields)


def _of(field: Any, depth: int) -> st.SearchStrategy[Any]:
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        held = kind.fields_by_name["value"]
        number = kind.fields_by_name["key"].cpp_type != field.CPPTYPE_STRING
        return st.dictionaries(
            st.sampled_from("12" if number else "ab"), _of(held, depth), max_size=2
        )
    one = _scalar(field) if kind is None else _some(kind, depth - 1)
    return st.lists(one, max_size=2) if field.is_repeated else one


def _scalar(field: Any) -> st.SearchStrategy[Any]:
    if field.enum_type is not None:
        return st.sampled_from([value.name for value in field.enum_type.values])
    if field.cpp_type == field.CPPTYPE_BOOL:
        return st.booleans()
    if field.cpp_type == field.CPPTYPE_STRING:
        return st.sampled_from(["", "a", "ensemble", "onnxruntime", "python", "../x", "\0", "zero"])
    if field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return st.sampled_from([0.0, 0.5, 1.0, -1.0, "NaN", "Infinity"])
    unsigned = field.cpp_type in (field.CPPTYPE_UINT32, field.CPPTYPE_UINT64)
    return st.sampled_from([0, 1, 2, 64, 2**31 - 1] + ([] if unsigned else [-1, -2]))


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(_some(model_config_pb2.ModelConfig.DESCRIPTOR, 3))
def test_any_message_becomes_a_layer_that_keeps_it_or_a_config_error(said: dict[str, Any]) -> None:
    said.pop("name", None)
    try:
        layer = triton_layer(json.dumps(said), "m")
        merge([layer])
    except ConfigError as error:
        assert error.where in ("request", "")  # noqa: PT017
    else:
        kept = json_format.ParseDict(layer.values["triton"], model_config_pb2.ModelConfig())
        given = json_format.ParseDict(said, model_config_pb2.ModelConfig())
        given.name = "m"
        assert plain(kept, whole=True) == plain(given, whole=True)
