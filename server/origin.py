"""Keeps web pages away from a server on loopback that asks nobody for a key.

A browser reaches 127.0.0.1 for whatever page it shows. Such a page could unload every model with a
form, and, under a name of its own that it lets lead to 127.0.0.1, read every answer. So a request must
name this machine as its host, and come from no page of another site. Programs send no Origin.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from functools import lru_cache

from server.errors import ForbiddenError

WAY_OUT = "ask for keys (--api-keys), or say --insecure if something in front of the server does"


def check_origin(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Names in lower case (ASGI). Raises ForbiddenError."""
    host, origin = b"", None
    for name, value in headers:
        if name == b"host":
            host = value
        elif name == b"origin":
            origin = value
    if not is_here(host):
        raise ForbiddenError(f"without API keys only this machine's own names lead here; {WAY_OUT}")
    if origin is not None and origin.lower().partition(b"://")[2] != host.lower():
        raise ForbiddenError(
            f"without API keys a page of another site may not use this server; {WAY_OUT}"
        )


@lru_cache(64)
def is_here(host: bytes) -> bool:
    """Whether no stranger can own this name: an address, localhost, or a name without a dot."""
    name = host.decode("latin-1").lower()
    name = name.partition("]")[0][1:] if name.startswith("[") else name.partition(":")[0]
    if "." not in name or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
