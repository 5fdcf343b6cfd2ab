"""A ModelConfig of Triton while it is read: what was found, where it was written, what is not honoured.

A reader of one part takes the page, looks at its message, and sets keys of ours. Nothing here knows
what a field means.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NoReturn

from repository.errors import ConfigError
from repository.folder.schema import Layer
from repository.snapshot import Problem


class Page:
    """`message`: the ModelConfig. `files`: of the model's newest version, relative to its folder."""

    def __init__(
        self,
        message: Any,
        *,
        model: str,
        source: str,
        lines: dict[str, int],
        files: Collection[str] = (),
    ) -> None:
        self.message = message
        self.model = model
        self.files = files
        self.values: dict[str, Any] = {}
        self._source = source
        self._lines = lines
        self._places: dict[str, int] = {}  # our keys -> line
        self._warnings: list[Problem] = []

    def layer(self) -> Layer:
        return Layer(self._source, self.values, self._places, tuple(self._warnings))

    def has(self, key: str) -> bool:
        """It was written, if only with its default."""
        return key in self._lines

    def set(self, key: str, value: Any, theirs: str) -> None:
        """`theirs`: the key that says so, dotted, with numbers: "instance_group.0.count"."""
        self.values[key] = value
        self.place(key, theirs)

    def place(self, ours: str, theirs: str) -> None:
        key = theirs
        while key and key not in self._lines:
            key = key.rpartition(".")[0]
        if key:
            self._places[ours] = self._lines[key]

    def warn(self, key: str, message: str, hint: str = "remove it if you can do without") -> None:
        self._warnings.append(Problem(self._where(key), "config", message, hint, warning=True))

    def fail(self, key: str, message: str, hint: str = "") -> NoReturn:
        raise ConfigError(message, where=self._where(key), hint=hint)

    def _where(self, key: str) -> str:
        return Layer(self._source, {}, self._lines).place(key)
