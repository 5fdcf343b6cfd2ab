"""What a model, an alias, an adapter or a version may be called, and where a path may lie: only here.

An allow-list: whatever is not named here is refused, so that a name is the same text in a URL, on
the disk, in a metric's label and in a log. A name that has passed may be joined to the repository's
folder; `contain` then still follows the links.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from repository.errors import InvalidNameError

MAX_NAME = 200  # characters: as file names, labels and log lines bear it
MAX_SEGMENTS = 8
MAX_VERSION = 2**31 - 1

_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+@=-]*")
_VERSION = re.compile(r"[1-9][0-9]{0,9}")

# /v1/models/status, /v2/models/stats: these addresses are taken.
RESERVED_NAMES = frozenset(
    {"status", "load", "unload", "unload-all", "sleep", "wake", "pin", "stats"}
)
# /v2/models/A/B/versions/1/infer must not be the model "A/B/versions/1".
RESERVED_SEGMENTS = frozenset(
    {"versions", "infer", "ready", "config", "stats", "generate", "generate_stream", "trace"}
)

# /models/M/adapters/adapters are the adapters of the model "M/adapters".
RESERVED_ADAPTERS = frozenset({"adapters"})


def check_name(name: str) -> str:
    """The name itself. Raises InvalidNameError, which says what is allowed.

    Segments of letters, digits and _ . + @ = - joined by '/'. A segment may be a number
    ("ViT-L/14"); a whole name may not: it could not be told from a version folder.
    """
    reason = _refusal(name)
    if reason:
        raise InvalidNameError(f"invalid model name '{shown(name)}': {reason}")
    return name


def check_adapter_name(name: str) -> str:
    """The name itself: one segment, as of a model's name. Raises InvalidNameError."""
    if name in RESERVED_ADAPTERS:
        raise InvalidNameError(f"invalid adapter name '{name}': the server's own addresses use it")
    if len(name) <= MAX_NAME and _SEGMENT.fullmatch(name):
        return name
    raise InvalidNameError(
        f"invalid adapter name '{shown(name)}': it begins with a letter, a digit or '_' and goes on "
        f"with these or any of '. + @ = -', at most {MAX_NAME} characters"
    )


def check_version(text: str) -> int:
    """A positive number without leading zeros. Raises InvalidNameError."""
    if _VERSION.fullmatch(text) and int(text) <= MAX_VERSION:
        return int(text)
    raise InvalidNameError(
        f"invalid version '{shown(text)}': a version is a whole number from 1 to {MAX_VERSION} "
        "without leading zeros"
    )


def contain(root: Path, path: Path) -> Path:
    """`path` with all links followed. Raises InvalidNameError unless it lies in `root`.

    Links that stay inside are welcome. The path need not exist.
    """
    try:
        real_root, real = os.path.realpath(root), os.path.realpath(path)
    except ValueError as error:  # a NUL in it
        raise InvalidNameError("a path holds a NUL character") from error
    if not inside(real_root, real):
        raise InvalidNameError(f"'{shown(path.name)}' leads out of the repository")
    return Path(real)


def inside(root: str, path: str) -> bool:
    """`path` is `root` or below it. Both are real paths."""
    return path == root or path.startswith(root.rstrip("/") + "/")


def shown(text: str, limit: int = 80) -> str:
    """Safe to print and to encode, whatever a client or a file system made of it."""
    if len(text) > limit:
        text = text[:limit] + "..."
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def _refusal(name: str) -> str:
    if not name:
        return "it is empty"
    if len(name) > MAX_NAME:
        return f"it has {len(name)} characters, at most {MAX_NAME} are allowed"
    segments = name.split("/")
    if len(segments) > MAX_SEGMENTS:
        return f"it has {len(segments)} segments, at most {MAX_SEGMENTS} are allowed"
    if not all(_SEGMENT.fullmatch(s) for s in segments):
        return (
            "each segment begins with a letter, a digit or '_' and goes on with these or any of "
            "'. + @ = -'; segments are joined by '/'"
        )
    if name.isdecimal():
        return "a number alone is a version folder, not a model"
    if name in RESERVED_NAMES:
        return "the server's own addresses use it"
    taken = RESERVED_SEGMENTS.intersection(segments) if len(segments) > 1 else ()
    if taken:
        return f"'{min(taken)}' inside a nested name is part of the server's own addresses"
    return ""
