"""KServe V2 inference as a client speaks it: arrays to a binary request, an answer to arrays.

Shapes and datatypes are the model's own; an array whose numpy type differs from what the model wants
is converted where that loses no more than precision (float64 to FP32), else sent as it is, for the
server to refuse.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from repository.errors import InvalidTensorError
from repository.tensors import DATATYPES, Array, Tensor, datatype_of
from server.cli.exits import UNREACHABLE, USAGE, Failure

LENGTH_HEADER = "inference-header-content-length"


@dataclass(frozen=True, slots=True)
class Answer:
    model: str
    version: str
    outputs: tuple[Tensor, ...]


def request_of(
    arrays: Mapping[str, Array], wanted: Mapping[str, str]
) -> tuple[bytes, dict[str, str]]:
    """Body and headers. `wanted`: input name -> datatype, as the model's metadata has them."""
    try:
        tensors = [_tensor(name, array, wanted.get(name)) for name, array in arrays.items()]
    except InvalidTensorError as error:
        raise Failure(str(error), USAGE) from error
    inputs = [
        {
            "name": t.name,
            "datatype": t.datatype,
            "shape": list(t.shape),
            "parameters": {"binary_data_size": len(t.data)},
        }
        for t in tensors
    ]
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    headers = {LENGTH_HEADER: str(len(head)), "content-type": "application/octet-stream"}
    return b"".join([head, *(bytes(t.data) for t in tensors)]), headers


def _tensor(name: str, array: Array, datatype: str | None) -> Tensor:
    if datatype not in DATATYPES or datatype == "BYTES" or array.dtype.kind in "OSU":
        return Tensor.of(name, array, "BYTES" if datatype == "BYTES" else None)
    if datatype == "BF16" and array.dtype.kind == "f":
        # The upper half of a float32, rounded to nearest even.
        bits = np.asarray(array, np.float32).view(np.uint32)
        bits = bits + 0x7FFF + ((bits >> np.uint32(16)) & np.uint32(1))
        return Tensor.of(name, (bits >> np.uint32(16)).astype(np.uint16), "BF16")
    if np.can_cast(array.dtype, DATATYPES[datatype].dtype, "same_kind"):
        return Tensor.of(name, array, datatype)
    return Tensor.of(name, array, datatype_of(array.dtype))


def arrays_of(plain: Mapping[str, Any], wanted: Mapping[str, str]) -> dict[str, Array]:
    """From JSON such as {"x": [[0.1, 0.2]]}; the datatypes are the model's. An array stays."""
    arrays: dict[str, Array] = {}
    for name, values in plain.items():
        if isinstance(values, np.ndarray):
            arrays[name] = values
            continue
        datatype = DATATYPES.get(wanted.get(name, ""))
        if datatype is None:
            known = ", ".join(wanted) or "none that are known"
            raise Failure(f"the model has no input '{name}'; it has {known}", USAGE)
        kind = np.dtype(np.float32) if datatype.name == "BF16" else datatype.dtype
        try:
            arrays[name] = np.array(values, dtype=kind)
        except (TypeError, ValueError, OverflowError) as error:
            raise Failure(f"input '{name}' is no {datatype.name}: {error}", USAGE) from error
    return arrays


def answer_of(body: bytes, headers: Mapping[str, str]) -> Answer:
    """Raises Failure for what no KServe V2 server says."""
    try:
        length = int(headers.get(LENGTH_HEADER, len(body)))
        said = json.loads(body[:length])
        return Answer(
            said["model_name"],
            said.get("model_version", ""),
            tuple(_outputs(said["outputs"], body, length)),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise Failure(f"the answer cannot be read: {error!r}", UNREACHABLE) from error


def _outputs(said: Sequence[dict[str, Any]], body: bytes, at: int) -> list[Tensor]:
    found = []
    for output in said:
        name, datatype, shape = output["name"], output["datatype"], tuple(output["shape"])
        size = output.get("parameters", {}).get("binary_data_size")
        if size is None:
            array = np.array(output["data"], dtype=DATATYPES[datatype].dtype).reshape(shape)
            found.append(Tensor.of(name, array, datatype))
        else:
            tensor = Tensor(name, datatype, shape, body[at : at + size])
            tensor.check_size()
            found.append(tensor)
            at += size
    return found


def readable(tensor: Tensor) -> Array:
    """Texts for BYTES, numbers for BF16, the array itself for the rest."""
    array = tensor.array()
    if tensor.datatype == "BYTES":
        texts = [item.decode(errors="replace") for item in array.reshape(-1)]
        return np.array(texts, dtype=np.str_).reshape(array.shape)
    if tensor.datatype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array
