"""What a scan of the repository found: plain data that is compared, settled and planned from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from repository.adapters.sources import AdapterSource
from repository.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Problem:
    """Something a person should mend. Texts never hold an absolute path.

    where    path relative to the repository, with a line where there is one: "digits/config.yaml:3"
    rule     a stable word: name, config, layout, incomplete, trust, link, alias, version, io, internal
    message  what is wrong, with the numbers
    hint     what to do
    version  None: the whole model; else only that version
    warning  shown by `validate` and in the status; stops nothing
    """

    where: str
    rule: str
    message: str
    hint: str = ""
    version: int | None = None
    warning: bool = False

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" + (f" ({self.hint})" if self.hint else "")


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """One model as found. `specs` are the versions that its version policy chooses among those that
    are whole, newest first; `versions` are all version numbers that exist.

    fingerprint  of everything below the folder that counts, also of versions that are not chosen
    problems     errors before warnings
    said         what its aphrodite_config.yaml says, or the request that stands in place of it
    override     of such a request, a digest; "" where none is in force. It is no part of the
                 fingerprint, so it need not settle; the specs' own fingerprints have it
    adapters     by name; each settles by itself, so they are neither in the fingerprint nor compared
    newest_ctime when anything in it last changed, in seconds since 1970 (by the ctime of its files and
                 folders, which nobody can set back); inf where that lies in the future. Not part of
                 the fingerprint, nor compared: a chmod or a hard link changes it too
    """

    name: str
    fingerprint: str
    specs: Mapping[int, ModelSpec] = field(default_factory=lambda: MappingProxyType({}))
    versions: tuple[int, ...] = ()
    aliases: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()
    said: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    override: str = ""
    newest_ctime: float = field(default=0.0, compare=False)
    adapters: Mapping[str, AdapterSource] = field(
        default_factory=lambda: MappingProxyType({}), compare=False
    )

    @property
    def broken(self) -> bool:
        """The model as a whole cannot be served (its config, its layout)."""
        return any(p.version is None for p in self.errors)

    @property
    def errors(self) -> tuple[Problem, ...]:
        """The problems that stop something."""
        return tuple(p for p in self.problems if not p.warning)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A whole scan. `problems` are those that belong to no model."""

    models: Mapping[str, ModelFolder] = field(default_factory=lambda: MappingProxyType({}))
    problems: tuple[Problem, ...] = ()

    def hides(self, name: str) -> bool:
        """A folder above `name` could not be read, so that its absence from `models` says nothing."""
        unread = (p.where for p in self.problems if p.rule == "io")
        return any(where == "." or _lies_in(name, where) for where in unread)

    def near(self, name: str) -> Problem | None:
        """What is wrong with the folder of `name`, which is no model, with one above it, or with what
        lies in it."""
        near = (p for p in self.problems if _lies_in(name, p.where) or _lies_in(p.where, name))
        return next(near, None)


def _lies_in(path: str, folder: str) -> bool:
    return f"{path}/".startswith(f"{folder}/")
