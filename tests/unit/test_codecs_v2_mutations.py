"""Whatever is sent, only errors that we mean to raise are raised."""

import json

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from repository.errors import RepositoryError
from repository.messages import TensorSpec
from server.codecs import v2_binary
from server.codecs.v2_json import depth_of
from server.codecs.v2_plan import plan_of
from server.errors import ServerError
from tests.fakes.bodies import body, tensor

VALID = [
    body(tensor("x", [2, 2], "FP32", [[1, 2], [3, 4]]), id="1", outputs=[{"name": "y"}]),
    body(tensor("x", [2], "BYTES", ["a\\b", 'c"[']), parameters={"k": 1.5, "timeout": 3}),
    body(tensor("x", [2], "FP64", [float("nan"), float("inf")])),
    body(
        tensor("x", [1, 2], "INT16", binary_data_size=4),
        tensor("s", [1], "BYTES", binary_data_size=5),
        outputs=[{"name": "y", "parameters": {"binary_data": True}}],
        blobs=b"\x01\x02\x03\x04\x01\0\0\0a",
    ),
]
SPLICES = [
    b"[", b"]", b"{", b"}", b'"', b"\\", b",", b":", b"-", b"NaN", b"Infinity", b"null", b"true",
    b"\xff", b"\xed\xa0\x80", b"\\ud800", b"1e999", b"9" * 25, b"-1", b"0", b"\0", b"[[[[",
    b'"data":[1],', b'"binary_data_size":4,', b"BYTES", b"BOOL", b"UINT64", b"FP16",
]  # fmt: skip


def take_in(raw, length):
    """As the face does, up to the arrays that a backend would see."""
    try:
        header, blobs = v2_binary.split(raw, length)
        request = v2_binary.assemble(plan_of(header), blobs, "m")
        for each in request.inputs:
            each.check_size()
            assert each.array().shape == each.shape
    except (RepositoryError, ServerError):
        return None
    return request


splices = st.tuples(
    st.integers(0, 400),
    st.integers(0, 12),
    st.one_of(st.sampled_from(SPLICES), st.binary(max_size=4)),
)


@settings(deadline=None, max_examples=400)
@given(st.sampled_from(VALID), st.lists(splices, min_size=1, max_size=4), st.integers(-2, 2))
def test_a_spoilt_request_is_refused_or_understood(valid, edits, shift):
    raw, length = valid
    for at, cut, text in edits:
        raw = raw[:at] + text + raw[at + cut :]
    take_in(raw, length and b"%d" % (int(length) + shift))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
FIELDS = ("name", "shape", "datatype", "data", "parameters", "inputs", "outputs", "id")


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(VALID), st.sampled_from(FIELDS), json_values, st.booleans())
@example(VALID[0], "shape", [0, 2**62, 2**62], True)
@example(VALID[1], "shape", [0, 2**62], True)
def test_any_value_in_any_field_is_refused_or_understood(valid, field, value, inside):
    raw, length = valid
    cut = int(length) if length else len(raw)
    header = json.loads(raw[:cut])
    (header["inputs"][0] if inside else header)[field] = value
    changed = json.dumps(header).encode()
    take_in(changed + raw[cut:], length and b"%d" % len(changed))


@settings(deadline=None)
@given(
    st.lists(st.integers(-1, 3), max_size=3),
    st.sampled_from(["INT16", "BYTES"]),
    st.binary(max_size=9),
    st.booleans(),
)
def test_a_raw_request_is_refused_or_fits_its_shape(shape, datatype, data, batched):
    spec = TensorSpec("x", datatype, tuple(shape) or (1,))
    try:
        request = v2_binary.raw_request([spec], memoryview(data), "m", batched=batched)
    except RepositoryError:
        return
    request.inputs[0].check_size()


def depth(value):
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0


@settings(deadline=None)
@given(json_values)
def test_the_depth_is_that_of_the_value(value):
    assert depth_of(json.dumps(value).encode()) == depth(value)


def test_the_valid_ones_are_valid():
    assert all(take_in(*valid) for valid in VALID)
    assert np.isnan(take_in(*VALID[2]).inputs[0].array()[0])
