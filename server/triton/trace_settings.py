"""What is traced: Triton's settings, of the server and of single models. Plain values, no files.

A setting that a model does not have for itself is the server's; one that was cleared for the server is
that of its start. As Triton shows them, all values are texts, but for the list of levels.

Rules: an update is taken whole or not at all; which requests are traced depends on their number alone,
so that a run can be repeated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from repository.errors import ConfigError, InvalidRequestError
from server.refusals import UnsupportedError

LEVELS = ("OFF", "TIMESTAMPS", "TENSORS")
OLD_LEVELS = {"MIN": ("TIMESTAMPS",), "MAX": ("TIMESTAMPS",)}  # as older clients say it
MODES = ("triton", "opentelemetry")
FLAG = "--trace-config"
FROM_THE_START = ("trace_file", "trace_mode")
MOST = 2**32 - 1


@dataclass(frozen=True, slots=True)
class Own:
    """What somebody said; None: nothing, so that of the next wider one holds.

    level       () is off; of TIMESTAMPS and TENSORS those that are wanted
    rate        one of so many requests is traced
    count       how many will be; -1: any number
    log_frequency   traces per file; 0: one file for all
    """

    level: tuple[str, ...] | None = None
    rate: int | None = None
    count: int | None = None
    log_frequency: int | None = None


@dataclass(frozen=True, slots=True)
class Start:
    """What the flags say, which nobody changes later."""

    own: Own = Own((), 1000, -1, 0)
    mode: str = "triton"
    file: str = ""
    url: str = ""
    resource: Mapping[str, str] = field(default_factory=dict)


KEYS = {
    "trace_level": "level",
    "trace_rate": "rate",
    "trace_count": "count",
    "log_frequency": "log_frequency",
}


def over(said: Own, under: Own) -> Own:
    """`said`, and where it says nothing `under`."""
    gaps = {k: getattr(under, k) for k in KEYS.values() if getattr(said, k) is None}
    return replace(said, **gaps)


def shown(own: Own, start: Start) -> dict[str, Any]:
    """As Triton answers. `own` is whole."""
    return {
        "trace_level": list(own.level or ("OFF",)),
        "trace_rate": str(own.rate),
        "trace_count": str(own.count),
        "log_frequency": str(own.log_frequency),
        "trace_file": start.file,
        "trace_mode": start.mode,
    }


def updated(own: Own, said: Mapping[str, Any]) -> Own:
    """null clears. Raises InvalidRequestError, UnsupportedError."""
    changes: dict[str, Any] = {}
    for key, value in said.items():
        if key in FROM_THE_START:
            what = "file location" if key == "trace_file" else "mode"
            raise UnsupportedError(
                f"trace {what} can not be updated through network protocol; it is said at the start, "
                f"with {FLAG}"
            )
        if key not in KEYS:
            raise InvalidRequestError(
                f"unknown trace setting '{key[:60]}'; there are {', '.join(KEYS)}"
            )
        changes[KEYS[key]] = None if value is None else _read(key, value)
    return replace(own, **changes)


def _read(key: str, value: Any) -> Any:
    if key == "trace_level":
        return _levels(value)
    least = -1 if key == "trace_count" else 0
    if isinstance(value, list) and len(value) == 1:
        value = value[0]  # gRPC's settings are lists
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    try:
        number = int(text) if isinstance(text, str) and text.isascii() else None
    except ValueError:
        number = None
    if number is None or not least <= number <= MOST:
        raise InvalidRequestError(f"Unable to parse '{key}', got: {str(value)[:60]}")
    return number


def _levels(value: Any) -> tuple[str, ...]:
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list) or not words or not all(isinstance(w, str) for w in words):
        raise InvalidRequestError("'trace_level' must be a list of texts")
    found: list[str] = []
    for word in words:
        if word in OLD_LEVELS:
            found += OLD_LEVELS[word]
        elif word in LEVELS:
            found.append(word)
        else:
            raise InvalidRequestError(
                f"Unable to parse 'trace_level', got: {word[:60]}; there are {', '.join(LEVELS)}"
            )
    if "OFF" in found:
        if len(set(found)) > 1:
            raise InvalidRequestError("'trace_level' OFF stands alone")
        return ()
    return tuple(dict.fromkeys(found))


def start_of(texts: Iterable[str]) -> Start:
    """From the flag's texts: "rate=1", "level=TIMESTAMPS", "count=100", "mode=opentelemetry",
    "triton,file=/tmp/trace.jsonl", "triton,log-frequency=50", "opentelemetry,url=http://...",
    "opentelemetry,resource=service.name=depot". Raises ConfigError."""
    own, start = Own(), Start()
    levels: list[str] = []
    resource: dict[str, str] = {}
    for text in texts:
        head, comma, rest = text.partition(",")
        mode, said = (head, rest) if comma and head in MODES else ("", text)
        key, equals, value = said.partition("=")
        if not equals or not key:
            raise ConfigError("must look like KEY=VALUE or MODE,KEY=VALUE", where=FLAG)
        key = key.replace("-", "_")
        try:
            if key == "level" and mode != "opentelemetry":
                levels.append(value)
                own = replace(own, level=_levels(list(levels)))
            elif key in ("rate", "count", "log_frequency") and mode != "opentelemetry":
                name = key if key == "log_frequency" else f"trace_{key}"
                own = replace(own, **{key: _read(name, value)})
            else:
                start = _of_start(start, mode, key, value, resource)
        except InvalidRequestError as error:
            raise ConfigError(str(error), where=FLAG) from error
    return replace(start, own=over(own, start.own), resource=resource)


def _of_start(start: Start, mode: str, key: str, value: str, resource: dict[str, str]) -> Start:
    if key == "mode" and not mode:
        if value not in MODES:
            raise ConfigError(f"mode must be one of {', '.join(MODES)}", where=FLAG)
        return replace(start, mode=value)
    if key == "file" and mode != "opentelemetry":
        return replace(start, file=value)
    if mode == "opentelemetry" and key == "url":
        return replace(start, url=value)
    if mode == "opentelemetry" and key == "resource":
        name, equals, said = value.partition("=")
        if not equals or not name:
            raise ConfigError("a resource must look like resource=KEY=VALUE", where=FLAG)
        resource[name] = said
        return start
    raise ConfigError(
        f"there is no '{f'{mode},' if mode else ''}{key[:60]}'; there are level, rate, count, mode, "
        "triton,file triton,log-frequency opentelemetry,url and opentelemetry,resource",
        where=FLAG,
    )
