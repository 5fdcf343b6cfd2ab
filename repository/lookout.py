"""Keeps the picture of the repository's folder fresh: scan, settle, tell; again when poked.

Level, not edge: whatever pokes (inotify, a timer, an API call) only makes it look again; what is told
is always a whole settled snapshot. Scans run in one thread of their own, one at a time; all who ask
for one while another runs share the next.

Where nobody watches, only what somebody asked about moves on: an order for one model does not make
another follow its files.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType

from repository.errors import ModelNotReadyError
from repository.folder.mounts import ByCall
from repository.folder.scan import Scanner
from repository.folder.settle import Settled, Settler
from repository.folder.watch import Watcher
from repository.observer import Observer
from repository.snapshot import ModelFolder, Snapshot

log = logging.getLogger("modeldepot.folder")

# After a scan that took t, the next poke is heard after BREATH * t: at most 1/6 of a core.
BREATH = 5.0
DEAF_S = 10.0  # between looks where the watcher itself has failed
TOLD_WITHIN_S = 1.0  # of a change; an event that has not come by then does not come any more


class Lookout:
    """`tell` gets every settled snapshot; it is called on the loop and must not wait. `follows`:
    somebody watches, so that all of a snapshot may be told whoever asked for it. `mounts_s`: between
    looks while there are mounted folders, which no watcher sees."""

    def __init__(
        self,
        scanner: Scanner,
        settler: Settler,
        tell: Callable[[Snapshot], None],
        observer: Observer,
        *,
        settle_s: float,
        follows: bool = True,
        mounts_s: float = 1.5,
    ) -> None:
        self._scanner = scanner
        self._settler = settler
        self._tell = tell
        self._observer = observer
        self._settle_s = settle_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="scan")
        self._follows = follows
        self._mounts_s = mounts_s
        self._told = Snapshot()
        self._seen = Snapshot()  # what lay there, at rest or not
        self._poked = asyncio.Event()
        self._took_s = 0.0
        self._running: asyncio.Task[Settled] | None = None
        self._next: asyncio.Task[Settled] | None = None  # has not begun yet: may be joined
        self._reasons = 0  # that there were to look: events, and what was said by call
        self._routine = False  # the next look has none
        self._in_motion = False  # the last look found something new
        self._trial: asyncio.TimerHandle | None = None

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    async def look(self) -> Settled:
        """One whole scan, told. Raises OSError if the repository itself cannot be read."""
        settled = await self._scan()
        self._in_motion = bool(settled.changed) or settled.look_again_s is not None
        self._pass_on(settled.snapshot, settled.changed)
        return settled

    async def seen(self) -> Snapshot:
        """What lies there now, at rest or not; nothing is told. Raises OSError."""
        await self._scan()
        return self._seen

    async def _scan(self) -> Settled:
        """A whole scan that began after this call."""
        if self._next is None:
            self._next = asyncio.create_task(self._scan_after(self._running), name="scan")
            self._next.add_done_callback(_retrieve)
        return await asyncio.shield(self._next)

    async def _scan_after(self, other: asyncio.Task[Settled] | None) -> Settled:
        if other is not None:
            await asyncio.wait([other])
        self._running, self._next = self._next, None
        began = time.perf_counter()
        loop = asyncio.get_running_loop()
        by_call = None
        while by_call is not self._scanner.by_call:  # what was unsaid meanwhile must not be told
            by_call = self._scanner.by_call
            snapshot = await loop.run_in_executor(self._thread, self._scanner.scan)
        self._seen = snapshot
        self._took_s = time.perf_counter() - began
        self._observer.scanned(self._took_s, len(snapshot.models))
        settled = self._settler.offer(snapshot, time.time())
        if settled.look_again_s is not None:
            self._observer.watched("settling", "")
        return settled

    def _pass_on(self, snapshot: Snapshot, changed: Iterable[str]) -> None:
        before, self._told = self._told, snapshot
        for name in changed:
            if before.models.get(name) is not snapshot.models.get(
                name
            ):  # else told by another look
                self._observer.watched(_action(name, before, snapshot), name)
        self._tell(snapshot)

    def _only(self, model: str, seen: Snapshot) -> Snapshot:
        """What was told last, and `model` as it was seen now."""
        models = {n: f for n, f in self._told.models.items() if n != model}
        if model in seen.models:
            models[model] = seen.models[model]
        return Snapshot(MappingProxyType(models), seen.problems)

    # what is said by call ------------------------------------------------------------------------

    @property
    def by_call(self) -> ByCall:
        return self._scanner.by_call

    def say(self, by_call: ByCall) -> None:
        """From the next look on, which is soon. Nothing is told before."""
        self._scanner.by_call = by_call
        self._reasons += 1
        self._poked.set()

    def home(self, model: str) -> Path:
        """Its folder in the repository."""
        return self._scanner.roots.home(model)

    def told(self, model: str) -> ModelFolder | None:
        return self._told.models.get(model)

    async def tried(self, model: str, by_call: ByCall) -> ModelFolder | None:
        """The folder as it would be if that were said. Raises as `fresh`."""
        loop = asyncio.get_running_loop()
        with _unreadable_is_later(self._settle_s):
            return await loop.run_in_executor(
                self._thread, self._scanner.scan_model, model, None, by_call
            )

    def put(self, model: str, folder: ModelFolder | None, by_call: ByCall) -> None:
        """Says so, and tells what comes of it for this model at once: its files have not changed since
        they were told last, so nothing needs to come to rest. None: it is none any more."""
        self.say(by_call)
        self._settler.put(model, folder)
        models = {n: f for n, f in self._told.models.items() if n != model}
        if folder is not None:
            models[model] = folder
        self._pass_on(Snapshot(MappingProxyType(models), self._told.problems), [model])

    async def fresh(self, model: str, *, act: bool = True) -> ModelFolder | None:
        """What lies in the folder of `model` now, once it has settled; None if there is none.

        It has been told when this returns, unless nobody watches and `act` is false. Raises
        ModelNotReadyError if its files do not come to rest within a few settle times, or the
        repository cannot be read.
        """
        with _unreadable_is_later(self._settle_s):
            return await self._until_fresh(model, time.monotonic() + 3 * self._settle_s + 2.0, act)

    async def _until_fresh(self, model: str, deadline: float, act: bool) -> ModelFolder | None:
        while True:
            loop = asyncio.get_running_loop()
            found = await loop.run_in_executor(self._thread, self._scanner.scan_model, model)
            known = self._told.models.get(model)
            if _same(found, known):
                if found is not None and not self._follows and act:
                    await self._tell_adapters(found)
                return known
            settled = await self._scan()
            seen = settled.snapshot.models.get(model)
            if self._follows:
                self._pass_on(settled.snapshot, settled.changed)
            elif act and not _same(known, seen):
                self._pass_on(self._only(model, settled.snapshot), [model])
            if settled.look_again_s is None or _same(found, seen):
                return seen
            if time.monotonic() >= deadline:
                raise ModelNotReadyError(
                    f"the files of '{model}' are still being written; ask again when they are done",
                    retry_after_s=self._settle_s,
                )
            await asyncio.sleep(settled.look_again_s)

    async def _tell_adapters(self, found: ModelFolder) -> None:
        """Where nobody watches, those that have come to rest are told with an order for their model;
        nobody waits for the others."""
        known = self._told.models.get(found.name)
        if known is not None and known.adapters != found.adapters:
            settled = await self._scan()
            self._pass_on(self._only(found.name, settled.snapshot), [])

    async def settle(self, limit_s: float) -> None:
        """Looks until nothing is in motion any more, at most `limit_s`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while True:
                    again_s = await self._look_or_say_why()
                    if again_s is None:
                        return
                    await asyncio.sleep(again_s)

    async def watch(self, *watchers: Watcher) -> None:
        """Looks after every poke, and again while something has not settled. Runs until cancelled."""
        listening = [asyncio.create_task(self._listen(w), name="watch") for w in watchers]
        for one in listening:
            one.add_done_callback(self._deaf)
        self._observer.watcher(True)
        again_s: float | None = 0.0
        try:
            while True:
                if again_s is None and any(one.done() for one in listening):
                    again_s = DEAF_S
                if again_s is None and self._scanner.by_call.mounts:
                    again_s = self._mounts_s
                with suppress(TimeoutError):
                    async with asyncio.timeout(again_s):
                        await self._poked.wait()
                await asyncio.sleep(BREATH * self._took_s)
                self._poked.clear()
                routine = self._routine and again_s is None
                self._routine = self._in_motion = False
                again_s = await self._look_or_say_why()
                if routine and self._in_motion:
                    self._suspect()
        finally:
            if self._trial is not None:
                self._trial.cancel()
            for one in listening:
                one.cancel()
            await asyncio.wait(listening)
            self._observer.watcher(False)

    async def _look_or_say_why(self) -> float | None:
        try:
            return (await self.look()).look_again_s
        except OSError as error:
            # What serves goes on serving: a repository that cannot be read is not an empty one.
            log.error("the repository cannot be read: %s; trying again", error.strerror or error)
        except Exception:
            # A bug that one strange folder brings out must not blind the server to all others.
            log.exception("the scan stumbled; what serves goes on serving; trying again")
        self._observer.watched("ignored", "")
        return max(self._settle_s, 1.0)

    async def _listen(self, watcher: Watcher) -> None:
        async for _ in watcher.pokes():
            self._routine = watcher.for_safety and not self._poked.is_set()
            self._reasons += not watcher.for_safety
            self._poked.set()

    def _suspect(self) -> None:
        """A look without a reason has found something. The kernel's queue may have been full, which
        watchfiles does not tell; or else the event is on its way."""
        known = self._reasons

        def judge() -> None:
            if self._reasons == known:
                log.warning("a change was seen that no event had told; the watcher loses events")
                self._observer.missed()

        self._trial = asyncio.get_running_loop().call_later(TOLD_WITHIN_S, judge)

    def _deaf(self, listening: asyncio.Task[None]) -> None:
        if not listening.cancelled():
            self._observer.watcher(False)
            why = listening.exception()
            log.error("the watcher stopped: %r; looking every %g s instead", why, DEAF_S)
            self._poked.set()


def _retrieve(scan: asyncio.Task[Settled]) -> None:
    """Whoever asked for it may have left."""
    if not scan.cancelled():
        scan.exception()


def _same(one: ModelFolder | None, other: ModelFolder | None) -> bool:
    seen, known = ((f.fingerprint, f.override) if f else None for f in (one, other))
    return seen == known


@contextmanager
def _unreadable_is_later(settle_s: float) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModelNotReadyError(
            f"the repository cannot be read now ({error.strerror or 'an input/output error'}); "
            f"what serves goes on serving",
            retry_after_s=max(settle_s, 1.0),
        ) from error


def _action(name: str, before: Snapshot, after: Snapshot) -> str:
    if name not in after.models:
        return "deleted"
    return "modified" if name in before.models else "added"
