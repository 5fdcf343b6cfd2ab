"""The adapters that one generation's host knows, held against the book of its model.

Level, not edge: whatever changed, `sync` compares all that is wanted with all that the host was told,
and tells it the difference. One at a time. An adapter that the host refuses is failed with its reason
until something of it changes; the generation and the other adapters go on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from repository.adapters.book import AdapterBook, Entry, Key, not_registered
from repository.adapters.orders import AdapterOrder, AdapterReport
from repository.adapting.counts import Counts
from repository.errors import (
    AdapterRefusedError,
    ModelNotReadyError,
    RepositoryError,
    WorkerDiedError,
)
from repository.events import EventBus
from repository.hosts.base import Host

log = logging.getLogger("modeldepot.adapters")

AT_ONCE = 64  # orders in one call of a host: requests wait no longer for a thousand adapters


class Fitting:
    """Made when a generation has loaded that can adapt, closed when its life ends.

    failed   name -> why the host does not have it as it is wanted
    where    name -> what the host said of it last
    """

    def __init__(
        self,
        host: Host,
        book: AdapterBook,
        counts: Counts,
        events: EventBus,
        *,
        label: str,
        limit_s: float,
    ) -> None:
        self.book = book
        self.failed: dict[str, str] = {}
        self.where: dict[str, AdapterReport] = {}
        self._host = host
        self._counts = counts
        self._events = events
        self._label = label
        self._limit_s = limit_s
        self._known: dict[str, Key] = {}  # what the host has, as far as it was told
        self._refused: dict[str, Key] = {}  # what it would not take
        self._revision = -1  # of the book, that it was compared with last
        self._one_at_a_time = asyncio.Lock()
        self._changed = asyncio.Event()
        self._following: asyncio.Task[None] | None = None
        self._closed = False

    # requests -------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """There is nothing that a request could name."""
        return not self._known and not self.book.entries

    def check(self, name: str) -> None:
        """Raises unless requests may name it: AdapterNotFoundError, AdapterRefusedError,
        ModelNotReadyError while the host is still being told."""
        entry = self.book.entries.get(name)
        if entry is None:
            raise not_registered(name)
        if name in self._known:
            return
        why = self.failed.get(name) or entry.source.problem
        if why:
            raise AdapterRefusedError(f"the adapter '{name}' cannot be used: {why}")
        raise ModelNotReadyError(f"the adapter '{name}' is still loading", retry_after_s=1.0)

    def asked(self, name: str) -> None:
        """A request names it."""
        self._counts.asked(name)

    def knows(self, name: str) -> bool:
        """The host has it, perhaps not in its newest form."""
        return name in self._known

    # the book -------------------------------------------------------------------------------------

    def poke(self) -> None:
        """The book has changed."""
        self._changed.set()

    def begin(self) -> None:
        """Keeps up with the book from now on, until it is closed or the host has died."""
        self._following = asyncio.create_task(self._follow(), name=f"adapters {self._label}")

    async def _follow(self) -> None:
        try:
            while True:
                self._changed.clear()
                await self.sync()
                await self._changed.wait()
        except WorkerDiedError:
            return  # its life knows
        except Exception:  # a mistake here must not go unseen, nor end the generation
            log.exception("%s: its adapters are not followed any more", self._label)

    async def sync(self) -> None:
        """Tells the host what is new; nothing is waited for where nothing is. Raises
        WorkerDiedError."""
        while self._revision != self.book.revision:
            async with self._one_at_a_time:
                revision = self.book.revision
                orders = self._orders()
                for at in range(0, len(orders), AT_ONCE):
                    await self._carry_out(orders[at : at + AT_ONCE])
                self._revision = revision

    async def attempt(self, entry: Entry) -> str:
        """Has the host take one adapter that is not in the book (like this) yet. Why not, or "".

        The caller says so to the book by `trying`, and afterwards calls `undo`, or lets the book have
        it. Raises WorkerDiedError.
        """
        async with self._one_at_a_time:
            report = (await self._ask([entry.order()]))[0]
            self._take(entry.name, entry.key, report)
            return report.error

    async def undo(self, name: str) -> None:
        """The host has it again as the book wants it, or no longer. Raises WorkerDiedError."""
        async with self._one_at_a_time:
            entry = self.book.entries.get(name)
            if entry is None or not entry.usable:
                await self._ask([AdapterOrder(name, remove=True)])
                self._forget(name)
            else:
                report = (await self._ask([entry.order()]))[0]
                self._take(name, entry.key, report)

    async def look(self, limit_s: float) -> None:
        """Asks the host where each is now. After `limit_s`, or if it has died: as it was."""
        if self._closed or not self._known:
            return
        before = dict(self.where)
        try:
            async with asyncio.timeout(limit_s):
                reports = await self._host.adapt([])
        except (TimeoutError, RepositoryError):
            return
        told = {report.name: report for report in reports}
        for name, last in before.items():
            if self.where.get(name) is last:  # nothing newer was said of it meanwhile
                self.where[name] = told.get(name) or replace(last, residence="registered")

    def take_over(self, old: Fitting) -> None:
        """The host slept, and has what it had. What became of the book meanwhile is told by `sync`."""
        self._known, self._refused = dict(old._known), dict(old._refused)
        self.where, self.failed = dict(old.where), dict(old.failed)

    def close(self) -> None:
        """The host is going: nothing is said to it any more."""
        self._closed = True
        if self._following is not None:
            self._following.cancel()

    # orders ---------------------------------------------------------------------------------------

    def _orders(self) -> list[AdapterOrder]:
        entries, trying = self.book.entries, self.book.trying
        wanted = {n: e for n, e in entries.items() if e.usable and n not in trying}
        self._drop_failures(wanted)
        gone = [n for n in self._known if n not in wanted and n not in trying]
        orders = [AdapterOrder(name, remove=True) for name in gone]
        for name, entry in wanted.items():
            if entry.key not in (self._known.get(name), self._refused.get(name)):
                orders.append(entry.order())
        return orders

    def _drop_failures(self, wanted: Mapping[str, Entry]) -> None:
        """Of what is no longer wanted, or wanted as the host has it."""
        for name in list(self._refused):
            entry = wanted.get(name)
            if name not in self.book.trying and (
                entry is None or entry.key == self._known.get(name)
            ):
                del self._refused[name]
                self.failed.pop(name, None)

    async def _carry_out(self, orders: Sequence[AdapterOrder]) -> None:
        keys = {n: e.key for n, e in self.book.entries.items()}
        reports = await self._ask(orders)
        for order, report in zip(orders, reports, strict=True):
            if order.remove:
                self._forget(order.name)
            elif (key := keys.get(order.name)) is not None:
                self._take(order.name, key, report)
                self._note(order.name, report)

    async def _ask(self, orders: Sequence[AdapterOrder]) -> list[AdapterReport]:
        """A report for each. What goes wrong with the call itself is every order's error."""
        if self._closed:
            raise WorkerDiedError(f"{self._label} is unloading")
        try:
            async with asyncio.timeout(self._limit_s) as limit:
                return await self._host.adapt(orders)
        except WorkerDiedError:
            raise
        except TimeoutError:
            if not limit.expired():
                raise
            why = f"the model had not taken it after {self._limit_s:g} s"
        except RepositoryError as error:
            why = str(error)
        except Exception as error:  # the edge: whatever broke, the generation goes on
            log.exception("%s: its adapters could not be told", self._label)
            why = f"{type(error).__name__}: the server's log says more"
        return [AdapterReport(order.name, why) for order in orders]

    def _take(self, name: str, key: Key, report: AdapterReport) -> None:
        self._counts.loaded(name, success=not report.error)
        if report.error:
            self._refused[name] = key
            self.failed[name] = report.error
            return
        self._known[name] = key
        self.where[name] = report
        self._refused.pop(name, None)
        self.failed.pop(name, None)

    def _forget(self, name: str) -> None:
        for of in (self._known, self._refused, self.failed, self.where):
            of.pop(name, None)

    def _note(self, name: str, report: AdapterReport) -> None:
        if report.error:
            log.warning("%s adapter=%s failed: %s", self._label, name, report.error)
            model = self.book.model
            self._events.publish("adapter.failed", model, adapter=name, message=report.error)
        else:
            log.info("%s adapter=%s %s", self._label, name, report.residence)
