"""Plain JSON to a request and back, as Triton's generate extension has it."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from repository.errors import InvalidRequestError, InvalidTensorError
from repository.messages import InferResponse, TensorSpec
from repository.tensors import Tensor, pack_bytes
from server.codecs import v2_generate

TEXT = TensorSpec("text", "BYTES", (-1, 1))
COUNT = TensorSpec("count", "INT32", (-1, 1))
ROW = TensorSpec("row", "FP32", (-1, -1, 2))


def request(found: dict[str, Any], *inputs: TensorSpec, batched: bool = True) -> Any:
    return v2_generate.request_of(found, inputs, model="m", batched=batched)


def test_one_value_is_one_row_and_what_is_no_input_is_a_parameter() -> None:
    got = request(
        {"text": "hi", "count": 3, "id": "7", "max": 2, "parameters": {"priority": 1}}, TEXT, COUNT
    )
    text, count = got.inputs
    assert (text.shape, bytes(text.data)) == ((1, 1), b"\2\0\0\0hi")
    assert (count.shape, count.array().tolist()) == ((1, 1), [[3]])
    assert got.id == "7" and got.parameters == {"priority": 1, "max": 2}


def test_the_last_free_axis_takes_the_values_and_the_others_are_one() -> None:
    (row,) = request({"row": [1, 2, 3, 4]}, ROW).inputs
    assert row.shape == (1, 2, 2)
    (flat,) = request({"x": [1, 2, 3]}, TensorSpec("x", "INT64", (-1,)), batched=False).inputs
    assert flat.shape == (3,)


@pytest.mark.parametrize(
    ("found", "spec"),
    [
        ({"row": [1, 2, 3]}, ROW),
        ({"count": [1, 2]}, COUNT),  # rows of a batch are for /infer
        ({"row": [[1, 2]]}, ROW),
        ({"count": "three"}, COUNT),
        ({"text": 3}, TEXT),
        ({"count": None}, COUNT),
    ],
)
def test_values_that_do_not_fill_the_input_are_refused_by_its_name(
    found: dict[str, Any], spec: TensorSpec
) -> None:
    with pytest.raises(InvalidTensorError, match=f"'{spec.name}'"):
        request(found, spec)


@pytest.mark.parametrize(
    "found",
    [
        {"text": "a", "more": [1]},
        {"text": "a", "parameters": {"more": {}}},
        {"text": "a", "parameters": []},
        {"text": "a", "parameters": {"triton_x": 1}},
        {"text": "a", "priority": -1},
        {"text": "a", "id": 3},
    ],
)
def test_what_is_neither_input_nor_parameter_is_refused(found: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError):
        request(found, TEXT)


def test_a_model_that_does_not_say_what_it_takes_cannot_be_asked_so() -> None:
    with pytest.raises(InvalidRequestError, match="use /infer"):
        request({"x": 1})


def test_one_element_is_answered_as_itself_and_several_as_a_flat_list() -> None:
    response = InferResponse(
        [
            Tensor.of("one", np.array([[1.5]], np.float32)),
            Tensor.of("many", np.array([[1, 2], [3, 4]], np.int32)),
            Tensor("text", "BYTES", (1,), pack_bytes(np.array([b'a"b'], object))),
            Tensor.of("not", np.array([np.nan], np.float32)),
        ],
        {"reason": "stop", "model_name": "another"},
    )
    got = v2_generate.answer(response, model="m", version=2, id="7")
    assert json.loads(got, parse_constant=str) == {
        "model_name": "m", "model_version": "2", "id": "7", "reason": "stop",
        "one": 1.5, "many": [1, 2, 3, 4], "text": 'a"b', "not": "NaN",
    }  # fmt: skip
    assert b" " not in got and b"\n" not in got


def test_a_text_becomes_a_completion_with_the_parameters_of_both_places() -> None:
    found = {
        "text_input": "Once",
        "max_tokens": 5,
        "stream": True,
        "parameters": {"temperature": 0},
    }
    told = json.loads(v2_generate.completion_of(found, "m"))
    assert told == {"model": "m", "prompt": "Once", "max_tokens": 5, "temperature": 0}
    with pytest.raises(InvalidRequestError, match="text_input"):
        v2_generate.completion_of({"text_input": 3}, "m")


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_whatever_the_body_is_it_is_an_object_or_refused(body: bytes) -> None:
    with suppress(InvalidRequestError):
        assert isinstance(v2_generate.read(body), dict)


def test_ten_thousand_brackets_are_refused() -> None:
    with pytest.raises(InvalidRequestError):
        v2_generate.read(b'{"x":' + b"[" * 10_000 + b"]" * 10_000 + b"}")


def test_more_keys_than_anybody_needs_are_refused_before_each_is_looked_at() -> None:
    many = {f"k{n}": 1 for n in range(v2_generate.MOST_KEYS)}
    assert v2_generate.read(json.dumps(many).encode()) == many
    for body in ({**many, "one": 1}, {"parameters": {**many, "one": 1}}):
        with pytest.raises(InvalidRequestError, match="1001 keys in one object; at most 1000"):
            v2_generate.read(json.dumps(body).encode())
