"""Tensors and datatypes of models written for Triton's python backend: numpy, DLPack, and the wire."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.dlpack import from_dlpack, to_dlpack

from repository.backends.triton import dlpack, utils
from repository.tensors import DATATYPES
from repository.tensors import Tensor as Wire

X = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture
def pb(tmp_path: Path) -> ModuleType:
    return utils.make("m", tmp_path, None)


# datatypes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "number", "kind"),
    [
        ("TYPE_BOOL", 1, np.bool_), ("TYPE_UINT8", 2, np.uint8), ("TYPE_UINT16", 3, np.uint16),
        ("TYPE_UINT32", 4, np.uint32), ("TYPE_UINT64", 5, np.uint64), ("TYPE_INT8", 6, np.int8),
        ("TYPE_INT16", 7, np.int16), ("TYPE_INT32", 8, np.int32), ("TYPE_INT64", 9, np.int64),
        ("TYPE_FP16", 10, np.float16), ("TYPE_FP32", 11, np.float32), ("TYPE_FP64", 12, np.float64),
        ("TYPE_STRING", 13, np.object_),
    ],
)  # fmt: skip
def test_each_datatype_has_a_word_a_number_and_a_numpy_type(
    pb: ModuleType, word: str, number: int, kind: type
) -> None:
    assert pb.triton_string_to_numpy(word) is kind
    assert pb.TRITON_STRING_TO_NUMPY[word] is kind
    assert pb.triton_to_numpy_type(number) is kind
    assert pb.numpy_to_triton_type(kind) == number
    assert pb.numpy_to_triton_type(np.dtype(kind)) == number
    assert pb.Tensor("x", np.zeros(2, kind)).triton_dtype() == number


def test_what_numpy_lacks_is_said(pb: ModuleType) -> None:
    with pytest.raises(pb.TritonModelException, match="bfloat16"):
        pb.triton_string_to_numpy("TYPE_BF16")
    with pytest.raises(pb.TritonModelException, match="TYPE_FLOAT"):
        pb.triton_string_to_numpy("TYPE_FLOAT")
    assert pb.triton_to_numpy_type(99) is None
    assert pb.numpy_to_triton_type(np.complex64) is None
    assert pb.numpy_to_triton_type(np.bytes_) == pb.NUMPY_TO_TRITON_TYPE[np.bytes_] == 13


def test_bytes_are_written_and_read_back(pb: ModuleType) -> None:
    texts = np.array([b"a", "ü", b"\x00\x00"], dtype=object)
    raw = pb.serialize_byte_tensor(texts)
    assert raw.startswith(b"\x01\x00\x00\x00a")
    assert pb.deserialize_bytes_tensor(raw).tolist() == [b"a", "ü".encode(), b"\x00\x00"]
    assert pb.serialize_byte_tensor(np.array([], dtype=object)) is None
    with pytest.raises(pb.TritonModelException, match="only 1"):
        pb.deserialize_bytes_tensor(b"\x09\x00\x00\x00a")


# tensors ------------------------------------------------------------------------------------------


def test_a_tensor_has_a_name_a_shape_and_its_array(pb: ModuleType) -> None:
    tensor = pb.Tensor("x", X)
    assert (tensor.name(), tensor.shape(), tensor.is_cpu()) == ("x", [2, 3], True)
    assert tensor.as_numpy() is X


def test_what_cannot_be_a_tensor_is_refused_when_it_is_made(pb: ModuleType) -> None:
    with pytest.raises(pb.TritonModelException, match="must be a numpy array, not list"):
        pb.Tensor("x", [1, 2])
    with pytest.raises(pb.TritonModelException, match="complex64"):
        pb.Tensor("x", np.zeros(2, np.complex64))


def test_an_arrived_tensor_may_be_written_to_and_changes_nobody_elses(pb: ModuleType) -> None:
    data = X.tobytes()
    tensor = pb.Tensor.arrived(Wire("x", "FP32", (2, 3), data))
    array = tensor.as_numpy()
    array += 1
    assert tensor.as_numpy() is array
    assert data == X.tobytes()
    np.testing.assert_array_equal(tensor.wire().array(), X + 1)


def test_an_arrived_tensor_in_memory_of_its_own_is_not_copied(pb: ModuleType) -> None:
    data = bytearray(X.tobytes())
    pb.Tensor.arrived(Wire("x", "FP32", (2, 3), memoryview(data))).as_numpy()[0, 0] = 7
    assert np.frombuffer(data, np.float32)[0] == 7


def test_an_untouched_tensor_goes_on_as_it_came(pb: ModuleType) -> None:
    wire = Wire("x", "FP32", (2, 3), X.tobytes())
    assert pb.Tensor.arrived(wire).wire().data is wire.data


@pytest.mark.parametrize("name", sorted(set(DATATYPES) - {"BYTES", "BF16"}))
def test_numbers_go_to_torch_and_back_without_a_copy(pb: ModuleType, name: str) -> None:
    array = np.array([0, 1, 1, 0], DATATYPES[name].dtype)
    lent = from_dlpack(pb.Tensor("x", array).to_dlpack())
    back = pb.Tensor.from_dlpack("y", to_dlpack(lent))
    assert back.as_numpy().ctypes.data == array.ctypes.data
    assert back.as_numpy().dtype == array.dtype
    np.testing.assert_array_equal(back.as_numpy(), array)


def test_torch_reads_a_tensor_as_it_is(pb: ModuleType) -> None:
    assert torch.from_dlpack(pb.Tensor("x", X)).tolist() == X.tolist()
    assert pb.Tensor("x", X).__dlpack_device__() == (1, 0)
    np.testing.assert_array_equal(np.from_dlpack(pb.Tensor("x", X)), X)


def test_a_torch_tensor_needs_no_capsule(pb: ModuleType) -> None:
    tensor = pb.Tensor.from_dlpack("y", torch.arange(3, dtype=torch.int16))
    assert tensor.as_numpy().tolist() == [0, 1, 2] and tensor.triton_dtype() == 7


def test_bfloat16_goes_by_dlpack_alone(pb: ModuleType) -> None:
    tensor = pb.Tensor.from_dlpack("h", torch.tensor([1.0, -2.5], dtype=torch.bfloat16))
    assert tensor.triton_dtype() == 14
    with pytest.raises(pb.TritonModelException, match="BF16, which numpy lacks"):
        tensor.as_numpy()
    wire = tensor.wire()
    assert (wire.datatype, len(wire.data)) == ("BF16", 4)
    back = from_dlpack(pb.Tensor.arrived(wire).to_dlpack())
    assert back.dtype == torch.bfloat16 and back.tolist() == [1.0, -2.5]


def test_memory_that_was_lent_outlives_who_lent_it(pb: ModuleType) -> None:
    tensor = pb.Tensor.from_dlpack("y", torch.full((1000,), 3.0))
    torch.full((1000,), 5.0)
    assert set(tensor.as_numpy().tolist()) == {3.0}


def test_what_dlpack_cannot_carry_is_said(pb: ModuleType) -> None:
    with pytest.raises(pb.TritonModelException, match="contiguous"):
        pb.Tensor.from_dlpack("y", torch.zeros(3, 4).t())
    with pytest.raises(pb.TritonModelException, match="BYTES"):
        pb.Tensor("x", np.array([b"a"], object)).to_dlpack()
    with pytest.raises(pb.TritonModelException, match="cannot be lent"):
        pb.Tensor.from_dlpack("y", torch.zeros(3, requires_grad=True))
    with pytest.raises(pb.TritonModelException, match="takes a DLPack capsule"):
        pb.Tensor.from_dlpack("y", object())
    used = to_dlpack(torch.zeros(3))
    from_dlpack(used)
    with pytest.raises(pb.TritonModelException, match="nobody has used yet"):
        pb.Tensor.from_dlpack("y", used)
    with pytest.raises(pb.TritonModelException, match="no datatype"):
        pb.Tensor.from_dlpack("y", torch.zeros(3, dtype=torch.complex64))


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3), ()])
def test_empty_tensors_and_scalars_go_by_dlpack(pb: ModuleType, shape: tuple[int, ...]) -> None:
    tensor = pb.Tensor.from_dlpack("y", torch.zeros(shape))
    assert tensor.shape() == list(shape)
    assert from_dlpack(pb.Tensor("x", tensor.as_numpy()).to_dlpack()).shape == shape


class OnDevice:
    """As torch's tensors on a GPU, without one."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __dlpack__(self) -> Any:
        capsule = to_dlpack(self._tensor)
        dlpack._read(capsule).device.type = dlpack.CUDA
        return capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def detach(self) -> OnDevice:
        return self

    def cpu(self) -> torch.Tensor:
        return self._tensor


def test_a_tensor_on_a_gpu_stays_there_until_it_is_sent(pb: ModuleType) -> None:
    tensor = pb.Tensor.from_dlpack("y", OnDevice(torch.tensor([1.0, 2.0])))
    assert not tensor.is_cpu() and tensor.__dlpack_device__() == (2, 0)
    with pytest.raises(pb.TritonModelException, match="lies on a GPU"):
        tensor.as_numpy()
    assert tensor.wire().array().tolist() == [1.0, 2.0]
