"""Triton's own client writes the requests and reads the responses."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from repository.messages import InferResponse
from repository.tensors import DATATYPES
from server.codecs import v2_binary
from server.codecs.v2_plan import plan_of

http = pytest.importorskip("tritonclient.http", reason="needs tritonclient[http]")

NUMERIC = sorted(set(DATATYPES) - {"BYTES", "BF16"})
FORMS = st.tuples(st.booleans(), st.booleans())  # binary input, binary output


def numbers(datatype):
    dtype = DATATYPES[datatype].dtype
    shapes = hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4)
    return hnp.arrays(dtype, shapes).map(lambda array: (datatype, array))


texts = st.lists(st.text(max_size=8).filter(lambda t: "\0" not in t), max_size=5).map(
    lambda found: ("BYTES", np.array([t.encode() for t in found], dtype=object))
)
tensors = st.one_of(*map(numbers, NUMERIC), texts)


def sent(inputs, outputs=None, **rest):
    """What the client would put on the wire, taken in as the server takes it in."""
    raw, length = http.InferenceServerClient.generate_request_body(inputs, outputs=outputs, **rest)
    header, blobs = v2_binary.split(raw, None if length is None else b"%d" % length)
    plan = plan_of(header)
    return plan, v2_binary.assemble(plan, blobs, "m")


def received(plan, outputs):
    done = v2_binary.encode(plan, InferResponse(outputs), "m", 1)
    return http.InferenceServerClient.parse_response_body(
        b"".join(done.buffers), header_length=done.header_length
    )


def same(one, other):
    if one.dtype == object:
        return [str(v) for v in one.ravel()] == [str(v) for v in other.ravel()]
    return np.array_equal(one, other, equal_nan=one.dtype.kind == "f")


@settings(deadline=None, max_examples=150)
@given(tensors, FORMS)
def test_every_datatype_makes_the_round_trip_in_both_forms(tensor, forms):
    datatype, array = tensor
    binary_in, binary_out = (f or datatype == "FP16" for f in forms)
    given_ = http.InferInput("x", list(array.shape), datatype)
    given_.set_data_from_numpy(array, binary_data=binary_in)
    plan, request = sent([given_], [http.InferRequestedOutput("x", binary_data=binary_out)])
    got = request.inputs[0]
    assert (got.name, got.datatype, got.shape) == ("x", datatype, array.shape)
    got.check_size()
    assert same(got.array(), array)
    if not (binary_out and array.size == 0):  # the client cannot read those
        back = received(plan, [got]).as_numpy("x")
        if datatype == "BYTES":
            back = np.array([b if isinstance(b, bytes) else b.encode() for b in back], object)
        assert same(back.reshape(array.shape), array)


def test_bf16_makes_the_round_trip():
    bf16 = pytest.importorskip("ml_dtypes").bfloat16
    array = np.array([[1.5, -2.0, 3e38]], dtype=bf16)
    given_ = http.InferInput("x", [1, 3], "BF16")
    given_.set_data_from_numpy(array)
    plan, request = sent([given_])
    assert request.inputs[0].array().tolist() == array.view(np.uint16).tolist()
    back = received(plan, request.inputs).as_numpy("x")
    assert np.array_equal(back.astype(np.float32), array.astype(np.float32))


def test_the_clients_parameters_arrive():
    given_ = http.InferInput("x", [1], "INT8")
    given_.set_data_from_numpy(np.array([1], np.int8))
    plan, request = sent(
        [given_],
        request_id="r",
        sequence_id=5,
        sequence_start=True,
        priority=2,
        timeout=1000,
        parameters={"mine": "yes"},
    )
    assert request.id == "r" and plan.rest_binary
    assert request.parameters == {
        "sequence_id": 5,
        "sequence_start": True,
        "sequence_end": False,
        "priority": 2,
        "timeout": 1000,
        "mine": "yes",
    }


def test_several_inputs_arrive_in_both_forms_at_once():
    array = np.arange(3, dtype=np.int32)
    inputs = [http.InferInput(n, [3], "INT32") for n in "abc"]
    for given_, binary in zip(inputs, (True, False, True), strict=True):
        given_.set_data_from_numpy(array, binary_data=binary)
    _, request = sent(inputs, [http.InferRequestedOutput("y", binary_data=False)])
    assert [t.name for t in request.inputs] == ["a", "b", "c"]
    assert all(same(t.array(), array) for t in request.inputs)
    assert request.outputs == ("y",)
