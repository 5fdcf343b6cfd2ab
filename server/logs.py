"""How log lines look: one line each, text for people or JSON for machines, on standard error."""

from __future__ import annotations

import logging
import sys
import time
from functools import lru_cache

import msgspec

NOISY = ("uvicorn", "uvicorn.error", "asyncio", "httpx", "watchfiles")


class TextLines(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        return f"{_to_the_millisecond(record.created)}Z"


class JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "at": f"{_to_the_millisecond(record.created)}+00:00",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def _to_the_millisecond(at: float) -> str:
    """ISO 8601 in UTC, without the zone."""
    return f"{_to_the_second(int(at))}.{int(at % 1 * 1000):03d}"


@lru_cache(maxsize=4)
def _to_the_second(at: int) -> str:
    """A busy second has many lines, and half the price of a line was its date."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at))


def set_up(format: str, level: str) -> None:
    """For the whole process. What libraries say of their routine is left out."""
    # Nobody is shown them, and each is looked up for each line.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if format == "json" else TextLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in NOISY:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
