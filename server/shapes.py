"""How an error looks on each face: the path decides, also where no handler was reached.

What went wrong is told by `server.errors` (number, code, text); here it only gets its shape. One
renderer for each face; a face that wants other numbers or texts than the map has them here too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from server import errors
from server.codecs.aphrodite_errors import body_aphrodite
from server.codecs.djl_errors import body_djl
from server.codecs.marqo_errors import body_marqo

Body = tuple[int, Any]  # status, and what becomes JSON


class _Row(NamedTuple):
    """`path` exactly, or everything below it where it ends in "/"."""

    path: str
    body: Callable[[BaseException], Body]


def _native(error: BaseException) -> Body:
    return errors.status_of(error), errors.body_native(error)


def _v2(error: BaseException) -> Body:
    return errors.status_v2(error), {"error": errors.text_of(error)}


ROWS: tuple[_Row, ...] = (
    _Row("/v2", _v2),
    _Row("/v2/", _v2),
    _Row("/models", body_marqo),
    _Row("/device/", body_marqo),
    _Row("/models/", body_djl),
    _Row("/adapters", body_djl),
    _Row("/adapters/", body_djl),
    _Row("/v1/load_model", body_aphrodite),
    _Row("/v1/unload_model", body_aphrodite),
)


def shape(path: str, error: BaseException) -> tuple[int, bytes]:
    """The status, and the body as JSON. `path` as the router sees it."""
    for row in ROWS:
        if path == row.path or (row.path.endswith("/") and path.startswith(row.path)):
            status, body = row.body(error)
            return status, errors.encode(body)
    status, body = _native(error)
    return status, errors.encode(body)
