"""What is logged, as Triton's /v2/logging shows and changes it: while the server runs, for all of it.

Our lines always have times in ISO 8601, so that both of Triton's formats look the same here; where they
go is said at the start alone. So is whether there is an audit log: who changes something here cannot
keep that, or what is done next, out of it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from repository.errors import InvalidRequestError, UnavailableError
from server.refusals import UnsupportedError

AUDIT = "modeldepot.audit"
FORMATS = ("default", "ISO8601")
SWITCHES = {
    "log_info": logging.INFO,
    "log_warning": logging.WARNING,
    "log_error": logging.ERROR,
}
MOST_VERBOSE = 2**32 - 1


class _Switch(logging.Filter):
    """Lets through what is switched on. What is worse than an error counts as one."""

    def __init__(self, on: dict[str, bool], audit: str) -> None:
        super().__init__()
        self._on = on
        self._audit = audit

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.INFO or record.name == self._audit:
            return True  # the loggers' own level decides
        level = min(record.levelno, logging.ERROR)
        return next((self._on[name] for name, n in SWITCHES.items() if level <= n), True)


class LogSettings:
    """Of the root logger, as it is when this is made; nothing of it is touched before the first
    `update`, and `undo` leaves it as it was."""

    def __init__(self, root: logging.Logger | None = None) -> None:
        self._root = root or logging.getLogger()
        self._level = self._root.level  # of the start: what "not verbose" goes back to
        self._format = FORMATS[0]
        self._verbose = 1 if self._level <= logging.DEBUG else 0
        self._on = {name: self._level <= level for name, level in SWITCHES.items()}
        self._audit = self._root.getChild(AUDIT)
        self._switch = _Switch(self._on, self._audit.name)
        self._handlers: list[logging.Handler] = []  # that have the switch
        self._audit_level = self._audit.level

    def undo(self) -> None:
        handlers, self._handlers = self._handlers, []
        for handler in handlers:
            handler.removeFilter(self._switch)
        if handlers:
            self._root.setLevel(self._level)
            self._audit.setLevel(self._audit_level)

    def shown(self) -> dict[str, Any]:
        """As Triton answers GET /v2/logging."""
        return {
            "log_file": "",
            **self._on,
            "log_verbose_level": self._verbose,
            "log_format": self._format,
        }

    def update(self, said: Mapping[str, Any]) -> dict[str, Any]:
        """All of it or nothing; what is shown now. Raises InvalidRequestError, UnsupportedError for
        log_file, UnavailableError for a format that there is not."""
        for key, value in said.items():
            _check(key, value)
        for name in SWITCHES:
            if name in said:
                self._on[name] = said[name]
        self._verbose = said.get("log_verbose_level", self._verbose)
        self._format = said.get("log_format", self._format)
        self._apply()
        return self.shown()

    def _apply(self) -> None:
        if not self._handlers:
            self._handlers = list(self._root.handlers)
            for handler in self._handlers:
                handler.addFilter(self._switch)
            self._audit.setLevel(self._audit_level or self._level)
        wanted = [level for name, level in SWITCHES.items() if self._on[name]]
        least = min(wanted, default=logging.CRITICAL)
        self._root.setLevel(logging.DEBUG if self._verbose else least)


def _check(key: str, value: Any) -> None:
    if key == "log_file":
        if value:
            raise UnsupportedError("log file location can not be updated through network protocol")
    elif key in SWITCHES:
        if not isinstance(value, bool):
            raise InvalidRequestError(f"'{key}' must be true or false")
    elif key == "log_verbose_level":
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST_VERBOSE:
            raise InvalidRequestError(f"'{key}' must be a whole number, 0 or more")
    elif key == "log_format":
        if value not in FORMATS:
            raise UnavailableError(f"'{key}' must be one of {', '.join(FORMATS)}")
    else:
        known = ", ".join(("log_file", *SWITCHES, "log_verbose_level", "log_format"))
        raise InvalidRequestError(f"unknown log setting '{key[:60]}'; there are {known}")
