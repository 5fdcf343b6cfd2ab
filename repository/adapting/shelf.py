"""The books of all models, and the fittings of all generations that run. One per repository.

Whatever changes a book goes through here, so that everybody who holds something against it looks again,
and is told in the log and on the bus.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial

from repository.adapters.book import AdapterBook, Away, Entry, News, Said
from repository.adapters.sources import AdapterSource
from repository.adapting.counts import Counts
from repository.adapting.fitting import Fitting
from repository.events import EventBus
from repository.hosts.base import Host
from repository.messages import Loaded
from repository.reports import AdapterView
from repository.spec import ModelSpec

log = logging.getLogger("modeldepot.adapters")


Note = Callable[[str, str, Said], None]


class Shelf:
    """`note` is told what was said last by call of an adapter (model, name), whenever that changes."""

    def __init__(
        self, events: EventBus | None = None, note: Note = lambda model, name, said: None
    ) -> None:
        self.events = events or EventBus()
        self._note = note
        self._books: dict[str, AdapterBook] = {}
        self._counts: dict[str, Counts] = {}
        self._fittings: dict[str, list[Fitting]] = {}

    def book(self, model: str) -> AdapterBook:
        """Of a model that there is; a new one, where nobody has said anything yet."""
        found = self._books.get(model)
        if found is None:
            found = self._books[model] = AdapterBook(model, partial(self._note, model))
        return found

    def entries(self, model: str) -> Mapping[str, Entry]:
        found = self._books.get(model)
        return found.entries if found is not None else {}

    def settling(self, model: str) -> list[AdapterView]:
        """Those in its folder that are not registered yet: somebody is writing them."""
        found = self._books.get(model)
        names = found.settling if found is not None else ()
        return [AdapterView(name, f"adapters/{name}", "settling") for name in names]

    def counts(self, model: str) -> Counts:
        return self._counts.setdefault(model, Counts())

    def holders(self, name: str) -> list[str]:
        """Models that have an adapter of that name."""
        return sorted(model for model, book in self._books.items() if name in book.entries)

    # the folder -----------------------------------------------------------------------------------

    def follow(self, model: str, sources: Mapping[str, AdapterSource]) -> None:
        """What has settled in its folder. Most models have nothing there, and nothing is kept for
        them."""
        book = self._books.get(model)
        if book is None and not sources:
            return
        book = self.book(model)
        if news := book.follow(sources):
            self.tell(book, news)

    def recall(self, model: str, name: str, said: Entry | Away) -> None:
        """What was said before the start, before the first look at the folder."""
        book = self.book(model)
        self.tell(book, book.recall(name, said))

    def forget(self, model: str) -> None:
        """Its folder is gone, and nothing of it is left."""
        book = self._books.pop(model, None)
        if book is not None:
            book.clear()
        self._counts.pop(model, None)

    # generations ----------------------------------------------------------------------------------

    def fit(self, spec: ModelSpec, host: Host, loaded: Loaded, limit_s: float) -> Fitting | None:
        """For a generation that has just loaded. None: it cannot adapt, or its config forbids it."""
        model = spec.model
        if not spec.config.adapters.enabled:
            return None
        if "adapt" not in loaded.abilities:
            if entries := self.entries(model):
                log.warning(
                    "model=%s version=%d %d adapters are not used: backend '%s' takes none",
                    *(*spec.key, len(entries), spec.backend),
                )
            return None
        label = f"model={model} version={spec.version}"
        fitting = Fitting(
            host,
            self.book(model),
            self.counts(model),
            self.events,
            label=label,
            limit_s=limit_s,
        )
        self._fittings.setdefault(model, []).append(fitting)
        return fitting

    def part(self, model: str, fitting: Fitting) -> None:
        """The generation's life ends."""
        fitting.close()
        left = [f for f in self._fittings.get(model, ()) if f is not fitting]
        if left:
            self._fittings[model] = left
        else:
            self._fittings.pop(model, None)

    def fittings(self, model: str) -> tuple[Fitting, ...]:
        return tuple(self._fittings.get(model, ()))

    # telling --------------------------------------------------------------------------------------

    def tell(self, book: AdapterBook, news: Iterable[News]) -> None:
        """Of a change of the book that has just been made."""
        for what, name, entry in news:
            if entry is None:
                self.counts(book.model).forget(name)
                log.info("model=%s adapter=%s %s", book.model, name, what)
                self.events.publish(f"adapter.{what}", book.model, adapter=name)
                continue
            log.info("model=%s adapter=%s %s (%s)", book.model, name, what, entry.origin)
            self.events.publish(
                f"adapter.{what}", book.model, adapter=name, src=entry.src, origin=entry.origin
            )
            if problem := entry.source.problem:
                log.warning("model=%s adapter=%s failed: %s", book.model, name, problem)
                self.events.publish("adapter.failed", book.model, adapter=name, message=problem)
        self.wake(book.model)

    def wake(self, model: str) -> None:
        for fitting in self._fittings.get(model, ()):
            fitting.poke()
