"""Tensors in wire form: round trips of every datatype, and data that lies about itself."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from repository.errors import InvalidTensorError
from repository.tensors import (
    DATATYPES,
    Tensor,
    count_bytes,
    datatype_of,
    pack_bytes,
    skip_bytes,
    unpack_bytes,
)

SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
PLAIN = sorted(set(DATATYPES) - {"BYTES"})


@settings(deadline=None)
@given(st.data(), st.sampled_from(PLAIN), SHAPES)
def test_every_plain_datatype_survives_the_wire_bit_by_bit(
    data: st.DataObject, name: str, shape: tuple[int, ...]
):
    array = data.draw(hnp.arrays(DATATYPES[name].dtype, shape))
    tensor = Tensor.of("x", array, name)
    assert (tensor.datatype, tensor.shape) == (name, shape)
    tensor.check_size()
    assert len(tensor.data) == tensor.elements * DATATYPES[name].size == array.nbytes
    again = Tensor("x", name, shape, bytes(tensor.data)).array()
    assert again.shape == shape and again.dtype == array.dtype
    assert again.tobytes() == array.tobytes() == bytes(tensor.data)


@settings(deadline=None)
@given(st.lists(st.binary(max_size=9) | st.just(b"\x00") | st.just(b"a\x00")), st.data())
def test_bytes_survive_the_wire_with_their_zeros(elements: list[bytes], data: st.DataObject):
    shape = data.draw(st.sampled_from([(len(elements),), (1, len(elements)), (len(elements), 1)]))
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    tensor = Tensor.of("x", array.reshape(shape))
    tensor.check_size()
    assert (tensor.datatype, tensor.shape) == ("BYTES", shape)
    assert tensor.array().shape == shape and tensor.array().reshape(-1).tolist() == elements
    assert unpack_bytes(tensor.data) == elements and count_bytes(tensor.data) == len(elements)


@settings(deadline=None)
@given(hnp.arrays(np.int32, hnp.array_shapes(max_dims=3)), st.integers(1, 2))
def test_layout_and_byte_order_of_an_array_do_not_reach_the_wire(array: Any, step: int):
    for same in (np.asfortranarray(array), array.astype(">i4")):
        assert bytes(Tensor.of("x", same).data) == array.tobytes()
    part = array[::step]
    assert bytes(Tensor.of("x", part).data) == part.tobytes()


@settings(deadline=None)
@given(st.sampled_from(PLAIN), st.lists(st.integers(0, 3), min_size=1, max_size=4))
def test_joining_bytes_is_joining_rows(name: str, rows: list[int]):
    parts = [np.full((n, 2), at % 2, DATATYPES[name].dtype) for at, n in enumerate(rows)]
    data = b"".join([Tensor.of("x", part, name).data for part in parts])
    whole = Tensor("x", name, (sum(rows), 2), data).array()
    assert whole.tolist() == np.concatenate(parts).tolist()


def test_a_view_is_no_copy():
    raw = np.arange(4, dtype="f4")
    assert np.shares_memory(Tensor.of("x", raw).array(), raw)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        ("?", "BOOL"),
        ("longlong", "INT64"),
        ("ulonglong", "UINT64"),
        (">f8", "FP64"),
        ("f2", "FP16"),
        ("U3", "BYTES"),
        ("S3", "BYTES"),
        ("O", "BYTES"),
    ],
)
def test_numpy_types_have_their_datatypes(dtype: str, name: str):
    assert datatype_of(np.dtype(dtype)) == name


@pytest.mark.parametrize("dtype", ["c8", "M8[s]", "longdouble", "V4"])
def test_other_numpy_types_are_refused_by_name(dtype: str):
    with pytest.raises(InvalidTensorError, match="no KServe V2 datatype"):
        datatype_of(np.dtype(dtype))


def test_text_is_written_as_utf8_and_what_is_no_text_as_its_str():
    array = np.array([b"a", "é", bytearray(b"b"), memoryview(b"c"), 5, np.bytes_(b"d")], object)
    assert unpack_bytes(pack_bytes(array)) == [b"a", "é".encode(), b"b", b"c", b"5", b"d"]
    assert unpack_bytes(pack_bytes(np.array(["é", ""]))) == ["é".encode(), b""]
    with pytest.raises(InvalidTensorError, match="no valid text"):
        pack_bytes(np.array(["\ud800"], object))


# data that lies -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("off_by", [-1, 1])
def test_a_size_off_by_one_byte_is_refused_with_both_numbers(name: str, off_by: int):
    right = 6 * DATATYPES[name].size
    tensor = Tensor("x", name, (2, 3), bytes(right + off_by))
    for ask in (tensor.check_size, tensor.array):
        with pytest.raises(
            InvalidTensorError,
            match=f"byte size mismatch for input 'x'. Expected {right}, got {right + off_by}",
        ):
            ask()


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((-1, -1), "no size may be negative"),
        ((10**30,), f"Expected {4 * 10**30}"),
        ((2**32, 2**32), "Expected"),
    ],
)
def test_a_shape_that_its_data_does_not_fill_is_refused(shape: tuple[int, ...], reason: str):
    with pytest.raises(InvalidTensorError, match=reason):
        Tensor("x", "FP32", shape, b"1234").check_size()


@pytest.mark.parametrize("shape", [(0, 10**30), (1,) * 65, (0, 2**62, 2**62)])
@pytest.mark.parametrize("name", ["FP32", "BYTES"])
def test_a_shape_that_numpy_cannot_hold_is_refused_as_such(shape: tuple[int, ...], name: str):
    data = bytes(4 * math.prod(shape))
    with pytest.raises(InvalidTensorError, match="cannot have shape"):
        Tensor("x", name, shape, data).array()


def test_a_datatype_that_does_not_exist_is_refused():
    tensor = Tensor("x", "FP128", (1,), bytes(16))
    for ask in (tensor.check_size, tensor.array):
        with pytest.raises(InvalidTensorError, match="'FP128', unknown to KServe V2"):
            ask()


@pytest.mark.parametrize("count", [1, 3])
def test_bytes_with_too_few_or_too_many_elements_are_refused(count: int):
    tensor = Tensor("x", "BYTES", (2,), pack_bytes(np.array([b"ab"] * count, object)))
    for ask in (tensor.check_size, tensor.array):
        with pytest.raises(InvalidTensorError, match=rf"holds {count} elements.* needs 2"):
            ask()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x01", "ends inside an element's length"),
        (b"\x01\x00\x00\x00", "declares 1 bytes; only 0 are left"),
        (b"\xff\xff\xff\xffa", "declares 4294967295 bytes; only 1 are left"),
        (b"\x01\x00\x00\x00a\x02\x00", "ends inside an element's length"),
        (b"\x00\x00\x00\x80" + bytes(9), "declares 2147483648 bytes"),
    ],
)
def test_lengths_that_run_past_the_end_are_refused(data: bytes, reason: str):
    tensor = Tensor("x", "BYTES", (1,), data)
    for form in (data, bytearray(data), memoryview(data)):
        for ask in (lambda f=form: unpack_bytes(f), lambda f=form: count_bytes(f)):
            with pytest.raises(InvalidTensorError, match=reason):
                ask()
    for ask in (tensor.check_size, tensor.array):
        with pytest.raises(InvalidTensorError, match=reason):
            ask()


@settings(deadline=None, max_examples=300)
@given(
    st.lists(
        st.binary(max_size=6) | st.builds(lambda n: struct.pack("<I", n), st.integers(0, 9))
    ).map(b"".join)
)
def test_any_bytes_are_whole_elements_or_refused(data: bytes):
    try:
        elements = unpack_bytes(data)
    except InvalidTensorError:
        with pytest.raises(InvalidTensorError):
            count_bytes(data)
        return
    assert count_bytes(data) == len(elements)
    array = np.empty(len(elements), object)
    array[:] = elements
    assert pack_bytes(array) == data


def test_counting_stops_where_nobody_needs_to_know_more():
    data = bytes(4 * 10_000)
    assert count_bytes(data) == 10_000 and count_bytes(data, most=7) == 7
    with pytest.raises(InvalidTensorError, match="holds 1002 elements"):
        Tensor("x", "BYTES", (1,), data).check_size()


def test_skipping_more_elements_than_there_are_ends_with_the_data():
    data = pack_bytes(np.array([b"a", b"bc"], object))
    assert [skip_bytes(data, 0, 0), skip_bytes(data, 0, 1), skip_bytes(data, 5, 1)] == [0, 5, 11]
    with pytest.raises(InvalidTensorError, match="before its last element"):
        skip_bytes(data, 0, 10**18)
