"""Is a model file complete? Judged by headers and sizes alone, in well under a millisecond.

A half-copied file is the ordinary case of a folder that is being filled, so it is a Problem with a
reason, never an exception, and so is whatever a hostile file contains. Nothing is allocated because
a file says so, and no large file is read as a whole. Whether the model is any good is for the worker to
find out.
"""

from __future__ import annotations

import math
import os
import re
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import msgspec

from repository.errors import IncompleteFilesError
from repository.folder.files import decoded
from repository.folder.flaws import STILL_COPYING, FlawError
from repository.folder.onnx_files import External, externals_of
from repository.folder.opening import open_inside
from repository.folder.safetensors_header import header_of
from repository.names import inside, shown
from repository.snapshot import Problem

MAX_FIELDS = 20_000  # of an ONNX file, looked at in the front process: ~0.1 s
SMALL = 4 << 20  # bytes of a tokenizer that is read as a whole: ~10 ms
TAIL = 256  # bytes of a larger one

_BEGINS = re.compile(rb"\s*\{")
_ENDS = re.compile(rb"\}\s*\}\s*\Z")

TensorHead: TypeAlias = tuple[str, tuple[int, ...]]  # safetensors datatype, shape


@dataclass(frozen=True, slots=True)
class Verdict:
    """`external`: real paths of the other files that an ONNX file needs, each once. `tensors`: what
    a safetensors file holds, summed by datatype: (datatype, numbers, bytes)."""

    problem: Problem | None = None
    external: tuple[str, ...] = ()
    tensors: tuple[tuple[str, int, int], ...] = ()


def inspect(path: str, root: str, where: str, version: int | None = None) -> Verdict:
    """Looks at one model file. `root` is the repository's real path, `where` names the file in a
    Problem. A file of a kind that is not known here only has to be non-empty."""
    try:
        with open(open_inside(root, path), "rb", 0) as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise FlawError("incomplete", "the file is empty")
            look = NAMED.get(os.path.basename(path)) or LOOKS.get(os.path.splitext(path)[1])
            return look(file.fileno(), size, path, root) if look else Verdict()
    except FlawError as flaw:
        return Verdict(Problem(where, flaw.rule, flaw.message, flaw.hint, version))
    except IncompleteFilesError as error:
        return Verdict(Problem(where, "incomplete", str(error), STILL_COPYING, version))
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else "it cannot be read"
        hint = "let the server's user read it"
        return Verdict(Problem(where, "io", f"cannot be read: {reason}", hint, version))


def read_header(path: str, root: str) -> dict[str, TensorHead]:
    """Of a safetensors file that is complete: name -> (datatype, shape).

    Raises IncompleteFilesError, OSError.
    """
    with open(open_inside(root, path), "rb", 0) as file:
        header = header_of(file.fileno(), os.fstat(file.fileno()).st_size)
    return {name: (entry.dtype, entry.shape) for name, entry in header.tensors.items()}


def _safetensors(fd: int, size: int, path: str, root: str) -> Verdict:
    sums: dict[str, tuple[int, int]] = {}
    for entry in header_of(fd, size).tensors.values():
        numbers, length = sums.get(entry.dtype, (0, 0))
        begin, end = entry.data_offsets
        sums[entry.dtype] = numbers + math.prod(entry.shape), length + end - begin
    return Verdict(tensors=tuple((kind, *both) for kind, both in sums.items()))


def _tokenizer(fd: int, size: int, path: str, root: str) -> Verdict:
    """JSON that ends. A large one is judged by its ends: it closes two objects (the model, the whole)
    after a vocabulary in which there are none."""
    if size <= SMALL:
        decoded("", os.pread(fd, size, 0), dict[str, msgspec.Raw])
    elif not (_BEGINS.match(os.pread(fd, TAIL, 0)) and _ENDS.search(_tail(fd, size))):
        raise FlawError("incomplete", "its JSON has no end")
    return Verdict()


def _tail(fd: int, size: int) -> bytes:
    return os.pread(fd, TAIL, size - TAIL)


def _onnx(fd: int, size: int, path: str, root: str) -> Verdict:
    folder = os.path.dirname(path)
    sizes: dict[str, tuple[str, int]] = {}  # location -> (real path, bytes)
    for part in externals_of(fd, MAX_FIELDS):
        if part.location not in sizes:
            sizes[part.location] = _external(part, folder, root)
        there = sizes[part.location][1]
        if part.offset + part.length > there:
            raise FlawError(
                "incomplete",
                f"it needs {part.offset + part.length} bytes of '{shown(part.location)}', "
                f"which has {there}",
            )
    return Verdict(external=tuple({real for real, _ in sizes.values()}))


def _external(part: External, folder: str, root: str) -> tuple[str, int]:
    """A file that a model names is only touched if it lies beside it and does not lead away."""
    name = shown(part.location)
    steps = part.location.replace("\\", "/").split("/")
    if part.location.startswith(("/", "\\")) or ".." in steps or "\0" in part.location:
        raise FlawError(
            "link",
            f"its external data '{name}' lies outside of its folder",
            "store the data beside the model and name it without '..' or a leading '/'",
        )
    real = os.path.realpath(os.path.join(folder, part.location))
    if not inside(root, real):
        raise FlawError(
            "link",
            f"its external data '{name}' is a link that leads out of the repository",
            "copy the file into the model's folder",
        )
    try:
        found = os.stat(real)
    except FileNotFoundError as error:
        raise FlawError("incomplete", f"its external data '{name}' is not there") from error
    if not stat.S_ISREG(found.st_mode):
        raise FlawError("incomplete", f"its external data '{name}' is not a file")
    return real, found.st_size


def _zip(fd: int, size: int, path: str, root: str) -> Verdict:
    """An archive ends with a record that says where its directory is; a torn one has no end."""
    tail_at = max(0, size - 22 - 65535)
    tail = os.pread(fd, size - tail_at, tail_at)
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < 22:
        raise FlawError("incomplete", "the end of the archive is missing")
    length, start, comment = struct.unpack_from("<IIH", tail, at + 12)
    if at + 22 + comment != len(tail):
        raise FlawError("incomplete", "the archive does not end where it says")
    end = tail_at + at
    if 0xFFFFFFFF in (length, start):
        length, start, end = _zip64(fd, tail[max(0, at - 20) : at])
    if start + length > end or os.pread(fd, 4, start)[:2] != b"PK":
        raise FlawError("incomplete", "the directory of the archive is not where it should be")
    return Verdict()


def _zip64(fd: int, locator: bytes) -> tuple[int, int, int]:
    """(length, start, where it must end) of the directory of an archive beyond 4 GiB."""
    if len(locator) == 20 and locator[:4] == b"PK\6\7":
        (record_at,) = struct.unpack_from("<Q", locator, 8)
        record = os.pread(fd, 56, min(record_at, 2**62))
        if len(record) == 56 and record[:4] == b"PK\6\6":
            length, start = struct.unpack_from("<QQ", record, 40)
            if start < 2**62:
                return length, start, record_at
    raise FlawError("incomplete", "the directory of the archive is not where it should be")


Look: TypeAlias = Callable[[int, int, str, str], Verdict]
LOOKS: dict[str, Look] = {
    ".safetensors": _safetensors,
    ".onnx": _onnx,
    ".pt2": _zip,
    ".pt": _zip,
}
NAMED: dict[str, Look] = {"tokenizer.json": _tokenizer}
