"""Flags of `tritonserver` that `modeldepot serve` takes beside its own, so that a command line of theirs
starts this server too.

    --strict-readiness=false       any flag of ours that is on or off, with a value
    --log-verbose=1                ours is called otherwise
    --backend-directory=/x         means nothing here: taken, and told in the log

A flag that neither of us knows is an error, and so is one that would be wrong to pass over: those that
encrypt, and those that hide a port. Other spellings (`--http-port`) are rows of the settings' table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, get_type_hints

import click

from server.settings import Settings

YES, NO = ("true", "1", "yes", "on"), ("false", "0", "no", "off")
SWITCHES = frozenset(
    name.replace("_", "-") for name, kind in get_type_hints(Settings).items() if kind is bool
)
# Theirs -> ours.
RENAMED = {
    "model-store": "model-repository",
    "strict-model-config": "disable-auto-complete-config",
}
LOGS = {"log-info": "warning", "log-warning": "error"}  # switched off: the least that is logged
UNUSED = frozenset({
    "allow-cpu-metrics", "allow-gpu-metrics", "allow-metrics", "backend-config", "backend-directory",
    "buffer-manager-thread-count", "cache-directory", "cuda-memory-pool-byte-size",
    "cuda-virtual-address-size", "enable-peer-access", "grpc-infer-allocation-pool-size",
    "grpc-infer-thread-count", "host-policy", "http-thread-count", "id", "log-error", "log-file",
    "metrics-config", "metrics-interval-ms", "min-supported-compute-capability",
    "model-load-gpu-limit", "model-namespacing", "pinned-memory-pool-byte-size", "rate-limit",
    "rate-limit-resource", "repoagent-directory",
})  # fmt: skip
THEIR_LOG_FORMATS = ("default", "ISO8601")


class Read(NamedTuple):
    """`args` as click takes them; `unused` as they were given."""

    args: list[str]
    unused: list[str]


def translated(args: Sequence[str]) -> Read:
    """Raises click.UsageError."""
    read, levels = Read([], []), set[str]()
    words = list(args)
    while words:
        word = words.pop(0)
        if word == "--":
            read.args.extend([word, *words])
            break
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            read.args.append(word)
            continue
        name = RENAMED.get(name, name)
        if name in SWITCHES:
            value = value if equals else _next(words, (YES[0], NO[0]))
            read.args.append(_switch(name, value))
        elif name in UNUSED:
            if not equals:
                _next(words)
            read.unused.append(word)
        elif name in LOGS or name in ("log-verbose", "allow-http"):
            levels |= _level(name, value if equals else _next(words) or "true")
        elif name == "log-format" and (equals and value) in THEIR_LOG_FORMATS:
            read.unused.append(word)
        else:
            read.args.append(_ours(name, equals, value, words))
    if levels and not any(arg.startswith("--log-level") for arg in read.args):
        least = next(level for level in ("debug", "error", "warning") if level in levels)
        read.args[:0] = ["--log-level", least]
    return read


def _next(words: list[str], only: Sequence[str] = ()) -> str:
    """The value of a flag that was given without "="; "" if the next word is none."""
    if not words or words[0].startswith("-") or (only and words[0] not in only):
        return ""
    return words.pop(0)


def _switch(name: str, value: str) -> str:
    if not value or value.lower() in YES:
        return f"--{name}"
    if value.lower() in NO:
        return f"--no-{name}"
    raise click.UsageError(f"--{name}: must be true or false, not '{value}'")


def _ours(name: str, equals: str, value: str, words: list[str]) -> str:
    if name == "cache-config":
        return _cache(value if equals else _next(words))
    return f"--{name}{equals}{value}"


def _cache(value: str) -> str:
    """ "local,size=N", of the caches that they have."""
    which, _, said = value.partition(",")
    key, _, size = said.partition("=")
    if which != "local":
        raise click.UsageError(
            f"--cache-config: the only cache of this server is 'local', not '{which}'; say "
            "local,size=BYTES"
        )
    if key.strip() != "size" or not size:
        raise click.UsageError(f"--cache-config: must be local,size=BYTES, not '{value}'")
    return f"--response-cache-size={size}"


def _level(name: str, value: str) -> set[str]:
    """The least level that is logged, as one flag has it."""
    if name == "log-verbose":
        if not value.isdecimal() and value.lower() not in (*YES, *NO):
            raise click.UsageError(f"--log-verbose: must be a number, not '{value}'")
        return set() if value in ("0", *NO) else {"debug"}
    off = _switch(name, value).startswith("--no-")
    if off and name == "allow-http":
        raise click.UsageError("--allow-http=false: this server always answers HTTP")
    return {LOGS[name]} if off and name in LOGS else set()
