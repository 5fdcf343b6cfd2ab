"""Golden inputs and outputs beside a model, which a new generation must reproduce.

A check is a file in `checks/` of the model's folder (for all versions) or of a version's folder:

*.json   {"inputs": [...], "outputs": [...], "atol": 1e-3, "rtol": 0}; tensors as KServe V2 writes
         them in JSON (name, shape, datatype, data), tolerances optional; NaN, Infinity are numbers
*.npz    arrays named "inputs/NAME" and "outputs/NAME"; BF16 as its bits in uint16

Inputs are what a client would send, with the batch axis. Outputs may be a part of the model's.
Everything here blocks, so it is called in a thread. Files are read whole, are bounded, and may not
lead out of the model's folder; nothing in them can run code.
"""

from __future__ import annotations

import json
import math
import stat
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np

from repository.errors import CheckFailedError, InvalidTensorError
from repository.sizes import human
from repository.spec import ModelSpec
from repository.tensors import DATATYPES, Array, Shape, Tensor

LARGEST = {".json": 4 << 20, ".npz": 64 << 20}  # bytes; JSON is parsed under the GIL


@dataclass(frozen=True, slots=True)
class Check:
    """`file` is relative to the model's folder. A tolerance of None leaves it to the config."""

    file: str
    inputs: list[Tensor]
    outputs: list[Tensor]
    atol: float | None = None
    rtol: float | None = None


class _JsonTensor(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    datatype: str
    shape: list[int]
    data: Any


class _JsonCheck(msgspec.Struct, forbid_unknown_fields=True):
    inputs: list[_JsonTensor]
    outputs: list[_JsonTensor]
    atol: float | None = None
    rtol: float | None = None


def find_checks(spec: ModelSpec) -> list[str]:
    """Every check of this version, relative to the model's folder: common ones first."""
    found: dict[str, None] = {}
    for folder in (spec.folder, spec.path):
        directory = folder / "checks"
        try:
            paths = sorted(directory.iterdir()) if directory.is_dir() else []
        except OSError as error:
            raise CheckFailedError(f"checks: cannot be read: {_why(error)}") from error
        for path in paths:
            if path.suffix in LARGEST and not path.name.startswith("."):
                found[path.relative_to(spec.folder).as_posix()] = None
    return list(found)


def read_check(spec: ModelSpec, file: str, datatypes: Mapping[str, str]) -> Check:
    """`datatypes` of the model's tensors by name: numpy cannot say BF16.

    Raises CheckFailedError, saying which file and what is wrong in it.
    """
    path = spec.folder / file
    try:
        _check_place(spec.folder, path)
        check = (
            _read_json(path, file) if path.suffix == ".json" else _read_npz(path, file, datatypes)
        )
        _check_whole(check)
    except (_MalformedError, InvalidTensorError) as error:
        raise CheckFailedError(f"{file}: {error}") from error
    except OSError as error:
        raise CheckFailedError(f"{file}: cannot be read: {_why(error)}") from error
    return check


def _why(error: OSError) -> str:
    """Without the path, which is absolute."""
    return error.strerror or type(error).__name__


class _MalformedError(Exception):
    """Becomes a CheckFailedError that names the file."""


def _check_place(folder: Path, path: Path) -> None:
    if not path.resolve().is_relative_to(folder.resolve()):
        raise _MalformedError("is a link that leads out of the model's folder; put the file there")
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise _MalformedError("is not a file")
    _check_bounds(found.st_size, path.suffix)


def _check_bounds(size: int, suffix: str) -> None:
    if size > LARGEST[suffix]:
        raise _MalformedError(
            f"holds {human(size)}; at most {human(LARGEST[suffix])} are read from {suffix} checks "
            f"({'use fewer rows' if suffix == '.npz' else 'use an .npz'})"
        )


def _check_whole(check: Check) -> None:
    for kind, tensors in (("inputs", check.inputs), ("outputs", check.outputs)):
        names = [tensor.name for tensor in tensors]
        if len(set(names)) != len(names):
            raise _MalformedError(f"{kind} name a tensor twice: {', '.join(sorted(names))}")
    if not check.outputs:
        raise _MalformedError("has no golden outputs, so there is nothing to compare")
    for name, value in (("atol", check.atol), ("rtol", check.rtol)):
        if value is not None and not 0 <= value < math.inf:
            raise _MalformedError(f"{name} is {value}; it must be a number >= 0")


# JSON ---------------------------------------------------------------------------------------------


def _read_json(path: Path, file: str) -> Check:
    try:
        with path.open("rb") as stream:
            raw = stream.read(LARGEST[".json"] + 1)
        _check_bounds(len(raw), ".json")  # it may have grown
        found = msgspec.convert(json.loads(raw), _JsonCheck)
    except RecursionError:
        raise _MalformedError("is nested too deeply") from None
    except ValueError as error:  # of the JSON parser, of Unicode, of msgspec
        raise _MalformedError(f"is not a check: {error}") from error
    return Check(
        file,
        [_from_json(tensor) for tensor in found.inputs],
        [_from_json(tensor) for tensor in found.outputs],
        found.atol,
        found.rtol,
    )


def _from_json(tensor: _JsonTensor) -> Tensor:
    name, shape = tensor.name, tuple(tensor.shape)
    known = DATATYPES.get(tensor.datatype)
    if known is None or known.name == "BF16":
        raise _MalformedError(
            f"tensor '{name}': datatype '{tensor.datatype}' cannot be written in JSON; use one of "
            f"{', '.join(n for n in DATATYPES if n != 'BF16')}, or an .npz"
        )
    values = _flat(tensor.data, len(shape))
    if min(shape, default=0) < 0 or len(values) != math.prod(shape):
        raise _MalformedError(
            f"tensor '{name}' has {len(values)} values; shape {list(shape)} does not fit"
        )
    return Tensor.of(name, _array(name, known.name, values).reshape(shape), known.name)


def _flat(data: Any, rank: int) -> list[Any]:
    """Values in order; `data` may be flat, or nested as the shape is."""
    values = data if isinstance(data, list) else [data]
    for _ in range(rank):
        if not any(isinstance(value, list) for value in values):
            break
        deeper: list[Any] = []
        for value in values:
            deeper.extend(value if isinstance(value, list) else [value])
        values = deeper
    return values


def _array(name: str, datatype: str, values: list[Any]) -> Array:
    """Exactly these values: nothing is rounded to an integer, wrapped, or read from text."""
    kinds: tuple[type, ...] = (int, float)
    if datatype == "BYTES":
        kinds = (str,)
    elif datatype == "BOOL":
        kinds = (bool,)
    elif "INT" in datatype:
        kinds = (int,)
    for value in values:
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise _MalformedError(f"tensor '{name}': {_shown(value)} is no {datatype}")
    try:
        return np.array(values, dtype=DATATYPES[datatype].dtype)
    except OverflowError:
        raise _MalformedError(f"tensor '{name}' has a value out of {datatype}'s range") from None


# npz ----------------------------------------------------------------------------------------------


def _read_npz(path: Path, file: str, datatypes: Mapping[str, str]) -> Check:
    sides: dict[str, list[Tensor]] = {"inputs": [], "outputs": []}
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            _check_bounds(sum(member.file_size for member in members), ".npz")
            for member in members:
                if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise ValueError("it is packed in a way that numpy does not write")
                side, _, name = member.filename.removesuffix(".npy").partition("/")
                if side not in sides or not name or not member.filename.endswith(".npy"):
                    raise _MalformedError(
                        f"has an array '{member.filename.removesuffix('.npy')}'; arrays are named "
                        f"'inputs/NAME' or 'outputs/NAME'"
                    )
                with archive.open(member) as stream:
                    array = _read_npy(stream, member.file_size)
                sides[side].append(_from_numpy(name, array, datatypes.get(name)))
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, RuntimeError) as error:
        # RuntimeError is zipfile's for an encrypted member, and NotImplementedError is one.
        raise _MalformedError(f"is not a readable .npz: {error}") from error
    return Check(file, sides["inputs"], sides["outputs"])


def _read_npy(stream: IO[bytes], size: int) -> Array:
    """One array, whose declared shape is held against the bytes there are before any allocation."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise ValueError(f"format version {version} is not 1.0 or 2.0")
    if dtype.hasobject:
        raise ValueError("object arrays need pickle; save text as numpy strings or bytes")
    needed = dtype.itemsize * math.prod(shape)
    if min(shape, default=0) < 0 or not 0 <= needed <= size:
        raise ValueError(f"an array declares shape {list(shape)}, which its bytes do not fill")
    data = stream.read(needed)
    if len(data) != needed:
        raise ValueError("an array ends early")
    if dtype.itemsize == 0:  # numpy's type of only empty text
        return np.zeros(shape, dtype)
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def _from_numpy(name: str, array: Array, datatype: str | None) -> Tensor:
    is_bf16 = datatype == "BF16" and array.dtype == np.uint16
    return Tensor.of(name, array, "BF16" if is_bf16 else None)


# comparing ----------------------------------------------------------------------------------------


def compare(check: Check, outputs: Sequence[Tensor], *, atol: float, rtol: float) -> None:
    """Raises CheckFailedError for the first golden output that `outputs` do not reproduce.

    Floats agree where |got - golden| <= atol + rtol * |golden|, NaN with NaN, infinities with
    themselves. Other datatypes agree where they are equal. The check's own tolerances go first.
    """
    atol = atol if check.atol is None else check.atol
    rtol = rtol if check.rtol is None else check.rtol
    got = {tensor.name: tensor for tensor in outputs}
    for golden in check.outputs:
        found = got.get(golden.name)
        if found is None:
            raise CheckFailedError(
                f"{check.file}: the model gives no output '{golden.name}'; it gives "
                f"{', '.join(sorted(got)) or 'none'}"
            )
        text = _difference(found, golden, atol, rtol)
        if text:
            raise CheckFailedError(f"{check.file}: output '{golden.name}' {text}")


def _difference(got: Tensor, golden: Tensor, atol: float, rtol: float) -> str:
    """What differs, in words; empty where they agree."""
    if (got.datatype, got.shape) != (golden.datatype, golden.shape):
        return (
            f"is {got.datatype} {list(got.shape)}; the golden one is {golden.datatype} "
            f"{list(golden.shape)}"
        )
    have, want = _numbers(got), _numbers(golden)
    if want.dtype.kind != "f":
        wrong = np.asarray(have != want)
        return _told(wrong, have, want, "") if wrong.any() else ""
    with np.errstate(all="ignore"):
        apart = np.abs(have - want)
        near = np.isfinite(have) & np.isfinite(want) & (apart <= atol + rtol * np.abs(want))
        wrong = np.asarray(~(near | (have == want) | (np.isnan(have) & np.isnan(want))))
    if not wrong.any():
        return ""
    comparable = apart[wrong & np.isfinite(apart)]
    largest = f"{comparable.max():.6g}" if comparable.size else "not finite"
    return _told(
        wrong, have, want, f"; largest difference {largest} (atol {atol:g}, rtol {rtol:g})"
    )


def _numbers(tensor: Tensor) -> Array:
    """For comparing: every float type as float64 (exact), others as they are."""
    array = tensor.array()
    if tensor.datatype == "BF16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def _told(wrong: Array, have: Array, want: Array, end: str) -> str:
    at: Shape = tuple(int(i) for i in np.unravel_index(int(np.argmax(wrong)), wrong.shape))
    return (
        f"differs from the golden one in {int(wrong.sum())} of {wrong.size} elements, first at "
        f"{list(at)}: got {_shown(have[at])}, expected {_shown(want[at])}{end}"
    )


def _shown(value: Any) -> str:
    if isinstance(value, np.generic):
        value = value.item()
    text = f"{value:.9g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
