"""The file in which measured needs are remembered: `needs.jsonl` in the state folder.

One line for each thing that was learned, ["key", peak, guess]; of two about the same key the later one
counts. Lines are only added, until most of them are out of date: then those that count are written anew.
Everything here blocks. Nothing raises, and nothing is waited for until it is on disk: a line that cannot
be read is passed over, a file that cannot be written is said once, in the log.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

import msgspec

log = logging.getLogger("modeldepot.memory")

NAME = "needs.jsonl"
STALE = 3  # times as many lines as rows may count: then the file is written anew
LONGEST = 256  # bytes of a line
READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
ADD = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
ANEW = os.O_WRONLY | os.O_TRUNC | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK

Row: TypeAlias = tuple[int, int]  # bytes: the most that was measured, what is guessed
_Line: TypeAlias = tuple[str, int, int]
_read = msgspec.json.Decoder(_Line).decode


class EstimateFile:
    """For one server at a time: whoever has the state folder's lock. At most `most` rows count."""

    def __init__(self, folder: Path, most: int) -> None:
        self._path = folder / NAME
        self._most = most
        self._lines = 0
        self._torn = False  # the last line has no end
        self._well = True

    def open(self, *, forget: bool = False) -> dict[str, Row]:
        """What was written before, the latest last. `forget`: none of it."""
        if forget:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)
            return {}
        rows: dict[str, Row] = {}
        try:
            data = self._read()
        except OSError as error:
            self._say(error)
            return {}
        self._torn = bool(data) and not data.endswith(b"\n")
        for line in data.splitlines():
            self._lines += 1
            with suppress(msgspec.DecodeError, UnicodeDecodeError):
                key, peak, guess = _read(line)
                if peak >= 0 and guess >= 0 and peak + guess:
                    rows.pop(key, None)
                    rows[key] = peak, guess
        for key in list(rows)[: -self._most]:
            del rows[key]
        return rows

    def write(self, rows: Mapping[str, Row], every: Iterable[tuple[str, Row]]) -> bool:
        """Adds `rows`; where the file has grown too long, `every` row takes the place of all of it.
        False: it could not be written."""
        try:
            if self._lines + len(rows) > STALE * self._most:
                self._write_anew(dict(every))
            else:
                begin = b"\n" if self._torn else b""
                self._put(self._path, ADD, begin + _lines(rows))
                self._lines += len(rows)
                self._torn = False
        except OSError as error:
            self._torn = True
            self._say(error)
            return False
        self._well = True
        return True

    def _read(self) -> bytes:
        try:
            file = os.open(self._path, READ)
        except FileNotFoundError:
            return b""
        longest = LONGEST * STALE * self._most
        with open(file, "rb") as opened:
            data = opened.read(longest + 1)
        if len(data) > longest:  # it is none of ours: nobody would read what is added to it
            self._lines = STALE * self._most
        return data[:longest]

    def _write_anew(self, rows: Mapping[str, Row]) -> None:
        beside = self._path.with_suffix(".new")
        self._put(beside, ANEW, _lines(rows))
        os.replace(beside, self._path)
        self._lines, self._torn = len(rows), False

    def _put(self, path: Path, how: int, data: bytes) -> None:
        with open(os.open(path, how, 0o600), "wb", buffering=0) as file:
            if file.write(data) != len(data):
                raise OSError("there is no room for it")

    def _say(self, error: OSError) -> None:
        if self._well:
            self._well = False
            log.warning(
                "%s in the state folder cannot be used (%s): what models need is estimated anew "
                "after a restart",
                NAME,
                error.strerror or error,
            )


def _lines(rows: Mapping[str, Row]) -> bytes:
    return b"".join(
        msgspec.json.encode((key, peak, guess)) + b"\n" for key, (peak, guess) in rows.items()
    )
