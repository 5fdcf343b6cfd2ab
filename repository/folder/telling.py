"""What is wrong with a model's folder while it is put together: noted once, with its place.

Also how its own small files are read, as whatever is wrong with them ends here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from repository.errors import ConfigError, InvalidNameError
from repository.folder.aphrodite import REQUEST
from repository.folder.layout import Found
from repository.folder.opening import open_inside
from repository.folder.read_yaml import MAX_SIZE
from repository.names import contain
from repository.snapshot import Problem


class ToldError(Exception):
    """A version, or the model, cannot be served, and why is among the problems already."""


class Telling:
    def __init__(self, found: Found, root: Path) -> None:
        self._found, self._root = found, root
        self._problems = list(found.notes)

    def _one_of(self, names: Sequence[str]) -> str:
        """The one that is there; "" for none. Raises ToldError for several."""
        there = [s.path for s in self._found.shared if s.path in names]
        if len(there) > 1:
            self._tell("", "config", f"both {' and '.join(names)} are there", "remove one of them")
            raise ToldError
        return there[0] if there else ""

    @contextmanager
    def _reading(self, name: str) -> Iterator[bytes]:
        """The text of a file of the model's. What is wrong with it, in the block too, is told, and
        ToldError raised."""
        try:
            path = contain(self._root, Path(self._found.folder, name))
            with open(open_inside(os.path.realpath(self._root), str(path)), "rb") as file:
                text = file.read(MAX_SIZE + 1)
            yield text
        except ConfigError as error:
            self._tell(error.where or name, "config", error.message, error.hint)
            raise ToldError from error
        except InvalidNameError as error:
            self._tell(name, "link", str(error))
            raise ToldError from error
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else "it cannot be read"
            self._tell(name, "io", f"cannot be read: {reason}", "let the server's user read it")
            raise ToldError from error

    def _tell(
        self,
        where: str,
        rule: str,
        message: str,
        hint: str = "",
        version: int | None = None,
        *,
        warning: bool = False,
    ) -> None:
        if where == REQUEST:
            rule = REQUEST  # no file is to be mended
        place = f"{self._found.name}/{where}" if where else self._found.name
        self._problems.append(Problem(place, rule, message, hint, version, warning))

    def _tell_of_none(self, policy: str) -> None:
        if not self._found.versions:
            message, hint = (
                "there is no version folder and no model file",
                "add a folder 1/ with one",
            )
        else:
            message = f"no version can be served under the version policy ({policy})"
            hint = "mend the versions named above, or change 'version_policy'"
            if any(p.version is None and not p.warning for p in self._problems):
                return  # the true reason is there already
        self._tell("", "version", message, hint)
