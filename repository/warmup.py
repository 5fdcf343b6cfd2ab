"""Warm-up requests: what a model is sent before it serves, made of zeros, random values, or files.

The files lie in warmup/ of the model's folder and hold a tensor's bytes as the wire has them (texts
with four bytes of length before each). All of this blocks, so it is called in a thread.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np

from repository.config import WarmupInput, WarmupRequest
from repository.errors import InvalidTensorError
from repository.folder.opening import open_inside
from repository.messages import InferRequest, TensorSpec
from repository.names import shown
from repository.signature import Signature
from repository.sizes import human
from repository.tensors import DATATYPES, LENGTH, Array, Datatype, Shape, Tensor, skip_bytes

LARGEST_INPUT = 1 << 30  # bytes of one warm-up tensor
FOLDER = "warmup"


def request_of(folder: Path, signature: Signature, most: int, kind: WarmupRequest) -> InferRequest:
    """`folder`: the model's; `most`: its max_batch_size. Inputs that `kind` does not name, and that the
    model needs, are filled as it says of all. Raises InvalidTensorError."""
    if kind.batch_size > 1 and not most:
        raise InvalidTensorError(f"batch_size is {kind.batch_size}, but the model does not batch")
    rng = np.random.default_rng(0)  # the same at every load
    said = {part.name: _said(folder, part, most, kind, rng) for part in kind.inputs}
    rest = [part for part in signature.required if part.name not in said]
    return InferRequest([*said.values(), *(_filled(part, most, kind, rng) for part in rest)])


def _filled(part: TensorSpec, most: int, kind: WarmupRequest, rng: np.random.Generator) -> Tensor:
    dims = [kind.size if dim == -1 else dim for dim in part.shape]
    if most and dims:
        dims[0] = kind.batch_size
    known, shape = _checked(part.name, part.datatype, tuple(dims))
    return Tensor.of(part.name, _values(known, shape, kind.data, rng), part.datatype)


def _said(
    folder: Path, part: WarmupInput, most: int, kind: WarmupRequest, rng: np.random.Generator
) -> Tensor:
    rows = (kind.batch_size,) if most else ()
    known, shape = _checked(part.name, part.datatype, rows + part.shape)
    if part.data in ("zero", "random"):
        return Tensor.of(part.name, _values(known, shape, part.data, rng), part.datatype)
    data = _read(folder, part)
    count = math.prod(shape)
    try:
        end = known.size * count if known.size else skip_bytes(data, 0, count)
    except InvalidTensorError as error:
        raise InvalidTensorError(f"{FOLDER}/{shown(part.data)}: {error}") from error
    if len(data) < end:
        raise InvalidTensorError(
            f"{FOLDER}/{shown(part.data)} has {len(data)} bytes; input '{part.name}' of shape "
            f"{list(shape)} needs {end}"
        )
    return Tensor(part.name, part.datatype, shape, data[:end])


def _read(folder: Path, part: WarmupInput) -> bytes:
    where = f"{FOLDER}/{shown(part.data)}"
    home = os.path.realpath(folder)
    if os.path.isabs(part.data) or ".." in part.data.split("/"):
        raise InvalidTensorError(f"{where} leads out of the folder {FOLDER}")
    try:
        with open(open_inside(home, os.path.join(home, FOLDER, part.data)), "rb") as file:
            data = file.read(LARGEST_INPUT + 1)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it has no such name"
        raise InvalidTensorError(
            f"{where} cannot be read, which is to be input '{part.name}': {why}"
        ) from error
    if len(data) > LARGEST_INPUT:
        raise InvalidTensorError(f"{where} has more than {human(LARGEST_INPUT)}")
    return data


def _checked(name: str, datatype: str, shape: Shape) -> tuple[Datatype, Shape]:
    known = DATATYPES[datatype]
    size = math.prod(shape) * (known.size or LENGTH.size)
    if not 0 <= size <= LARGEST_INPUT:
        raise InvalidTensorError(
            f"input '{name}' would have shape {list(shape)}, {human(size)}; a warm-up input "
            f"may have {human(LARGEST_INPUT)}"
        )
    return known, shape


def _values(known: Datatype, shape: Shape, how: str, rng: np.random.Generator) -> Array:
    """Random floats are normal; integers small, as they often are places in a table."""
    if how == "zero":
        return (
            np.full(shape, b"", object) if known.name == "BYTES" else np.zeros(shape, known.dtype)
        )
    if known.name == "BYTES":
        return np.full(shape, b"warm", object)
    if known.name == "BF16":
        bits = rng.standard_normal(shape, np.float32).view(np.uint32) >> 16
        return bits.astype(np.uint16)
    if known.dtype.kind == "f":
        return rng.standard_normal(shape, np.float32).astype(known.dtype)
    return rng.integers(0, 2 if known.name == "BOOL" else 10, shape).astype(known.dtype)
