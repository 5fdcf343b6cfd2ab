"""A load that failed, tried again: as often as the server was told, each time from the beginning.

What will not be otherwise the next time is not tried again (files that changed, code that is not
trusted); nor is a worker's death, about which the planner decides.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from repository.errors import FilesChangedError, UntrustedCodeError, WorkerDiedError
from repository.lifecycle.status import text_of

T = TypeVar("T")

FINAL = (FilesChangedError, UntrustedCodeError, WorkerDiedError)

log = logging.getLogger("modeldepot.models")


async def at_last(
    attempt: Callable[[], Awaitable[T]],
    clear: Callable[[], Awaitable[None]],
    *,
    retries: int,
    what: str,
) -> T:
    """What the first good attempt returns; `clear` is called between two. Raises what the last did."""
    for left in range(retries, 0, -1):
        try:
            return await attempt()
        except FINAL:
            raise
        except Exception as error:  # noqa: BLE001 - the next attempt is the answer
            log.warning("%s: %s; tried again, %d more", what, text_of(error), left - 1)
            await clear()
    return await attempt()
