"""How the value of one setting is read: as text or already as its type, with the folder that relative
paths start from. What is wrong with it is a ValueError, or a ConfigError, in words for its user."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from repository.sizes import parse_bytes


def text(value: Any, _: Path) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("must be a text")
    return value


def flag(value: Any, _: Path) -> bool:
    if isinstance(value, bool):
        return value
    words = {"1": True, "true": True, "yes": True, "on": True}
    words |= {"0": False, "false": False, "no": False, "off": False}
    word = str(value).strip().lower()
    if word not in words:
        raise ValueError("must be true or false")
    return words[word]


def path(value: Any, base: Path) -> Path:
    if not isinstance(value, (str, Path)) or not str(value):
        raise ValueError("must be a path")
    try:
        return base / Path(value).expanduser()
    except RuntimeError as error:
        raise ValueError("must be a path, and begins with a home folder that nobody has") from error


def names(value: Any, _: Path) -> tuple[str, ...]:
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or not all(isinstance(p, str) for p in parts):
        raise ValueError("must be a list of names")
    return tuple(p.strip() for p in parts if p.strip())


def names_whole(value: Any, _: Path) -> tuple[str, ...]:
    """As `names`, of texts that may hold commas: one, or a list of them."""
    parts = [value] if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or not all(isinstance(p, str) for p in parts):
        raise ValueError("must be a text, or a list of texts")
    return tuple(p.strip() for p in parts if p.strip())


def paths(value: Any, base: Path) -> tuple[Path, ...]:
    parts = value.split(":") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or not parts:
        raise ValueError("must be a list of paths")
    return tuple(path(part, base) for part in parts if part)


def budget(value: Any, _: Path) -> Mapping[str, int]:
    # Here and below: `serve --help` needs this table at once, and neither numpy nor psutil.
    from repository.devices.inventory import parse_budgets

    if isinstance(value, Mapping):
        value = ",".join(f"{device}={size}" for device, size in value.items())
    if not isinstance(value, str):
        raise ValueError('must look like "cpu=2GiB,cuda:0=70GiB"')
    return dict(parse_budgets(value))


def size(value: Any, _: Path) -> int:
    """ "64MiB", "1GB" or bytes."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError('must be a size, such as "64MiB"')
    return parse_bytes(str(value))


def one_of(*words: str) -> Callable[[Any, Path], str]:
    def read(value: Any, _: Path) -> str:
        word = str(value).strip().lower()
        # YAML reads a bare `off` as false.
        if value is False and "off" in words:
            word = "off"
        if word not in words:
            raise ValueError(f"must be one of {', '.join(words)}")
        return word

    return read


def number(kind: type[int] | type[float], low: float, high: float) -> Callable[[Any, Path], Any]:
    def read(value: Any, _: Path) -> int | float:
        try:
            number = kind(value)
        except (TypeError, ValueError):
            number = None
        if isinstance(value, bool) or number is None or not low <= number <= high:
            above = f"at least {low:g}" if high >= MANY else f"from {low:g} to {high:g}"
            raise ValueError(f"must be a {'whole ' if kind is int else ''}number, {above}")
        return number

    return read


MANY = 10**9
seconds = number(float, 0, MANY)


def shares(value: Any, _: Path) -> Mapping[str, float]:
    """ "0.5" of every device, or "cuda:0=0.5,cpu=0.2"."""
    if isinstance(value, Mapping):
        value = ",".join(f"{device}={share}" for device, share in value.items())
    found: dict[str, float] = {}
    for part in str(value).split(","):
        device, equals, said = (piece.strip() for piece in part.rpartition("="))
        try:
            share = float(said)
        except ValueError:
            share = -1.0
        if not 0 <= share <= 1 or bool(equals) != bool(device) or device in found:
            raise ValueError('must be a share from 0 to 1, or look like "cuda:0=0.5,cpu=0.2"')
        found[device] = share
    return found
