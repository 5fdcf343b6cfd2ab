"""What a request says of the trace that it is part of, for the exemplars of a histogram.

Only what is checked comes through: the trace id of a W3C `traceparent` that says it is sampled (a trace
that nobody kept cannot be looked up), as 32 hexadecimal digits; else an `x-request-id` of at most
LONGEST_ID letters, digits, dots, dashes and underscores. With label, quotes and all either is far
below the 128 characters that OpenMetrics allows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

TRACE_PARENT, REQUEST_ID = b"traceparent", b"x-request-id"
LONGEST_ID = 64
_VERSION_0 = re.compile(rb"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_LATER = re.compile(rb"(?!ff|00)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")
_ID = re.compile(rb"[A-Za-z0-9._-]{1,%d}" % LONGEST_ID)
_NO_TRACE, _NO_PARENT = b"0" * 32, b"0" * 16


class Trace(NamedTuple):
    """`label`: trace_id or request_id; `span`: of a trace, who asked, 16 hexadecimal digits."""

    label: str
    value: str
    span: str = ""


def trace_of(headers: Iterable[tuple[bytes, bytes]]) -> Trace | None:
    """Names in lower case (ASGI). None: nothing was said, or nothing that may be shown."""
    request_id = None
    for name, value in headers:
        if name == TRACE_PARENT:
            return _sampled(value)
        if name == REQUEST_ID:
            request_id = value
    if request_id is not None and _ID.fullmatch(request_id):
        return Trace("request_id", request_id.decode())
    return None


def _sampled(parent: bytes) -> Trace | None:
    """Who sends one decides with it, also against being shown."""
    found = _VERSION_0.fullmatch(parent) or _LATER.fullmatch(parent)
    if found is None:
        return None
    trace, span, flags = found.groups()
    if trace == _NO_TRACE or span == _NO_PARENT or not int(flags, 16) & 1:
        return None
    return Trace("trace_id", trace.decode(), span.decode())
