"""Requests that wait for their model to load, as far as the server has to do with it: for which errors
that helps, and how much memory their bodies may hold meanwhile.

Who waits, in which order and for how long, is the repository's business (`Repository.demand`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from repository.errors import ModelNotReadyError, QueueFullError, VersionNotFoundError
from repository.lifecycle.generation import Lease
from repository.repository import Repository
from repository.sizes import human

MOST_BYTES = 256 * 1024**2  # of bodies that wait, of one server
NOT_SERVING = (ModelNotReadyError, VersionNotFoundError)  # what may be changed by loading it


class WaitingRoom:
    """`held`: bytes of the bodies that wait now. One body alone is let in whatever its size."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.most_bytes = most_bytes
        self.held = 0

    def enter(
        self,
        models: Repository,
        error: Exception,
        model: str,
        version: int | None,
        *,
        size: int,
        take: Callable[[Lease], None],
    ) -> asyncio.Future[None] | None:
        """For a request that was refused a lease with `error`: as `Repository.demand`, which tells
        `take`. None: nothing is loaded for such an error. Raises what the request is to be refused
        with instead."""
        if not isinstance(error, NOT_SERVING) or not models.loads_on_request(model):
            return None  # not raised again: that would tie the error to its own traceback
        if self.held and self.held + size > self.most_bytes:
            raise QueueFullError(
                f"requests with {human(self.held)} wait for models to load, and no more than "
                f"{human(self.most_bytes)} may; ask again later",
                retry_after_s=1.0,
            )
        waiter = models.demand(model, version, take)
        self.held += size
        waiter.add_done_callback(lambda _: self._leave(size))
        return waiter

    def _leave(self, size: int) -> None:
        self.held -= size
