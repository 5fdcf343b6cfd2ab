"""The files of one version, and the few small ones of them that are read in the front.

JSON is taken apart one level at a time and only where it is asked for: whatever else a file holds
(numbers without end, ten thousand brackets) is skipped, and never becomes a value.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from repository.folder.flaws import FlawError
from repository.folder.opening import open_inside
from repository.names import shown
from repository.sizes import human

LARGEST = 4 << 20  # bytes of a JSON file; a config.json that names 20,000 labels has 1 MiB
MOST = 2**31 - 1  # any size that a config may name


@dataclass(frozen=True, slots=True)
class Files:
    """root   real path of the repository
    folder real path of the version's folder
    sizes  path relative to it -> bytes
    """

    root: str
    folder: str
    sizes: Mapping[str, int]

    def names(self, folder: str = "") -> list[str]:
        """Of the files in it, not below: "" or "1_Pooling/"."""
        found = (n.removeprefix(folder) for n in self.sizes if n.startswith(folder))
        return sorted(n for n in found if "/" not in n)

    def read(self, name: str, largest: int = LARGEST) -> bytes:
        """Raises FlawError, which names the file."""
        try:
            path = os.path.join(self.folder, name)
            with open(open_inside(self.root, path), "rb") as file:
                text = file.read(largest + 1)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else "it cannot be read"
            hint = "let the server's user read it"
            raise FlawError("io", f"cannot be read: {reason}", hint, name=name) from error
        if len(text) > largest:
            raise FlawError(
                "config", f"the file has more than {human(largest)}", "is it the right file?",
                name=name,
            )  # fmt: skip
        return text

    def fields(self, name: str, largest: int = LARGEST) -> Fields:
        """The file is a JSON object. Raises FlawError."""
        return Fields(name, decoded(name, self.read(name, largest), dict[str, msgspec.Raw]))

    def items(self, name: str) -> list[Fields]:
        """The file is a list of JSON objects. Raises FlawError."""
        found = decoded(name, self.read(name), list[dict[str, msgspec.Raw]])
        return [Fields(name, item) for item in found]


def decoded(name: str, text: bytes | msgspec.Raw, kind: Any) -> Any:
    """JSON of that type. Raises FlawError for everything else: half a file is not JSON."""
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        if not text:
            raise FlawError("incomplete", "the file is empty", name=name) from error
        raise FlawError(
            "incomplete", "the file is not the JSON that belongs here, or not all of it", name=name
        ) from error


class Fields:
    """One JSON object of the file `name`. A value that is null is not there."""

    def __init__(self, name: str, values: dict[str, msgspec.Raw]) -> None:
        self._name = name
        self._values = {k: v for k, v in values.items() if bytes(v) != b"null"}

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def number(self, *keys: str) -> int:
        """The first of these that is there, from 1; 0: none is."""
        for key in keys:
            if key in self._values:
                found = self._typed(key, int, "a whole number")
                if not 0 < found <= MOST:
                    raise self._wrong(key, f"a whole number from 1 to {MOST}")
                return int(found)
        return 0

    def text(self, *keys: str) -> str:
        key = next((k for k in keys if k in self._values), "")
        return str(self._typed(key, str, "text")) if key else ""

    def texts(self, key: str) -> tuple[str, ...]:
        return tuple(self._typed(key, list[str], "a list of texts")) if key in self else ()

    def flag(self, key: str) -> bool:
        return bool(self._typed(key, bool, "true or false")) if key in self else False

    def within(self, key: str) -> Fields:
        """The object that this key holds; an empty one where there is none."""
        kind = dict[str, msgspec.Raw]
        found = self._typed(key, kind, "an object") if key in self else {}
        return Fields(self._name, found)

    def names(self) -> tuple[str, ...]:
        return tuple(self._values)

    def raw(self, key: str) -> bytes:
        return bytes(self._values.get(key, b""))

    def _typed(self, key: str, kind: Any, expected: str) -> Any:
        try:
            return msgspec.json.decode(self._values[key], type=kind)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise self._wrong(key, expected) from error

    def _wrong(self, key: str, expected: str) -> FlawError:
        message = f"'{shown(key)}' must be {expected}"
        return FlawError("config", message, "is it the model's own file?", name=self._name)
