"""`pb_utils.Logger`: lines on the worker's standard error, in the form of the server's log."""

from __future__ import annotations

import enum
import sys
import time
from typing import ClassVar


class LogLevel(enum.IntEnum):
    INFO = 0
    WARNING = 1
    ERROR = 2
    VERBOSE = 3


_Level = LogLevel  # Logger has one of its own of that name


class Logger:
    """Used as it is, without an instance. `model` is set in the class that a model gets; `verbose`:
    whether what is told at length is shown."""

    LogLevel: ClassVar[type[LogLevel]] = LogLevel
    INFO: ClassVar = LogLevel.INFO
    WARNING: ClassVar = LogLevel.WARNING
    ERROR: ClassVar = LogLevel.ERROR
    VERBOSE: ClassVar = LogLevel.VERBOSE
    model: ClassVar[str] = ""
    verbose: ClassVar[bool] = False

    @classmethod
    def log(cls, message: str, level: _Level = _Level.INFO) -> None:
        """What goes over several lines is set in, so that it is one entry."""
        if level == LogLevel.VERBOSE and not cls.verbose:
            return
        now = time.time()
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
        text = str(message).replace("\n", "\n    ")
        sys.stderr.write(
            f"{at}.{int(now % 1 * 1000):03d}Z {LogLevel(level).name:<7} model.{cls.model}: {text}\n"
        )

    @classmethod
    def log_info(cls, message: str) -> None:
        cls.log(message, LogLevel.INFO)

    @classmethod
    def log_warn(cls, message: str) -> None:
        cls.log(message, LogLevel.WARNING)

    @classmethod
    def log_error(cls, message: str) -> None:
        cls.log(message, LogLevel.ERROR)

    @classmethod
    def log_verbose(cls, message: str) -> None:
        cls.log(message, LogLevel.VERBOSE)
