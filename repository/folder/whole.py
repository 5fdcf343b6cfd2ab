"""Is a model file complete? Judged by headers and sizes alone, in well under a millisecond.

A half-copied file is the ordinary case of a folder that is being filled, so it is a Problem with a
reason, never an exception, and so is whatever a hostile file contains. Nothing is allocated because
a file says so, and no file is read as a whole. Whether the model is any good is for the worker to
find out.
"""

from __future__ import annotations

import math
import os
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import msgspec

from repository.errors import IncompleteFilesError
from repository.folder.onnx_files import External, externals_of
from repository.folder.opening import open_inside
from repository.names import inside, shown
from repository.snapshot import Problem

MAX_HEADER = 100_000_000  # bytes of JSON; the limit of the safetensors library
MAX_FIELDS = 20_000  # of an ONNX file, looked at in the front process: ~0.1 s
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4,
}  # fmt: skip
STILL_COPYING = "copy the file again, or wait until the copy is done"


class _FlawError(Exception):
    def __init__(self, rule: str, message: str, hint: str = STILL_COPYING) -> None:
        super().__init__(message)
        self.rule, self.message, self.hint = rule, message, hint


@dataclass(frozen=True, slots=True)
class Verdict:
    """`external`: real paths of the other files that an ONNX file needs, each once."""

    problem: Problem | None = None
    external: tuple[str, ...] = ()


def inspect(path: str, root: str, where: str, version: int | None = None) -> Verdict:
    """Looks at one model file. `root` is the repository's real path, `where` names the file in a
    Problem. A file of a kind that is not known here only has to be non-empty."""
    try:
        with open(open_inside(root, path), "rb", 0) as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise _FlawError("incomplete", "the file is empty")
            look = LOOKS.get(os.path.splitext(path)[1])
            external = look(file.fileno(), size, path, root) if look else ()
    except _FlawError as flaw:
        return Verdict(Problem(where, flaw.rule, flaw.message, flaw.hint, version))
    except IncompleteFilesError as error:
        return Verdict(Problem(where, "incomplete", str(error), STILL_COPYING, version))
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else "it cannot be read"
        hint = "let the server's user read it"
        return Verdict(Problem(where, "io", f"cannot be read: {reason}", hint, version))
    return Verdict(None, external)


def _safetensors(fd: int, size: int, path: str, root: str) -> tuple[str, ...]:
    """Eight bytes of length, a JSON header, then the tensors without a gap."""
    raw = os.pread(fd, 8, 0)
    if len(raw) < 8:
        raise _FlawError("incomplete", f"the file has {size} bytes, its header alone needs 8")
    (length,) = struct.unpack("<Q", raw)
    if length > MAX_HEADER:
        raise _FlawError(
            "incomplete",
            f"it declares a header of {length} bytes, at most {MAX_HEADER} are allowed",
            "is it a safetensors file?",
        )
    if length > size - 8:
        raise _FlawError(
            "incomplete", f"it declares a header of {length} bytes, but has only {size} in all"
        )
    try:
        header = msgspec.json.decode(os.pread(fd, length, 8), type=dict[str, msgspec.Raw])
        header.pop("__metadata__", None)
        tensors = [msgspec.json.decode(entry, type=_Entry) for entry in header.values()]
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise _FlawError("incomplete", "its header is not a safetensors header") from error
    end = 0
    for tensor in sorted(tensors, key=lambda t: t.data_offsets):
        begin, stop = tensor.data_offsets
        if begin != end or stop < begin or not _fits(tensor, stop - begin):
            raise _FlawError(
                "incomplete", "its header contradicts itself: tensors overlap or leave gaps"
            )
        end = stop
    if end != size - 8 - length:
        raise _FlawError(
            "incomplete", f"its tensors need {8 + length + end} bytes, the file has {size}"
        )
    return ()


_Offset = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class _Entry(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[_Offset, _Offset]


def _fits(tensor: _Entry, length: int) -> bool:
    bits = BITS.get(tensor.dtype)  # a datatype of the future is the worker's to judge
    if any(d < 0 for d in tensor.shape) or len(tensor.shape) > 64:
        return False
    return bits is None or math.prod(tensor.shape) * bits == length * 8


def _onnx(fd: int, size: int, path: str, root: str) -> tuple[str, ...]:
    folder = os.path.dirname(path)
    sizes: dict[str, tuple[str, int]] = {}  # location -> (real path, bytes)
    for part in externals_of(fd, MAX_FIELDS):
        if part.location not in sizes:
            sizes[part.location] = _external(part, folder, root)
        there = sizes[part.location][1]
        if part.offset + part.length > there:
            raise _FlawError(
                "incomplete",
                f"it needs {part.offset + part.length} bytes of '{shown(part.location)}', "
                f"which has {there}",
            )
    return tuple({real for real, _ in sizes.values()})


def _external(part: External, folder: str, root: str) -> tuple[str, int]:
    """A file that a model names is only touched if it lies beside it and does not lead away."""
    name = shown(part.location)
    steps = part.location.replace("\\", "/").split("/")
    if part.location.startswith(("/", "\\")) or ".." in steps or "\0" in part.location:
        raise _FlawError(
            "link",
            f"its external data '{name}' lies outside of its folder",
            "store the data beside the model and name it without '..' or a leading '/'",
        )
    real = os.path.realpath(os.path.join(folder, part.location))
    if not inside(root, real):
        raise _FlawError(
            "link",
            f"its external data '{name}' is a link that leads out of the repository",
            "copy the file into the model's folder",
        )
    try:
        found = os.stat(real)
    except FileNotFoundError as error:
        raise _FlawError("incomplete", f"its external data '{name}' is not there") from error
    if not stat.S_ISREG(found.st_mode):
        raise _FlawError("incomplete", f"its external data '{name}' is not a file")
    return real, found.st_size


def _zip(fd: int, size: int, path: str, root: str) -> tuple[str, ...]:
    """An archive ends with a record that says where its directory is; a torn one has no end."""
    tail_at = max(0, size - 22 - 65535)
    tail = os.pread(fd, size - tail_at, tail_at)
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < 22:
        raise _FlawError("incomplete", "the end of the archive is missing")
    length, start, comment = struct.unpack_from("<IIH", tail, at + 12)
    if at + 22 + comment != len(tail):
        raise _FlawError("incomplete", "the archive does not end where it says")
    end = tail_at + at
    if 0xFFFFFFFF in (length, start):
        length, start, end = _zip64(fd, tail[max(0, at - 20) : at])
    if start + length > end or os.pread(fd, 4, start)[:2] != b"PK":
        raise _FlawError("incomplete", "the directory of the archive is not where it should be")
    return ()


def _zip64(fd: int, locator: bytes) -> tuple[int, int, int]:
    """(length, start, where it must end) of the directory of an archive beyond 4 GiB."""
    if len(locator) == 20 and locator[:4] == b"PK\6\7":
        (record_at,) = struct.unpack_from("<Q", locator, 8)
        record = os.pread(fd, 56, min(record_at, 2**62))
        if len(record) == 56 and record[:4] == b"PK\6\6":
            length, start = struct.unpack_from("<QQ", record, 40)
            if start < 2**62:
                return length, start, record_at
    raise _FlawError("incomplete", "the directory of the archive is not where it should be")


LOOKS: dict[str, Callable[[int, int, str, str], tuple[str, ...]]] = {
    ".safetensors": _safetensors,
    ".onnx": _onnx,
    ".pt2": _zip,
    ".pt": _zip,
}
