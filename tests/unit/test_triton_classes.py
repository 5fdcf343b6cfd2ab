"""Classification: the highest values, in order, as Triton writes them."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from repository.errors import InvalidRequestError
from repository.tensors import DATATYPES, Tensor, unpack_bytes
from server.triton.classes import NOT_NUMBERS, classified, highest


def told(
    tensor: Tensor, n: int, labels: tuple[str, ...] = (), *, batched: bool = False
) -> list[str]:
    found = classified(tensor, n, labels, batched=batched)
    assert found.datatype == "BYTES" and found.name == tensor.name
    found.check_size()
    return [text.decode() for text in unpack_bytes(found.data)]


@given(st.lists(st.integers(-3, 3), max_size=40), st.integers(0, 50))
def test_equal_values_come_by_their_index(values: list[int], n: int) -> None:
    places = sorted(range(len(values)), key=lambda i: (-values[i], i))
    assert highest(np.array(values, np.int64), min(n, len(values))) == places[:n]


@given(st.lists(st.floats(width=32), max_size=40), st.integers(0, 50))
def test_nan_is_lower_than_any_number(values: list[float], n: int) -> None:
    found = np.array(values, np.float32)
    ranked = np.where(np.isnan(found), -np.inf, found)
    places = sorted(range(len(values)), key=lambda i: (-ranked[i], i))
    assert highest(found, min(n, len(values))) == places[:n]


@pytest.mark.parametrize("datatype", [name for name in DATATYPES if name not in NOT_NUMBERS])
def test_every_kind_of_number_can_be_ranked(datatype: str) -> None:
    values = np.array([3, 1, 2])
    if datatype == "BF16":
        values = values.astype(np.float32).view(np.uint32) >> 16
    tensor = Tensor.of("y", values, datatype)
    decimals = ".000000" if datatype.startswith(("FP", "BF")) else ""
    assert told(tensor, 2) == [f"3{decimals}:0", f"2{decimals}:2"]


@pytest.mark.parametrize("datatype", NOT_NUMBERS)
def test_what_is_no_number_has_no_classes(datatype: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"unsupported type '{datatype}'"):
        classified(Tensor("y", datatype, (0,), b""), 1, (), batched=False)


def test_the_widest_integers_keep_all_their_digits() -> None:
    for datatype, value in (("UINT64", 2**64 - 1), ("INT64", -(2**63))):
        assert told(Tensor.of("y", np.array([value]), datatype), 1) == [f"{value}:0"]


def test_a_label_stands_behind_the_index_that_has_one() -> None:
    tensor = Tensor.of("y", np.array([[1, 2, 3], [9, 8, 7]], np.int32))
    assert told(tensor, 2, ("a", "", "c"), batched=True) == ["3:2:c", "2:1", "9:0:a", "8:1"]
    assert told(tensor, 2, ("a",)) == ["9:3", "8:4"], "without batches all of it is one row"


@pytest.mark.parametrize(
    ("shape", "batched", "expected"),
    [((2, 3), True, (2, 2)), ((2, 3), False, (2,)), ((2, 3, 4), True, (2, 2)), ((1,), True, (1, 1)),
     ((0, 3), True, (0, 2)), ((3, 0), True, (3, 0)), ((), False, (1,)), ((), True, (1,))],
)  # fmt: skip
def test_the_shape_is_rows_by_classes(
    shape: tuple[int, ...], batched: bool, expected: tuple[int, ...]
) -> None:
    tensor = Tensor.of("y", np.zeros(shape, np.float32))
    found = classified(tensor, 2, (), batched=batched)
    found.check_size()
    assert found.shape == expected


def test_a_large_output_is_not_sorted_as_a_whole() -> None:
    values = np.random.default_rng(0).random(4_000_000, np.float32)
    tensor = Tensor.of("y", values)
    began = time.process_time()
    found = told(tensor, 5)
    took = time.process_time() - began
    began = time.process_time()
    order = np.argsort(-values, kind="stable")[:5]
    assert took < time.process_time() - began
    assert found == [f"{values[i]:f}:{i}" for i in order]
