"""Sizes in bytes, as people write and read them: "300MiB"."""

from __future__ import annotations

import re
from decimal import Decimal

from repository.errors import ConfigError

UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([A-Za-z]{0,3})")
MAX_BYTES = 2**62


def parse_bytes(text: str) -> int:
    """ "2GiB", "1.5 GB", "4096" as a number of bytes. Raises ConfigError."""
    found = _SIZE.fullmatch(text.strip())
    unit = UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None:
        raise ConfigError(
            f"'{text[:40]}' is not a size",
            hint="write bytes, or a number with KiB, MiB, GiB, MB, GB",
        )
    size = int(Decimal(found[1]) * unit)
    if size > MAX_BYTES:
        raise ConfigError(f"'{text[:40]}' is larger than any memory")
    return size


def human(size: int) -> str:
    """The shortest of its sort: "300MiB", "1.5GiB", "17B". Exact where one decimal is enough."""
    sign, rest = ("-", -size) if size < 0 else ("", size)
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        scale = UNITS[unit.upper()]
        if rest >= scale:
            return f"{sign}{rest / scale:.1f}".removesuffix(".0") + unit
    return f"{sign}{rest}B"
