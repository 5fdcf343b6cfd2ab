"""Requests that wait for a model to serve: who they are, in which order, and for how long.

    join → (the model loads) → grant: all of them, in the breath in which it is READY
      ├── its time is over    → StillLoadingError, with when to come again
      ├── nothing can come    → the error that says so
      └── its client leaves   → out at once

Rules: one load for all who wait for a model. A grant is a lease that has begun already, so that nobody
can take the model away between being told and asking. Whoever is done or cancelled is out, and of a
model that nobody waits for any more the owner hears (`deserted`). It starts no load and knows no plan.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, KeysView
from typing import Any

from repository.errors import DrainingError, QueueFullError, RepositoryError, StillLoadingError
from repository.lifecycle.generation import Generation, Lease

Take = Callable[[Lease], None]


class Waiter(asyncio.Future[None]):
    """One request. `name`: as it called the model. `take` is given the lease, and must not raise."""

    __slots__ = ("demand", "model", "name", "take", "timer", "version")

    demand: Demand
    model: str
    name: str
    version: int | None
    take: Take
    timer: asyncio.TimerHandle

    def cancel(self, msg: Any | None = None) -> bool:
        """Its client has left."""
        cancelled = super().cancel(msg)
        if cancelled:
            self.demand.leave(self)
        return cancelled


class Demand:
    """`most`: requests that may wait for one model; `patience_s`: how long each of them may."""

    def __init__(self, *, most: int = 256, patience_s: float = 60.0) -> None:
        self.most = most
        self.patience_s = patience_s
        self.deserted: Callable[[str], None] = lambda model: None
        self._waiting: dict[str, dict[Waiter, None]] = {}
        self._since: dict[str, float] = {}  # model -> when the first came of those who wait
        self._took: dict[str, float] = {}  # model -> how long they waited for it the last time

    @property
    def models(self) -> KeysView[str]:
        """Those that somebody waits for."""
        return self._waiting.keys()

    def count(self, model: str) -> int:
        return len(self._waiting.get(model, ()))

    def join(self, model: str, name: str, version: int | None, take: Take) -> Waiter:
        """Raises QueueFullError."""
        waiting = self._waiting.get(model, {})
        if len(waiting) >= self.most:
            raise QueueFullError(
                f"{len(waiting)} requests wait for model '{name}' to load, and no more may "
                f"(--demand-queue); ask again later",
                retry_after_s=self.soon_s(model),
            )
        loop = asyncio.get_running_loop()
        waiter = Waiter(loop=loop)
        waiter.demand, waiter.model, waiter.name = self, model, name
        waiter.version, waiter.take = version, take
        waiter.timer = loop.call_later(self.patience_s, self._too_late, waiter)
        self._waiting.setdefault(model, {})[waiter] = None
        self._since.setdefault(model, loop.time())
        return waiter

    def grant(self, model: str, find: Callable[[str, int | None], Generation | None]) -> None:
        """Something of it serves: a lease for each who can have one, first come, first served."""
        found: list[Waiter] = []
        for waiter in self._waiting.get(model, ()):
            gen = find(model, waiter.version)
            if gen is not None:
                lease = gen.lease()
                lease.begin()
                waiter.take(lease)
                found.append(waiter)
        if found:
            self._took[model] = asyncio.get_running_loop().time() - self._since[model]
        for waiter in found:
            self._out(waiter)
            waiter.set_result(None)

    def let_down(
        self, model: str, why: Callable[[str, int | None], RepositoryError | None]
    ) -> None:
        """`why`: what to tell who waits for this in vain; None: nothing yet."""
        asked: dict[tuple[str, int | None], RepositoryError | None] = {}
        for waiter in list(self._waiting.get(model, ())):
            key = (waiter.name, waiter.version)
            if key not in asked:
                asked[key] = why(*key)
            error = asked[key]
            if error is not None:
                self._tell(waiter, copy.copy(error))  # one for each: it collects tracebacks

    def close(self) -> None:
        """The server is going down: nobody waits any longer."""
        for waiter in [w for waiting in self._waiting.values() for w in waiting]:
            self._tell(waiter, DrainingError("the server is shutting down", retry_after_s=5.0))

    def forget(self, model: str) -> None:
        """Its folder is gone, and nothing of it is left."""
        self._took.pop(model, None)

    def soon_s(self, model: str) -> float:
        """When it may serve, as far as can be told: after as long as the last time; else, or when
        that has passed, it may well take as long again as it has taken until now."""
        since = self._since.get(model)
        waited_s = 0.0 if since is None else asyncio.get_running_loop().time() - since
        rest_s = self._took.get(model, 0.0) - waited_s
        return max(1.0, rest_s if rest_s > 0 else min(waited_s, self.patience_s))

    def leave(self, waiter: Waiter) -> None:
        self._out(waiter)
        if waiter.model not in self._waiting:
            self.deserted(waiter.model)

    def _too_late(self, waiter: Waiter) -> None:
        self._tell(
            waiter,
            StillLoadingError(
                f"model '{waiter.name}' did not serve within the {self.patience_s:g} s that a "
                f"request may wait for it (--demand-timeout); ask again later",
                retry_after_s=self.soon_s(waiter.model),
            ),
        )

    def _tell(self, waiter: Waiter, error: RepositoryError) -> None:
        waiter.set_exception(error)
        self.leave(waiter)

    def _out(self, waiter: Waiter) -> None:
        waiter.timer.cancel()
        waiting = self._waiting[waiter.model]
        del waiting[waiter]
        if not waiting:
            del self._waiting[waiter.model]
            del self._since[waiter.model]
