"""Walks an ONNX file by its outer form only: is it all there, and which other files does it need?

ONNX is protobuf: a field is a tag and a value, and a nested message is its length and its bytes. So
lengths alone tell whether the file ends where it should, and tensors that are stored outside are
found by looking at `graph.initializer` and nothing else. Every read is a small pread at a place
that was checked against the file's size: nothing that the file declares is allocated, the walk only
moves forward, and the front process never parses a graph.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from repository.errors import IncompleteFilesError

WINDOW = 4096  # bytes per read: initializers are far apart, so more would be read for nothing
LONGEST_TEXT = 4096  # a location, an offset or a length in decimal

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
# Field numbers of onnx.proto.
MODEL_GRAPH, MODEL_OPSET_IMPORT = 7, 8
GRAPH_INITIALIZER = 5
TENSOR_EXTERNAL_DATA, TENSOR_DATA_LOCATION = 13, 14
ENTRY_KEY, ENTRY_VALUE = 1, 2
EXTERNAL = 1


class External(NamedTuple):
    """Part of another file. `length` 0: it was not said."""

    location: str  # as written in the file: to be judged before it is used
    offset: int
    length: int


class _Field(NamedTuple):
    number: int
    wire: int
    start: int  # of the content
    stop: int
    value: int  # of a varint


class _Enough(Exception):  # noqa: N818  (a signal, not an error)
    """The limit of fields is reached."""


def external_files(path: Path | str, limit: int | None = None) -> list[External]:
    """Where the file keeps tensors outside of itself, in its order.

    Raises IncompleteFilesError for a file that ends too early or is no ONNX model, OSError for one
    that cannot be read. After `limit` fields it stops and answers with what it has found; the
    worker, which has no limit, looks again.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return externals_of(fd, limit)
    finally:
        os.close(fd)


def externals_of(fd: int, limit: int | None = None) -> list[External]:
    """The same for a file that is open."""
    return _Walk(fd, limit).externals()


class _Walk:
    def __init__(self, fd: int, limit: int | None) -> None:
        self._fd = fd
        self._size = os.fstat(fd).st_size
        self._left = limit
        self._base = 0
        self._window = b""

    def externals(self) -> list[External]:
        if self._size == 0:
            raise IncompleteFilesError("the file is empty")
        found: list[External] = []
        try:
            self._outermost()
            for graph in self._messages(0, self._size, MODEL_GRAPH):
                for tensor in self._messages(graph.start, graph.stop, GRAPH_INITIALIZER):
                    found += self._tensor(tensor)
        except _Enough:
            pass
        return found

    def _outermost(self) -> None:
        """The whole outer level first: it tells whether the file ends where it should."""
        needed = {MODEL_GRAPH, MODEL_OPSET_IMPORT}
        for field in self._fields(0, self._size):
            if field.wire == BYTES:
                needed.discard(field.number)
        if needed:
            # Cut between two fields, every length still fits; but no model is without these two.
            raise IncompleteFilesError("the file ends before its graph and opset are complete")

    def _messages(self, at: int, end: int, number: int) -> Iterator[_Field]:
        return (f for f in self._fields(at, end) if f.number == number and f.wire == BYTES)

    def _tensor(self, tensor: _Field) -> list[External]:
        external = False
        said: dict[str, str] = {}
        for field in self._fields(tensor.start, tensor.stop):
            if field.number == TENSOR_DATA_LOCATION and field.wire == VARINT:
                external = field.value == EXTERNAL
            elif field.number == TENSOR_EXTERNAL_DATA and field.wire == BYTES:
                key, value = self._entry(field)
                said[key] = value
        if not external:
            return []
        if not said.get("location"):
            raise IncompleteFilesError("a tensor is stored in another file that is not named")
        return [External(said["location"], _number(said, "offset"), _number(said, "length"))]

    def _entry(self, entry: _Field) -> tuple[str, str]:
        texts = {ENTRY_KEY: "", ENTRY_VALUE: ""}
        for field in self._fields(entry.start, entry.stop):
            if field.number in texts and field.wire == BYTES:
                texts[field.number] = self._text(field)
        return texts[ENTRY_KEY], texts[ENTRY_VALUE]

    def _text(self, field: _Field) -> str:
        if field.stop - field.start > LONGEST_TEXT:
            raise IncompleteFilesError("the name of an external file is unreasonably long")
        raw = os.pread(self._fd, field.stop - field.start, field.start)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise IncompleteFilesError("the name of an external file is not UTF-8") from error

    def _fields(self, at: int, end: int) -> Iterator[_Field]:
        while at < end:
            if self._left is not None:
                if self._left == 0:
                    raise _Enough
                self._left -= 1
            tag, at = self._varint(at, end)
            number, wire = tag >> 3, tag & 7
            value, length = 0, 0
            if wire == VARINT:
                value, start = self._varint(at, end)
            elif wire == BYTES:
                length, start = self._varint(at, end)
            elif wire in (FIXED64, FIXED32):
                start, length = at, 8 if wire == FIXED64 else 4
            if number == 0 or wire not in (VARINT, BYTES, FIXED64, FIXED32):
                raise IncompleteFilesError("this is not an ONNX model, or it is damaged")
            if length > end - start:
                raise IncompleteFilesError(
                    f"a part of {length} bytes begins at byte {start}, only {end - start} are there"
                )
            yield _Field(number, wire, start, start + length, value)
            at = start + length

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        """(the number, where it ends). At most 10 bytes, seven bits each, lowest first."""
        number = 0
        for place in range(10):
            if at >= end:
                raise IncompleteFilesError(f"the file ends at byte {end}, inside a field")
            byte = self._byte(at)
            at += 1
            number |= (byte & 0x7F) << (7 * place)
            if byte < 0x80:
                return number, at
        raise IncompleteFilesError("this is not an ONNX model, or it is damaged")

    def _byte(self, at: int) -> int:
        if not self._base <= at < self._base + len(self._window):
            self._base, self._window = at, os.pread(self._fd, WINDOW, at)
            if not self._window:
                raise IncompleteFilesError("the file became shorter while it was read")
        return self._window[at - self._base]


def _number(said: dict[str, str], key: str) -> int:
    text = said.get(key, "0")
    if not (text.isascii() and text.isdecimal() and len(text) <= 19):
        raise IncompleteFilesError(f"the {key} of external data is not a number of bytes")
    return int(text)
