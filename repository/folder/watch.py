"""Says when to look at the repository again. A poke carries hints, never the truth: scans decide.

notify  inotify, by watchfiles; where the system refuses (limits), polling with a warning; where a
        name is not UTF-8, which watchfiles cannot tell, polling until that is mended
poll    every `poll_s`, for network file systems and bind mounts that tell nobody
off     never

Besides, one poke each `safety_s` in notify mode: events can be lost. The root may vanish, come back
or be a link that is moved: its identity is compared at every turn, and the watch begins anew.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from watchfiles._rust_notify import RustNotify, WatchfilesRustInternalError

log = logging.getLogger("modeldepot.folder")

DEBOUNCE_MS = 100  # events closer than this come as one poke
STEP_MS = 50  # also how long a stop may go unnoticed
AGAIN_S = 30.0  # after a watch that broke; meanwhile it is looked every `poll_s`
TURN_S = 2.0  # how often the root's identity is compared; one stat


class Watcher:
    """`pokes` may be iterated once at a time. Leaving the iteration, by cancellation too, ends it
    within a step and leaves no thread behind."""

    def __init__(
        self,
        root: Path,
        how: Literal["notify", "poll", "off"],
        poll_s: float,
        safety_s: float = 60.0,
    ) -> None:
        self._root = root
        self._how = how
        self._poll_s = poll_s
        self._safety_s = safety_s
        self._refused = False
        self.watching = asyncio.Event()  # changes from now on are seen
        self.for_safety = False  # the last poke came without any event, while events are told

    async def pokes(self) -> AsyncGenerator[set[str]]:
        """Paths that changed, relative to the root; empty where nothing more is known."""
        if self._how == "off":
            self.watching.set()
            await asyncio.Event().wait()
        while self._how == "notify" and not self._refused:
            async for changed in self._notified():
                yield changed
            if not self._refused:
                async for changed in self._polled(AGAIN_S):
                    yield changed
        self.watching.set()
        async for changed in self._polled(math.inf):
            yield changed

    async def _polled(self, for_s: float) -> AsyncGenerator[set[str]]:
        end = time.monotonic() + for_s
        while time.monotonic() < end:
            await asyncio.sleep(self._poll_s)
            yield set()

    async def _notified(self) -> AsyncGenerator[set[str]]:
        """Until the system refuses to watch, or the watch broke."""
        began = False
        while True:
            if not os.path.isdir(self._root):  # noqa: ASYNC240  (one stat, as in _identity)
                began = True  # it will be another one
                await asyncio.sleep(min(self._poll_s, TURN_S))
                continue
            async with _Watch(self._root) as watch:
                try:
                    await watch.begin()
                except FileNotFoundError:
                    continue  # gone between the two looks
                except (OSError, WatchfilesRustInternalError) as error:
                    reason = getattr(error, "strerror", None) or error
                    log.warning(
                        "inotify refused (%s); looking every %g s instead", reason, self._poll_s
                    )
                    self._refused = True
                    return
                self.watching.set()
                if began:
                    yield set()  # what happened between the two watches was not seen
                began = True
                try:
                    async for changed in self._turns(watch):
                        yield changed
                except WatchfilesRustInternalError as error:
                    # It would say so for ever, and of what changed nothing more.
                    log.warning("%s; looking every %g s instead", error, self._poll_s)
                    return

    async def _turns(self, watch: _Watch) -> AsyncGenerator[set[str]]:
        """Until the root is another folder than the one that is watched."""
        poked_at = time.monotonic()
        turn_s = min(TURN_S, self._safety_s)
        while watch.same_root():
            changed = await watch.changes(turn_s)
            if changed or time.monotonic() - poked_at >= self._safety_s:
                poked_at = time.monotonic()
                self.for_safety = not changed
                yield changed
                self.for_safety = False


class _Watch:
    """One inotify instance on one folder, and the thread that waits for it.

    watchfiles' own `awatch` borrows a thread that outlives it and cannot look at the root between
    two waits, hence the layer below it.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._real = os.path.realpath(root)
        self._identity = _identity(root)
        self._notify: RustNotify | None = None
        self._stop = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="watch")

    async def __aenter__(self) -> _Watch:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop.set()
        # Waits for the thread, at most a step: nothing may outlive the iteration.
        self._thread.shutdown(wait=True)
        if self._notify is not None:
            self._notify.close()

    async def begin(self) -> None:
        """Watches every folder below: thousands of system calls, so not on the loop. OSError if
        that is refused."""
        # (paths, debug, force polling, its delay, recursive, ignore what may not be read)
        arguments = ([self._real], False, False, 0, True, True)
        loop = asyncio.get_running_loop()
        self._notify = await loop.run_in_executor(self._thread, RustNotify, *arguments)

    def same_root(self) -> bool:
        now = _identity(self._root)
        return now is not None and now == self._identity

    async def changes(self, timeout_s: float) -> set[str]:
        """Relative paths; empty after `timeout_s` without any."""
        assert self._notify is not None, "begin() comes first"
        loop = asyncio.get_running_loop()
        raw = await loop.run_in_executor(
            self._thread,
            self._notify.watch,
            DEBOUNCE_MS,
            STEP_MS,
            max(1, int(timeout_s * 1000)),
            self._stop,
        )
        if isinstance(raw, str):
            return set()  # timeout, stop
        return {path.removeprefix(self._real).lstrip("/") or "." for _, path in raw}


def _identity(root: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(root)
    except OSError:
        return None
    return found.st_dev, found.st_ino
