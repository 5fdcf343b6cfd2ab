"""Adapters as DJL Serving shows them: one, and lists page by page.

The token of a page names the last adapter before it. So a page begins behind that name, whatever came
or went meanwhile, also that adapter: one that is there all the time is on exactly one page.
"""

from __future__ import annotations

import base64
import binascii
from bisect import bisect_right
from collections.abc import Sequence

import msgspec
from msgspec import UNSET, UnsetType

from repository.errors import InvalidNameError, InvalidRequestError
from repository.names import check_adapter_name
from repository.reports import AdapterView

MOST_LISTED = 100
FIRST = ("", "0")  # tokens of the first page
MARK = b"after:"  # what no text has by chance


class StatusReply(msgspec.Struct):
    status: str


class ListedAdapter(msgspec.Struct):
    name: str
    src: str
    pin: bool
    preload: bool


class AdapterList(msgspec.Struct, rename="camel"):
    """`nextPageToken` is there only where another page is."""

    adapters: list[ListedAdapter]
    next_page_token: str | UnsetType = UNSET


class DescribedAdapter(msgspec.Struct):
    """The first four as DJL has them.

    state         registered, loading, loaded, failed
    residence     where it is nearest to the model: registered (its files only), host, device; ""
                  where no worker runs
    memory_bytes  of host memory, where it is kept or would be
    origin        folder or call
    error         why it cannot be used; of a loaded one: what is wrong with its replacement
    """

    name: str
    src: str
    pin: bool
    preload: bool
    state: str
    residence: str
    memory_bytes: int
    rank: int
    origin: str
    options: dict[str, str]
    error: str | None


def described(view: AdapterView) -> DescribedAdapter:
    return DescribedAdapter(
        name=view.name,
        src=view.src,
        pin=view.pin,
        preload=view.preload,
        state=view.state,
        residence=view.residence,
        memory_bytes=view.bytes,
        rank=view.rank,
        origin=view.origin,
        options=dict(view.options),
        error=view.error or None,
    )


def page(views: Sequence[AdapterView], limit: int | None, token: str) -> AdapterList:
    """`views`: sorted by name. Raises InvalidRequestError for a token that no list gave."""
    size = limit if limit is not None and 1 <= limit <= MOST_LISTED else MOST_LISTED
    begin = 0 if token in FIRST else bisect_right(views, last_of(token), key=lambda v: v.name)
    shown = views[begin : begin + size]
    more = begin + size < len(views)
    return AdapterList(
        [ListedAdapter(v.name, v.src, v.pin, v.preload) for v in shown],
        token_of(shown[-1].name) if more else UNSET,
    )


def token_of(name: str) -> str:
    return base64.urlsafe_b64encode(MARK + name.encode()).decode().rstrip("=")


def last_of(token: str) -> str:
    """The name in a token. Raises InvalidRequestError."""
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        name = check_adapter_name(raw.removeprefix(MARK).decode("ascii"))
    except (binascii.Error, ValueError, InvalidNameError):
        name = ""
    if not name or token != token_of(name):
        raise InvalidRequestError(
            "next_page_token is none that a list has given; begin again without one"
        )
    return name
