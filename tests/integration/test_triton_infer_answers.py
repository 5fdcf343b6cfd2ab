"""What Triton's infer answers, to the letter: forms, headers, keys, raw requests and classes, on both
routes alike."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import pytest

from tests.letters import (
    LENGTH,
    ROW,
    SIXTEEN,
    ZEROS,
    Pair,
    asking,
    binary,
    numbers,
    one,
    paired,
    simple,
    sized,
    tensor,
    told,
)
from tests.wire import Answer


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with paired() as pair:
        yield pair


def forms(answer: Answer) -> dict[str, str]:
    """Of each output, in order: in which form it came."""
    return {
        output["name"]: "json" if "data" in output else ",".join(sorted(output["parameters"]))
        for output in told(answer)["outputs"]
    }


BINARY = "binary_data_size"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, {"OUTPUT0": "json", "OUTPUT1": "json"}),
        ({"parameters": {"binary_data_output": True}}, {"OUTPUT0": BINARY, "OUTPUT1": BINARY}),
        ({"parameters": {"binary_data_output": True}, "outputs": []},
         {"OUTPUT0": BINARY, "OUTPUT1": BINARY}),
        ({"parameters": {"binary_data_output": True}, "outputs": [{"name": "OUTPUT1"}]},
         {"OUTPUT1": "json"}),
        ({"outputs": [{"name": "OUTPUT1", "parameters": {"binary_data": True}}, {"name": "OUTPUT0"}]},
         {"OUTPUT1": BINARY, "OUTPUT0": "json"}),
        ({"parameters": {"binary_data_output": True},
          "outputs": [{"name": "OUTPUT0", "parameters": {"binary_data": False}}]},
         {"OUTPUT0": "json"}),
    ],
)  # fmt: skip
def test_binary_data_output_holds_where_no_output_is_named(
    pair: Pair, said: dict[str, Any], expected: dict[str, str]
) -> None:
    answer = pair.ask("simple", simple(**said))
    assert forms(answer) == expected and list(forms(answer)) == list(expected)
    binary = BINARY in expected.values()
    kind = "application/octet-stream" if binary else "application/json"
    assert answer.headers["content-type"] == kind
    assert (LENGTH.lower() in answer.headers) == binary


def test_keys_come_in_tritons_order_and_an_id_only_where_there_was_one(pair: Pair) -> None:
    with_id = told(pair.ask("simple", simple(id="7")))
    without = told(pair.ask("simple", simple(id="")))
    assert list(with_id) == ["id", "model_name", "model_version", "outputs"]
    assert list(without) == ["model_name", "model_version", "outputs"]
    assert (with_id["id"], with_id["model_version"]) == ("7", "1")
    assert b": " not in pair.ask("simple", simple(id="7")).body, "compact JSON"


def test_binary_blobs_come_in_the_order_of_the_outputs(pair: Pair) -> None:
    names = ["OUTPUT1", "OUTPUT0"]
    asked = [{"name": name, "parameters": {"binary_data": True}} for name in names]
    raw, count = binary(SIXTEEN, SIXTEEN, outputs=asked)
    answer = pair.ask("simple", raw, count)
    blobs = answer.body[int(answer.headers[LENGTH.lower()]) :]
    assert blobs == ZEROS + struct.pack("<16i", *[2 * n for n in ROW])


def test_a_binary_output_without_bytes_needs_no_header(pair: Pair) -> None:
    said = {"parameters": {"binary_data_output": True}}
    answer = pair.ask("none", one("FP32", [1, 2, 3, 4], **said))
    assert told(answer)["outputs"] == [
        {"name": "y", "datatype": "FP32", "shape": [2, 0], "parameters": {BINARY: 0}}
    ]
    assert answer.headers["content-type"] == "application/json"
    assert LENGTH.lower() not in answer.headers


def test_data_is_flat_and_what_json_has_no_number_for_is_a_literal(pair: Pair) -> None:
    raw = one("FP32", "DATA").replace(b'"DATA"', b"[[NaN, -Infinity], [Infinity, 1.5]]")
    answer = pair.ask("floats", raw)
    assert b'"data":[NaN,-Infinity,Infinity,1.5]' in answer.body


def test_integers_wrap_around(pair: Pair) -> None:
    big = [{**t, "data": [2**32 + 5, *ROW[1:]]} for t in numbers()]
    assert told(pair.ask("simple", asking(*big)))["outputs"][0]["data"][0] == 10


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_floats_are_not_told_in_json(pair: Pair, datatype: str) -> None:
    model = {"FP16": "half", "BF16": "bits"}[datatype]
    header = asking(tensor(shape=(2,), datatype=datatype, **sized(4)))
    answer = pair.ask(model, header + b"1234", f"{LENGTH}: {len(header)}")
    assert (answer.status, answer.text.partition(".")[0]) == (
        400,
        f"sending {datatype} data via JSON is not supported",
    )
    header = asking(
        tensor(shape=(2,), datatype=datatype, **sized(4)), parameters={"binary_data_output": True}
    )
    answer = pair.ask(model, header + b"1234", f"{LENGTH}: {len(header)}")
    assert answer.body.endswith(b"1234")


def test_the_media_type_of_a_request_is_ignored(pair: Pair) -> None:
    for kind in ("text/plain", "application/octet-stream", "multipart/form-data", ""):
        assert pair.ask("simple", simple(), f"Content-Type: {kind}").status == 200


def test_request_parameters_reach_the_model(pair: Pair) -> None:
    said = {
        "sequence_id": 2**64 - 1, "sequence_start": True, "sequence_end": False, "priority": 0,
        "timeout": 10, "my_text": "x", "my_number": 1.5,
    }  # fmt: skip
    assert pair.ask("simple", simple(parameters={**said, "binary_data_output": True})).status == 200
    assert pair.ask("simple", simple(parameters={"sequence_id": "a name"})).status == 200
    for depot in pair.depots:
        assert [r.parameters for r in depot.models.asked[-2:]] == [said, {"sequence_id": "a name"}]


# raw ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "body", "datatype", "shape", "data"),
    [
        ("open", struct.pack("<3f", 1, 2, 3), "FP32", [1, 3], None),
        ("open", b"", "FP32", [1, 0], None),
        ("text", b"some bytes\0\xff", "BYTES", [1, 1], b"\x0c\0\0\0some bytes\0\xff"),
        ("half", b"1234", "FP16", [2], None),
    ],
)
def test_a_raw_request_is_the_only_inputs_bytes_in_a_batch_of_one(
    pair: Pair, model: str, body: bytes, datatype: str, shape: list[int], data: bytes | None
) -> None:
    answer = pair.ask(model, body, f"{LENGTH}: 0")
    (output,) = told(answer)["outputs"]
    assert (output["datatype"], output["shape"]) == (datatype, shape)
    length = int(answer.headers.get(LENGTH.lower(), len(answer.body)))
    assert answer.body[length:] == (body if data is None else data), "raw asks for all in binary"


# classes ------------------------------------------------------------------------------------------


def texts(blob: bytes) -> list[str]:
    found = []
    while blob:
        (size,) = struct.unpack_from("<I", blob)
        found.append(blob[4 : 4 + size].decode())
        blob = blob[4 + size :]
    return found


def test_classes_come_with_labels_in_json_and_in_binary(pair: Pair) -> None:
    asked: dict[str, Any] = {"name": "OUTPUT0", "parameters": {"classification": 7}}
    (output,) = told(pair.ask("simple", asking(*numbers(2), outputs=[asked])))["outputs"]
    row = [f"{2 * n}:{n}" + (f":label{n}" if n < 10 else "") for n in range(15, 8, -1)]
    assert output == {"name": "OUTPUT0", "datatype": "BYTES", "shape": [2, 7], "data": row * 2}
    asked["parameters"]["binary_data"] = True
    answer = pair.ask("simple", asking(*numbers(2), outputs=[asked, {"name": "OUTPUT1"}]))
    assert texts(answer.body[int(answer.headers[LENGTH.lower()]) :]) == row * 2
    assert told(answer)["outputs"][1]["data"] == [0] * 32


def test_there_are_no_more_classes_than_elements_and_floats_have_six_decimals(pair: Pair) -> None:
    asked = {"name": "y", "parameters": {"classification": 9}}
    (output,) = told(pair.ask("floats", one("FP32", [0.5, 2, 2, -1], outputs=[asked])))["outputs"]
    assert output["shape"] == [4], "no batches: one row, however the output is shaped"
    assert output["data"] == ["2.000000:1", "2.000000:2", "0.500000:0", "-1.000000:3"]
