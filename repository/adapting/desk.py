"""What people say of adapters by call, and what they are told.

A call is tried first: every generation that serves takes the adapter, and only then the book has it. If
one refuses, the others take it back, and nothing has changed; so too where it cannot be kept beyond a
restart. One call at a time for each model; what the folder brings meanwhile is followed all the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from repository.adapters.book import AdapterBook, Entry
from repository.adapters.sources import AdapterSource
from repository.adapting import places
from repository.adapting.fitting import Fitting
from repository.adapting.shelf import Shelf
from repository.adapting.views import describe, takes_none
from repository.errors import (
    AdapterRefusedError,
    ModelNotFoundError,
    NoAdapterSlotError,
    NotKeptError,
    WorkerDiedError,
)
from repository.folder.adapters import read_adapter
from repository.lifecycle.generation import Generation
from repository.lifecycle.states import RISING, State
from repository.names import check_adapter_name, shown
from repository.reports import AdapterView, Options
from repository.turns import Turns


async def at_once() -> None:
    """There is nothing to wait for."""


class Desk:
    """`generations`: those of a model that have not been forgotten, oldest first. `kept` returns when
    all that was said is on disk, or raises NotKeptError."""

    def __init__(
        self,
        shelf: Shelf,
        generations: Callable[[str], Iterable[Generation]],
        options: Options,
        *,
        kept: Callable[[], Awaitable[None]] = at_once,
    ) -> None:
        self.shelf = shelf
        self._generations = generations
        self._root = options.root
        self._allowed_roots = options.other_roots
        self.elsewhere: Callable[[str], Path | None] = lambda model: None  # its folder, if not here
        self._kept = kept
        self._turns = Turns()

    def home(self, model: str) -> Path:
        """Its folder."""
        return self.elsewhere(model) or self._root / model

    def describe(self, model: str) -> list[AdapterView]:
        """All that are registered, by name."""
        if not self.shelf.entries(model):
            return []
        shelf = self.shelf
        return describe(shelf.book(model), shelf.counts(model), self._generations(model))

    # calls ----------------------------------------------------------------------------------------

    async def register(
        self,
        model: str,
        name: str,
        src: str,
        *,
        preload: bool,
        pin: bool,
        options: Mapping[str, str],
    ) -> AdapterView:
        """As it was the moment it was registered.

        Raises InvalidNameError, ConflictError, InvalidRequestError, AdapterRefusedError,
        NoAdapterSlotError, NotKeptError."""
        check_adapter_name(name)

        async def register() -> AdapterView:
            book = self.shelf.book(model)
            book.check_free(name)
            source, told = await self._source(model, name, src)
            entry = book.new(source, told, preload=preload, pin=pin, options=options)
            async with self._kept_or_undone(book, name, "registered"):
                return await self._take(book, entry)

        return await self._turns.take(model, register)

    async def update(
        self,
        model: str,
        name: str,
        *,
        src: str | None,
        preload: bool | None,
        pin: bool | None,
        options: Mapping[str, str] | None,
    ) -> AdapterView:
        """Raises AdapterNotFoundError, and as `register`."""

        async def update() -> AdapterView:
            book = self.shelf.book(model)
            old = book.get(name)
            source, told = None, old.src
            if src is not None:
                source, told = await self._source(model, name, src)
            entry = book.changed(
                name, source=source, src=told, preload=preload, pin=pin, options=options
            )
            if not entry.usable:
                raise AdapterRefusedError(
                    f"the adapter '{name}' cannot be used: {old.source.problem}"
                )
            async with self._kept_or_undone(book, name, "changed"):
                return await self._take(book, entry)

        return await self._turns.take(model, update)

    async def unregister(self, model: str, name: str) -> None:
        """It is unregistered too where that cannot be kept. Raises AdapterNotFoundError,
        NotKeptError."""

        async def unregister() -> None:
            book = self.shelf.book(model)
            self.shelf.tell(book, book.remove(name))
            await self._sync(model)
            try:
                await self._kept()
            except NotKeptError as error:
                raise NotKeptError(
                    f"the adapter '{name}' is unregistered, but may be there again after a restart: "
                    f"{error}"
                ) from error

        await self._turns.take(model, unregister)

    @asynccontextmanager
    async def _kept_or_undone(
        self, book: AdapterBook, name: str, done: str
    ) -> AsyncGenerator[None]:
        """What the block says of an adapter is on disk afterwards, or has not been said."""
        before = book.said(name)
        yield
        try:
            await self._kept()
        except NotKeptError as error:
            if self.shelf.book(book.model) is book:
                self.shelf.tell(book, book.put_back(name, before))
                await self._sync(book.model)
            raise NotKeptError(f"the adapter '{name}' was not {done}: {error}") from error

    async def _sync(self, model: str) -> None:
        for _, fitting in self._hosts(model):
            await _quietly(fitting.sync())

    async def _source(self, model: str, name: str, src: str) -> tuple[AdapterSource, str]:
        home = self.home(model)
        place = await asyncio.to_thread(places.find, src, home, self._root, self._allowed_roots)
        source = await asyncio.to_thread(read_adapter, name, place.path, place.root)
        if source.facts is None:
            raise AdapterRefusedError(f"{shown(place.src, 200)}: {source.problem}")
        return source, place.src

    # trying ---------------------------------------------------------------------------------------

    async def _take(self, book: AdapterBook, entry: Entry) -> AdapterView:
        """The book has it once every generation that serves does; else nothing has changed."""
        self._check_serving(book, entry)
        tried: list[Fitting] = []
        book.trying.add(entry.name)
        try:
            while left := [(g, f) for g, f in self._hosts(book.model) if f not in tried]:
                gen, fitting = left[0]
                tried.append(fitting)
                await self._try(gen, fitting, entry)
            if self.shelf.book(book.model) is not book:
                raise ModelNotFoundError(f"model '{book.model}' was removed meanwhile")
            book.trying.discard(entry.name)  # since the last look no await until it is in the book
            self.shelf.tell(book, book.put(entry))
            views = self.describe(book.model)
            return next(view for view in views if view.name == entry.name)
        except BaseException:
            for fitting in tried:
                await _quietly(fitting.undo(entry.name))
            raise
        finally:
            book.trying.discard(entry.name)
            if entry.name not in book.entries:
                self.shelf.counts(book.model).forget(entry.name)
            book.touch()  # what was left alone meanwhile is looked at
            self.shelf.wake(book.model)

    async def _try(self, gen: Generation, fitting: Fitting, entry: Entry) -> None:
        try:
            why = await fitting.attempt(entry)
        except WorkerDiedError:
            return  # its successor gets it from the book
        # One that does not serve yet shows it as failed, as it would any other.
        if why and gen.state is State.READY:
            raise AdapterRefusedError(f"the adapter '{entry.name}' cannot be used: {why}")

    def _hosts(self, model: str) -> list[tuple[Generation, Fitting]]:
        """Those that serve or will, with what they know."""
        return [
            (gen, gen.fitting)
            for gen in self._generations(model)
            if gen.fitting is not None and (gen.state is State.READY or gen.state in RISING)
        ]

    def _check_serving(self, book: AdapterBook, entry: Entry) -> None:
        """What can be told without asking a host. Every pin needs a slot of its own."""
        serving = [g for g in self._generations(book.model) if g.state is State.READY]
        for gen in serving:
            if gen.fitting is None:
                raise AdapterRefusedError(takes_none(gen))
        slots = min((g.spec.config.adapters.slots for g in serving), default=None)
        pinned = sorted(n for n, e in book.entries.items() if e.pin and n != entry.name)
        if entry.pin and slots is not None and len(pinned) >= slots:
            raise NoAdapterSlotError(
                f"all {slots} adapter slots of '{book.model}' are pinned ({', '.join(pinned[:5])}"
                f"{', ...' if len(pinned) > 5 else ''}); unpin one, or raise adapters.slots"
            )


async def _quietly(work: Awaitable[None]) -> None:
    """A host that died has nothing left to be told."""
    with suppress(WorkerDiedError):
        await work
