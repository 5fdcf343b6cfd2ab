"""What of a message is cut out and put in by hand is what its classes make of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from repository.errors import InvalidRequestError, RepositoryError
from repository.messages import InferResponse
from repository.tensors import DATATYPES, Tensor
from server.codecs.v2_plan import Plan
from server.rpc import answers, typed
from server.rpc.requests import RAW_CONTENTS, asked_of
from server.rpc.wire import MOST_FIELDS, cut, field, read_varint, varint

BLOBS = st.lists(st.binary(max_size=40), max_size=5)


@given(st.integers(0, 2**64 - 1))
def test_a_number_comes_back(value: int) -> None:
    assert read_varint(varint(value) + b"rest", 0) == (value, len(varint(value)))


@given(BLOBS, st.text(max_size=20), st.lists(st.integers(-1, 9), max_size=3))
def test_what_is_cut_out_and_the_rest_are_the_message(
    blobs: list[bytes], name: str, shape: list[int]
) -> None:
    asked = service_pb2.ModelInferRequest(model_name=name, raw_input_contents=blobs)
    asked.inputs.add(name="x", shape=shape)
    head, found = cut(asked.SerializeToString(), RAW_CONTENTS)
    assert [bytes(view) for view in found] == blobs
    asked.ClearField("raw_input_contents")
    assert service_pb2.ModelInferRequest.FromString(head) == asked


@given(st.binary(max_size=200))
def test_any_bytes_are_cut_or_refused(message: bytes) -> None:
    try:
        head, found = cut(message, RAW_CONTENTS)
        asked_of(head, found)
    except RepositoryError:
        return


def test_a_message_of_too_many_fields_is_refused_before_it_is_understood() -> None:
    with pytest.raises(InvalidRequestError, match="more than 8192 fields"):
        cut(b"\x2a\x00" * (MOST_FIELDS + 1), RAW_CONTENTS)


def said(contents: Any) -> memoryview:
    return memoryview(contents.SerializeToString())


WHOLE = [name for name, (field, _) in typed.FIELDS.items() if field.endswith("t_contents")]
WHOLE += ["INT64", "UINT64"]


@pytest.mark.parametrize("datatype", sorted(set(WHOLE)))
@given(data=st.data())
def test_whole_numbers_are_read_as_the_class_reads_them(datatype: str, data: st.DataObject) -> None:
    dtype = DATATYPES[datatype].dtype
    info = np.iinfo(dtype)
    numbers = st.integers(int(info.min), int(info.max))
    values = data.draw(st.lists(numbers, max_size=50))
    contents = service_pb2.InferTensorContents(**{typed.FIELDS[datatype][0]: values})
    raw = typed.to_bytes("x", datatype, len(values), said(contents))
    assert bytes(raw) == np.array(values, dtype).tobytes()


def test_numbers_are_read_in_pieces_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [3**n for n in range(40)] * 3
    contents = service_pb2.InferTensorContents(uint64_contents=values)
    monkeypatch.setattr(typed, "MOST_AT_ONCE", 7)
    raw = typed.to_bytes("x", "UINT64", len(values), said(contents))
    assert np.frombuffer(raw, np.uint64).tolist() == values


@given(st.lists(st.floats(width=32), max_size=20), st.lists(st.booleans(), max_size=20))
def test_floats_and_truths_lie_in_a_message_as_in_a_tensor(
    floats: list[float], truths: list[bool]
) -> None:
    contents = service_pb2.InferTensorContents(
        fp32_contents=floats, fp64_contents=floats, bool_contents=truths
    )
    for datatype, values in (("FP32", floats), ("FP64", floats), ("BOOL", truths)):
        raw = typed.to_bytes("x", datatype, len(values), said(contents))
        assert bytes(raw) == np.array(values, DATATYPES[datatype].dtype).tobytes()


def test_numbers_that_are_too_large_wrap_around_as_over_http() -> None:
    contents = service_pb2.InferTensorContents(int_contents=[300, -129])
    assert bytes(typed.to_bytes("x", "INT8", 2, said(contents))) == bytes([44, 127])


@given(st.lists(st.binary(max_size=9), max_size=9))
def test_texts_get_their_lengths(texts: list[bytes]) -> None:
    contents = service_pb2.InferTensorContents(bytes_contents=texts)
    raw = typed.to_bytes("x", "BYTES", len(texts), said(contents))
    expected = np.array(texts, dtype=object)
    assert bytes(raw) == bytes(Tensor.of("x", expected).data)


@pytest.mark.parametrize("value", [b"\x00", b"\x01", b"\x80\x01", b"\x07"])
def test_a_truth_is_what_is_not_zero_however_it_is_written(value: bytes) -> None:
    raw = typed.to_bytes("x", "BOOL", 1, memoryview(field(1, value)))
    assert bytes(raw) == bytes([value != b"\x00"])


def test_values_that_are_not_packed_are_read_too() -> None:
    unpacked = b"".join(b"\x10" + varint(n) for n in (1, 300, 7))
    raw = typed.to_bytes("x", "INT32", 3, memoryview(unpacked))
    assert np.frombuffer(raw, np.int32).tolist() == [1, 300, 7]
    unpacked = b"".join(b"\x35" + np.float32(n).tobytes() for n in (0.5, 2))
    raw = typed.to_bytes("x", "FP32", 2, memoryview(unpacked))
    assert np.frombuffer(raw, np.float32).tolist() == [0.5, 2]


@pytest.mark.parametrize(
    ("datatype", "message"),
    [
        ("INT32", field(2, b"\xff")),
        ("INT32", field(2, b"\xff" * 20 + b"\x01")),
        ("FP32", field(6, b"123")),
        ("BYTES", b"\x42\x7f"),
    ],
)
def test_values_that_are_cut_off_are_refused(datatype: str, message: bytes) -> None:
    with pytest.raises(InvalidRequestError, match="not what the protocol says"):
        typed.to_bytes("x", datatype, 1, memoryview(message))


@given(st.lists(st.lists(st.floats(width=32), max_size=5), max_size=4))
def test_values_are_cut_out_of_their_inputs(lists: list[list[float]]) -> None:
    asked = service_pb2.ModelInferRequest(model_name="m", id="i")
    for n, values in enumerate(lists):
        one = asked.inputs.add(name=f"x{n}", datatype="FP32", shape=[len(values)])
        one.contents.fp32_contents.extend(values)
    found = asked_of(asked.SerializeToString(), [])
    assert found.route.model == "m" and found.plan.id == "i"
    for piece, values in zip(found.plan.pieces, lists, strict=True):
        assert bytes(piece.data or b"") == np.array(values, np.float32).tobytes()


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_halves_of_floats_have_no_values(datatype: str) -> None:
    with pytest.raises(InvalidRequestError, match="raw_input_contents"):
        typed.to_bytes("x", datatype, 1, said(service_pb2.InferTensorContents()))


def test_a_wrong_number_of_values_is_told() -> None:
    contents = service_pb2.InferTensorContents(int_contents=[1, 2, 3])
    with pytest.raises(RepositoryError, match="needs 4 values in int_contents, it has 3"):
        typed.to_bytes("x", "INT32", 4, said(contents))


@given(BLOBS)
def test_an_answer_is_what_the_class_would_write(blobs: list[bytes]) -> None:
    tensors = [Tensor(f"y{n}", "UINT8", (len(b),), b) for n, b in enumerate(blobs)]
    plan = Plan((), id="seven")
    pieces = answers.encode(plan, InferResponse(tensors, {"k": 1}), "m", 3)
    found = service_pb2.ModelInferResponse.FromString(b"".join(pieces))
    assert list(found.raw_output_contents) == blobs
    assert [list(o.shape) for o in found.outputs] == [[len(b)] for b in blobs]
    assert (found.model_name, found.model_version, found.id) == ("m", "3", "seven")
    for final in (True, False):
        told = service_pb2.ModelStreamInferResponse.FromString(
            answers.streamed(pieces, final=final)
        )
        assert told.infer_response.parameters[answers.FINAL].bool_param is final
        assert list(told.infer_response.raw_output_contents) == blobs


def test_an_error_in_a_stream_names_its_request() -> None:
    told = service_pb2.ModelStreamInferResponse.FromString(answers.streamed_error("seven", "no"))
    assert told.error_message == "no" and told.infer_response.id == "seven"
