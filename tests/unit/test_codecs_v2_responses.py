"""Writing infer responses, read back by Triton's own client where it is installed."""

import json

import numpy as np
import pytest

from repository.errors import InferenceFailedError, InvalidRequestError
from repository.messages import InferResponse
from repository.tensors import Tensor
from server.codecs.v2_binary import JOIN_BELOW, encode
from server.codecs.v2_plan import RAW_PLAN, Plan, plan_of
from tests.fakes.bodies import body

X = np.array([[1.5, -2.0]], np.float32)
BINARY = Plan((), rest_binary=True)
JSON = Plan(())


def written(plan, *outputs, **rest):
    done = encode(plan, InferResponse(list(outputs), **rest), "m", 3)
    whole = b"".join(done.buffers)
    assert len(whole) == done.total
    return done.header_length, whole


def test_json_is_compact_and_its_keys_are_in_tritons_order():
    plan = Plan((), id="7")
    assert written(plan, Tensor.of("y", X), parameters={"k": 1}) == (
        None,
        b'{"id":"7","model_name":"m","model_version":"3","parameters":{"k":1},'
        b'"outputs":[{"name":"y","datatype":"FP32","shape":[1,2],"data":[1.5,-2.0]}]}',
    )


def test_an_empty_id_is_not_repeated():
    assert written(JSON)[1] == b'{"model_name":"m","model_version":"3","outputs":[]}'


def test_binary_outputs_follow_the_header_in_their_order():
    a, b = Tensor.of("a", np.array([1], np.int8)), Tensor.of("b", np.array([2, 3], np.int8))
    length, whole = written(Plan((), ("b", "c", "a"), frozenset("ab")), a, b, Tensor.of("c", X))
    header = json.loads(whole[:length])
    assert whole[length:] == b"\x02\x03\x01"
    assert [o["name"] for o in header["outputs"]] == ["b", "c", "a"]
    assert header["outputs"][0]["parameters"] == {"binary_data_size": 2}
    assert header["outputs"][1]["data"] == [1.5, -2.0]


def test_a_header_length_is_told_only_where_bytes_follow():
    length, whole = written(BINARY, Tensor.of("y", np.empty((0, 2), np.float32)))
    assert length is None
    assert json.loads(whole)["outputs"][0]["parameters"] == {"binary_data_size": 0}


def test_large_tensors_are_not_copied_and_small_ones_are_sent_at_once():
    array = np.zeros(JOIN_BELOW, np.uint8)
    large = encode(BINARY, InferResponse([Tensor.of("y", array)]), "m", 1)
    assert np.shares_memory(np.frombuffer(large.buffers[1], np.uint8), array)
    small = encode(BINARY, InferResponse([Tensor.of("y", X)]), "m", 1)
    assert len(small.buffers) == 1


def test_nan_and_infinity_are_written_as_literals():
    array = np.array([np.nan, np.inf, -np.inf, 0.5])
    assert written(JSON, Tensor.of("y", array))[1].endswith(
        b'"data":[NaN,Infinity,-Infinity,0.5]}]}'
    )


def test_finite_numbers_whose_sum_is_not_are_written_in_full():
    array = np.array([1.7e308, 1.7e308])
    whole = written(JSON, Tensor.of("y", array))[1]
    assert json.loads(whole)["outputs"][0]["data"] == array.tolist()


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_floats_are_not_sent_as_json(datatype):
    tensor = Tensor("y", datatype, (1,), b"\0\0")
    with pytest.raises(InvalidRequestError, match=f"sending {datatype} data via JSON"):
        written(JSON, tensor)
    assert written(BINARY, tensor)[1].endswith(b"\0\0")


def test_bytes_that_are_not_text_must_be_asked_for_in_binary():
    tensor = Tensor.of("y", np.array([b"\xff"], object))
    with pytest.raises(InvalidRequestError, match="binary_data"):
        written(JSON, tensor)


def test_an_output_that_the_model_did_not_return_is_its_failure():
    with pytest.raises(InferenceFailedError, match="'z'"):
        written(Plan((), ("z",)), Tensor.of("y", X))


@pytest.mark.parametrize(
    ("rest", "binary"),
    [
        ({}, False),
        ({"parameters": {"binary_data_output": True}}, True),
        ({"outputs": [{"name": "y"}]}, False),
        ({"outputs": [{"name": "y", "parameters": {"binary_data": True}}]}, True),
        # A listed output says for itself; the general wish is for those that are not listed.
        ({"outputs": [{"name": "y"}], "parameters": {"binary_data_output": True}}, False),
        ({"outputs": [], "parameters": {"binary_data_output": True}}, True),
    ],
)
def test_the_form_of_an_output_is_the_one_asked_for(rest, binary):
    length, _ = written(plan_of(body(**rest)[0]), Tensor.of("y", X))
    assert (length is not None) is binary


def test_a_raw_request_gets_all_in_binary():
    assert written(RAW_PLAN, Tensor.of("y", X))[0] is not None
