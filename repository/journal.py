"""What people said by call, kept beyond the server's end, at whatever moment that comes.

    a change in memory ── note ──▶ pending ── one transaction for all that wait ──▶ `statefile`
                                                     kept() returns ◀────────────────┘

What is in memory is the truth of the moment. Whoever changes a durable fact notes it in the same breath,
so both see the changes in the same order; a note is one dictionary entry and never waits. What has been
noted is written soon, together with whatever else waits, by one thread; of two notes about the same
fact the last one counts. An answer that promises something waits for `kept()` first.

If the disk cannot be written, nothing is lost from memory: notes wait, and are tried again after a while
(RETRY_S, then longer) and at the next `kept()`. It is told once, in the log and on the bus, and again
when it is over.

Facts: the last word about a model, its adapters as they were registered (or that one in its folder was
unregistered), the config that a load brought, the place of a folder from elsewhere, its pin.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec

from repository.errors import ConfigError, NotKeptError
from repository.events import EventBus
from repository.statefile import LOCK_WAIT_S, WHAT_TO_DO, WHERE, Key, StateFile

log = logging.getLogger("modeldepot.state")

RETRY_S = 1.0
MOST_RETRY_S = 60.0


class KeptAdapter(msgspec.Struct, frozen=True, omit_defaults=True):
    """One adapter as it was said by call. `src`: as people were told; `path`: where that was, real.
    Of one of the folder the files are looked for there."""

    src: str
    path: str
    origin: Literal["folder", "call"] = "call"
    preload: bool = False
    pin: bool = False
    options: dict[str, str] = msgspec.field(default_factory=dict)


class Journal:
    """What was there at the start, by model:

    words       "load", "unload" or "sleep"
    adapters    name -> how it was registered; None: it lies in the folder and was unregistered
    overrides   the config that its load brought
    mounts      the folder that it lies in, outside of the repository
    pins        whether it is pinned, whatever its config says

    Everything but `open` and `close` is for the loop that opened it. Before it is open nothing is
    noted, and `kept` has nothing to wait for.
    """

    def __init__(
        self,
        folder: Path,
        events: EventBus | None = None,
        *,
        lock_wait_s: float = LOCK_WAIT_S,
        retry_s: float = RETRY_S,
    ) -> None:
        self.words: dict[str, str] = {}
        self.adapters: dict[str, dict[str, KeptAdapter | None]] = {}
        self.overrides: dict[str, dict[str, Any]] = {}
        self.mounts: dict[str, str] = {}
        self.pins: dict[str, bool] = {}
        self._file = StateFile(folder, lock_wait_s=lock_wait_s)
        self._events = events or EventBus()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._loop: asyncio.AbstractEventLoop | None = None  # while it is open
        self._closed = False
        self._facts: dict[Key, str] = {}  # all, as they were noted last
        self._pending: dict[Key, str | None] = {}
        self._noted = self._written = 0  # how many notes there were, and were written
        self._writing: asyncio.Future[None] | None = None
        self._due: asyncio.Handle | None = None  # when it begins to write
        self._waiters: list[tuple[int, asyncio.Future[None]]] = []
        self._trouble = ""  # why the last attempt failed
        self._first_retry_s = self._retry_s = retry_s

    # the file -------------------------------------------------------------------------------------

    async def open(self, *, forget: bool = False) -> None:
        """Raises ConfigError: another server has it, it cannot be read, or the folder not be used."""
        loop = asyncio.get_running_loop()
        facts = await loop.run_in_executor(self._thread, partial(self._file.open, forget=forget))
        for key, value in facts.items():
            self._read(key, value)
        self._facts = facts
        self._loop = loop
        log.info("remembered from before: %s", self._told() or "nothing")

    def _read(self, key: Key, value: str) -> None:
        kind, model, name = key
        try:
            said = json.loads(value)
            match kind:
                case "word":
                    self.words[model] = msgspec.convert(said, Literal["load", "unload", "sleep"])
                case "adapter":
                    found = msgspec.convert(said, KeptAdapter | None)
                    self.adapters.setdefault(model, {})[name] = found
                case "override":
                    self.overrides[model] = msgspec.convert(said, dict[str, Any])
                case "mount":
                    self.mounts[model] = msgspec.convert(said, str)
                case "pin":
                    self.pins[model] = msgspec.convert(said, bool)
                case _:
                    raise ValueError(f"unknown kind '{kind}'")
        except (ValueError, msgspec.ValidationError) as error:
            raise ConfigError(
                f"what it says of '{model}' cannot be read ({error}); {WHAT_TO_DO}", where=WHERE
            ) from error

    def _told(self) -> str:
        """What was there at the start, counted."""
        words = list(self.words.values())
        adapters = [said for of in self.adapters.values() for said in of.values()]
        aways = adapters.count(None)
        counts = (
            (words.count("load"), "model", " loaded by call"),
            (words.count("unload"), "model", " unloaded by call"),
            (words.count("sleep"), "model", " put to sleep by call"),
            (len(adapters) - aways, "adapter", ""),
            (aways, "adapter", " unregistered"),
            (len(self.overrides), "config", ""),
            (len(self.mounts), "folder", " from elsewhere"),
            (len(self.pins), "pin", ""),
        )
        return ", ".join(f"{n} {what}{'s' * (n > 1)}{how}" for n, what, how in counts if n)

    async def close(self) -> None:
        """Writes what waits, once more; whatever could not be kept is told in the log."""
        try:
            await self._last_write()
        finally:
            self._loop, self._closed = None, True
            loop = asyncio.get_running_loop()
            await asyncio.shield(loop.run_in_executor(self._thread, self._file.close))
            self._thread.shutdown()

    async def _last_write(self) -> None:
        if self._loop is None:
            return
        if self._writing is not None:
            await asyncio.wait([self._writing])
        self._begin()
        while self._writing is not None:
            await asyncio.wait([self._writing])
        if self._due is not None:
            self._due.cancel()
        if self._pending:
            log.error(
                "%d things that were said by call are not remembered: the state folder could not "
                "be written (%s)",
                len(self._pending),
                self._trouble,
            )

    # notes ----------------------------------------------------------------------------------------

    def word(self, model: str, word: str | None) -> None:
        """None: nobody has said anything of it that counts."""
        self._note(("word", model, ""), word)

    def adapter(self, model: str, name: str, said: KeptAdapter) -> None:
        self._note(("adapter", model, name), msgspec.to_builtins(said))

    def away(self, model: str, name: str) -> None:
        """It lies in the folder, and was unregistered."""
        self._write_down(("adapter", model, name), "null")

    def no_adapter(self, model: str, name: str) -> None:
        """Nothing was said of it that counts."""
        self._note(("adapter", model, name), None)

    def override(self, model: str, values: Mapping[str, Any] | None) -> None:
        """`values`: as JSON has them."""
        self._note(("override", model, ""), None if values is None else dict(values))

    def mount(self, model: str, path: str | None) -> None:
        self._note(("mount", model, ""), path)

    def pin(self, model: str, pinned: bool | None) -> None:
        """None: as its config says."""
        self._note(("pin", model, ""), pinned)

    def _note(self, key: Key, said: Any) -> None:
        self._write_down(key, None if said is None else json.dumps(said, sort_keys=True))

    def _write_down(self, key: Key, value: str | None) -> None:
        if self._loop is None or self._facts.get(key) == value:
            self._noted += self._closed  # too late, and `kept` says so
            return
        if value is None:
            del self._facts[key]
        else:
            self._facts[key] = value
        self._pending[key] = value
        self._noted += 1
        if self._due is None and self._writing is None:
            self._due = self._loop.call_soon(self._begin)

    @property
    def well(self) -> bool:
        """As of the last attempt: what is said can be written."""
        return not self._trouble

    async def kept(self) -> None:
        """Returns once all that was noted so far is on disk; tries at once, also after failures.

        Raises NotKeptError, whose text says why and what to do; what was done all the same is for the
        caller to say."""
        if self._written >= self._noted:
            return
        if self._loop is None:
            raise NotKeptError("the server is ending, and remembers nothing more")
        waiter = self._loop.create_future()
        self._waiters.append((self._noted, waiter))
        if self._writing is None:
            self._begin()
        await waiter

    # writing --------------------------------------------------------------------------------------

    def _begin(self) -> None:
        assert self._loop is not None
        if self._due is not None:
            self._due.cancel()
            self._due = None
        if self._writing is not None or not self._pending:
            return
        batch, self._pending = self._pending, {}
        self._writing = self._loop.run_in_executor(self._thread, self._file.write, batch)
        self._writing.add_done_callback(partial(self._wrote, batch, self._noted))

    def _wrote(
        self, batch: dict[Key, str | None], upto: int, writing: asyncio.Future[None]
    ) -> None:
        self._writing = None
        error = writing.exception()
        if error is None:
            self._written = upto
            self._well()
        else:
            self._pending = {**batch, **self._pending}
            self._unwell(error)
        told = [waiter for goal, waiter in self._waiters if goal <= upto and not waiter.done()]
        self._waiters = [(goal, w) for goal, w in self._waiters if goal > upto and not w.done()]
        for waiter in told:
            if error is None:
                waiter.set_result(None)
            else:
                waiter.set_exception(self._not_kept())
        self._go_on()

    def _go_on(self) -> None:
        """With what was noted meanwhile; after a failure at once only if somebody waits for it."""
        if not self._pending or self._loop is None:
            return
        if self._waiters or not self._trouble:
            self._begin()
        else:
            self._due = self._loop.call_later(self._retry_s, self._begin)
            self._retry_s = min(2 * self._retry_s, MOST_RETRY_S)

    def _not_kept(self) -> NotKeptError:
        return NotKeptError(
            f"the state folder cannot be written ({self._trouble}); mend that or free some room "
            f"there (it is tried again from time to time, and with every call), or start the server "
            f"with another --state-dir"
        )

    def _unwell(self, error: BaseException) -> None:
        before, self._trouble = self._trouble, getattr(error, "strerror", None) or repr(error)
        if before:
            return
        log.error(
            "the state folder cannot be written (%s): what is said by call will not be remembered "
            "until it can; trying again",
            self._trouble,
        )
        self._events.publish("journal.failed", message=self._trouble)

    def _well(self) -> None:
        if not self._trouble:
            return
        self._trouble, self._retry_s = "", self._first_retry_s
        log.info("the state folder can be written again; everything said by call is remembered")
        self._events.publish("journal.mended")
