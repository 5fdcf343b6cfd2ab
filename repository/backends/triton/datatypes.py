"""The datatypes by Triton's three names for each: its number, the word in a config, the numpy type."""

from __future__ import annotations

from typing import Any

import numpy as np

from repository.backends.triton.errors import TritonModelException
from repository.errors import InvalidTensorError
from repository.tensors import DATATYPES, Array, datatype_of, pack_bytes, unpack_bytes

# In the order of TRITONSERVER_DataType, which counts from 1.
NUMBERS = {
    name: number
    for number, name in enumerate(
        ("BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16",
         "FP32", "FP64", "BYTES", "BF16"),
        1,
    )
}  # fmt: skip
TRITON_TO_NUMPY: dict[int, Any] = {
    number: DATATYPES[name].dtype.type for name, number in NUMBERS.items() if name != "BF16"
}

NUMPY_TO_TRITON: dict[Any, int] = {kind: number for number, kind in TRITON_TO_NUMPY.items()}
NUMPY_TO_TRITON[np.bytes_] = NUMBERS["BYTES"]


def word(datatype: str) -> str:
    """As a config.pbtxt has it: "FP32" is TYPE_FP32, "BYTES" is TYPE_STRING."""
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"


def datatype(word: str) -> str:
    """The way back. Raises TritonModelException for a word that there is not."""
    found = word.removeprefix("TYPE_")
    found = "BYTES" if found == "STRING" else found
    if found not in DATATYPES:
        raise TritonModelException(
            f"'{word}' is no data type; there are TYPE_STRING and "
            f"{', '.join(f'TYPE_{name}' for name in DATATYPES if name != 'BYTES')}"
        )
    return found


TRITON_STRING_TO_NUMPY: dict[str, Any] = {
    word(name): TRITON_TO_NUMPY[number] for name, number in NUMBERS.items() if name != "BF16"
}


def triton_string_to_numpy(triton_type_string: str) -> Any:
    """The numpy type of a config's word. Raises TritonModelException for one that has none."""
    if triton_type_string == "TYPE_BF16":
        raise TritonModelException("numpy has no bfloat16; use Tensor.to_dlpack and from_dlpack")
    try:
        return TRITON_STRING_TO_NUMPY[triton_type_string]
    except KeyError:
        raise TritonModelException(f"'{triton_type_string}' is no data type") from None


def triton_to_numpy_type(data_type: int) -> Any:
    """None where there is none."""
    return TRITON_TO_NUMPY.get(data_type)


def numpy_to_triton_type(data_type: Any) -> int | None:
    """Of a numpy type or dtype. None where there is none."""
    try:
        return NUMBERS[datatype_of(np.dtype(data_type))]
    except (InvalidTensorError, TypeError):
        return None


def serialize_byte_tensor(input_tensor: Array) -> bytes | None:
    """The elements one behind the other, each after its length; None for an empty tensor or one of
    numbers."""
    if not input_tensor.size or input_tensor.dtype.kind not in "OSU":
        return None
    return pack_bytes(input_tensor)


def deserialize_bytes_tensor(encoded_tensor: bytes) -> Array:
    """One axis, elements of bytes. Raises TritonModelException for a length beyond the end."""
    try:
        found = unpack_bytes(encoded_tensor)
    except InvalidTensorError as error:
        raise TritonModelException(str(error)) from error
    array: Array = np.empty(len(found), dtype=object)
    array[:] = found
    return array
