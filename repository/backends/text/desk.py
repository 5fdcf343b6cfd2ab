"""Who waits, who runs, who was given up. Both engines have one; it knows no model."""

from __future__ import annotations

from repository.backends.abilities import Told
from repository.backends.lora.adapters import LoraAdapters
from repository.backends.text.sequence import Writing
from repository.errors import RepositoryError

MOST_PASSES = 32


class Desk:
    """`lora`: None where the model takes no adapters (then every adapter slot is 0).

    A sequence has its adapter's slot from its start to its end. One whose adapter finds no slot waits,
    and others may pass it; MOST_PASSES of those with adapters, then these wait too. Otherwise adapters
    that are always asked for would never leave their slots.
    """

    def __init__(self, lora: LoraAdapters | None) -> None:
        self.lora = lora
        self._all: dict[int, Writing] = {}
        self._waiting: dict[int, Writing] = {}
        self._given_up: set[int] = set()

    @property
    def unfinished(self) -> int:
        return len(self._all)

    def begin(self, writing: Writing) -> None:
        self._all[writing.number] = self._waiting[writing.number] = writing

    def cancel(self, number: int) -> None:
        if number in self._all:
            self._given_up.add(number)

    def drop(self, told: list[Told]) -> list[Writing]:
        """Tells the end of all that were given up, and returns those that were running."""
        gone = [self._all[number] for number in self._given_up if number in self._all]
        self._given_up.clear()
        running = []
        for writing in gone:
            if self._waiting.pop(writing.number, None) is None:
                running.append(writing)
                self._give(writing)
            del self._all[writing.number]
            told.append(Told(writing.number, writing.ended("cancelled")))
        return running

    def call(self, seats: int, told: list[Told]) -> list[Writing]:
        """At most `seats` of those that wait, the longest waiting first; they run from now on."""
        called: list[Writing] = []
        busy: set[str] = set()
        stuck: list[Writing] = []
        for writing in list(self._waiting.values()) if seats > 0 else ():
            if len(called) == seats:
                break
            if writing.adapter in busy:
                continue
            if writing.adapter and any(one.passed >= MOST_PASSES for one in stuck):
                continue
            try:
                slot = self.lora.take(writing.adapter) if self.lora is not None else 0
            except RepositoryError as error:
                del self._waiting[writing.number], self._all[writing.number]
                told.append(Told(writing.number, error))
                continue
            if slot is None:
                busy.add(writing.adapter)
                stuck.append(writing)
                continue
            if writing.adapter:
                for one in stuck:
                    one.passed += 1
            del self._waiting[writing.number]
            writing.adapter_slot = slot
            writing.started()
            called.append(writing)
        return called

    def rows(self, writings: list[Writing]) -> None:
        """Before a forward: whose rows they are."""
        if self.lora is not None:
            self.lora.rows([writing.adapter_slot for writing in writings])

    def leave(
        self, writing: Writing, told: list[Told], error: RepositoryError | None = None
    ) -> None:
        """It has ended by itself, or by `error`."""
        del self._all[writing.number]
        self._give(writing)
        told.append(Told(writing.number, error if error is not None else writing.ended()))

    def _give(self, writing: Writing) -> None:
        if self.lora is not None:
            self.lora.give(writing.adapter_slot)
