"""KServe V2's model addresses: /v2/models/NAME[/versions/N][/VERB].

Names may hold '/', so an address is read from the right. A path arrives decoded: %2F is a '/', and
whether a name may be a name is for `repository.names` to say.
"""

from __future__ import annotations

from typing import NamedTuple

PREFIX = "/v2/models/"
INFER = "/infer"
VERSIONS = "/versions/"
LONGEST_VERSION = 18  # digits


class Route(NamedTuple):
    """`version`: None means the highest that serves."""

    model: str
    version: int | None


def route_of(path: str) -> Route | None:
    """Of POST .../infer; None for any other path."""
    return model_of(path, INFER)


def model_of(path: str, verb: str = "") -> Route | None:
    """What lies between PREFIX and `verb` ("/infer", "/ready", or "" for the model itself)."""
    if not path.startswith(PREFIX) or not path.endswith(verb):
        return None
    name = path[len(PREFIX) : len(path) - len(verb)]
    version: int | None = None
    if VERSIONS in name:
        head, _, number = name.rpartition(VERSIONS)
        if number.isascii() and number.isdigit() and len(number) <= LONGEST_VERSION:
            name, version = head, int(number)
    return Route(name, version) if name else None
