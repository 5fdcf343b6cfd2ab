"""What the front tells its workers of adapters, and what they answer. Plain data."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

# The name of an input that no client may send: BYTES [rows], the adapter of each row ("": none).
# The front puts it behind the inputs of a request for a model that has adapters, so that requests
# for different ones share a batch.
ROW_ADAPTERS = "@adapters"

Residence: TypeAlias = Literal["registered", "host", "device"]


class AdapterFile(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A file of an adapter as it was when it was judged; `name` relative to the adapter's folder."""

    name: str
    size: int  # bytes
    mtime_ns: int
    inode: int


class AdapterOrder(msgspec.Struct, frozen=True, array_like=True):
    """One adapter to be known from now on, or no longer (`remove`: only `name` counts then).

    path         the adapter's folder; real, absolute
    files        what must still lie there when it is read; something else: it is refused
    fingerprint  of the files. A known name with another one is swapped: sequences that run keep
                 what they began with
    preload      read it into host memory now, not when it is first asked for
    pin          it gets a device slot now and keeps it
    options      what else was said at its registration, for backends of the user's own
    """

    name: str
    path: str = ""
    fingerprint: str = ""
    files: tuple[AdapterFile, ...] = ()
    preload: bool = False
    pin: bool = False
    remove: bool = False
    options: dict[str, str] = {}


class AdapterReport(msgspec.Struct, frozen=True, array_like=True):
    """What became of one order; or (asked for with no orders) where one adapter is now.

    error    "": done. Else why not, with what to do; a refused one is not known afterwards, and one
             of that name that was known before still is
    rank, bytes   of the adapter; bytes in host memory if it were there
    """

    name: str
    error: str = ""
    residence: Residence = "registered"
    rank: int = 0
    bytes: int = 0
