"""Keeps the picture of the repository's folder fresh: scan, settle, tell; again when poked.

Level, not edge: whatever pokes (inotify, a timer, an API call) only makes it look again; what is told
is always a whole settled snapshot. Scans run in one thread of their own, one at a time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from repository.errors import ModelNotReadyError
from repository.folder.scan import Scanner
from repository.folder.settle import Settled, Settler
from repository.folder.watch import Watcher
from repository.observer import Observer
from repository.snapshot import Snapshot

log = logging.getLogger("modeldepot.folder")

BREATH = (
    5.0  # after a scan that took t, the next poke is heard after BREATH * t: at most 1/6 of a core
)


class Lookout:
    """`tell` gets every settled snapshot; it is called on the loop and must not wait."""

    def __init__(
        self,
        scanner: Scanner,
        settler: Settler,
        tell: Callable[[Snapshot], None],
        observer: Observer,
        *,
        settle_s: float,
    ) -> None:
        self._scanner = scanner
        self._settler = settler
        self._tell = tell
        self._observer = observer
        self._settle_s = settle_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="scan")
        self._accepted = Snapshot()
        self._poked = asyncio.Event()
        self._took_s = 0.0

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    async def look(self) -> Settled:
        """One whole scan. Raises OSError if the repository itself cannot be read."""
        began = time.perf_counter()
        loop = asyncio.get_running_loop()
        snapshot = await loop.run_in_executor(self._thread, self._scanner.scan)
        self._took_s = time.perf_counter() - began
        self._observer.scanned(self._took_s, len(snapshot.models))
        settled = self._settler.offer(snapshot, time.time())
        before, self._accepted = self._accepted, settled.snapshot
        for name in settled.changed:
            self._observer.watched(_action(name, before, settled.snapshot), name)
        if settled.look_again_s is not None:
            self._observer.watched("settling", "")
        self._tell(settled.snapshot)
        return settled

    async def fresh(self, model: str) -> None:
        """Returns when what is known of `model` is what lies in its folder now, settled.

        Raises ModelNotReadyError if its files do not come to rest within a few settle times.
        """
        deadline = time.monotonic() + 3 * self._settle_s + 2.0
        while True:
            loop = asyncio.get_running_loop()
            found = await loop.run_in_executor(self._thread, self._scanner.scan_model, model)
            known = self._accepted.models.get(model)
            if (found.fingerprint if found else None) == (known.fingerprint if known else None):
                return
            settled = await self.look()
            if settled.look_again_s is None or model in settled.changed:
                return
            if time.monotonic() >= deadline:
                raise ModelNotReadyError(
                    f"the files of '{model}' are still being written; ask again when they are done",
                    retry_after_s=self._settle_s,
                )
            await asyncio.sleep(settled.look_again_s)

    async def settle(self, limit_s: float) -> None:
        """Looks until nothing is in motion any more, at most `limit_s`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while True:
                    settled = await self.look()
                    if settled.look_again_s is None:
                        return
                    await asyncio.sleep(settled.look_again_s)

    async def watch(self, watcher: Watcher) -> None:
        """Looks after every poke, and again while something has not settled. Runs until cancelled."""
        listening = asyncio.create_task(self._listen(watcher), name="watch")
        listening.add_done_callback(self._deaf)
        self._observer.watcher(True)
        again_s: float | None = 0.0
        try:
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout(again_s):
                        await self._poked.wait()
                await asyncio.sleep(BREATH * self._took_s)
                self._poked.clear()
                again_s = await self._look_or_say_why()
        finally:
            listening.cancel()
            await asyncio.wait([listening])
            self._observer.watcher(False)

    async def _look_or_say_why(self) -> float | None:
        try:
            return (await self.look()).look_again_s
        except OSError as error:
            # What serves goes on serving: a repository that cannot be read is not an empty one.
            log.error("the repository cannot be read: %s; trying again", error.strerror or error)
            self._observer.watched("ignored", "")
            return max(self._settle_s, 1.0)

    async def _listen(self, watcher: Watcher) -> None:
        async for _ in watcher.pokes():
            self._poked.set()

    def _deaf(self, listening: asyncio.Task[None]) -> None:
        if not listening.cancelled():
            self._observer.watcher(False)
            log.error("the watcher stopped: %r; changes are not seen", listening.exception())


def _action(name: str, before: Snapshot, after: Snapshot) -> str:
    if name not in after.models:
        return "deleted"
    return "modified" if name in before.models else "added"
