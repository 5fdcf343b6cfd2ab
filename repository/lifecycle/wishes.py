"""What is wanted, and why: the mode's policy, and what people said about single models.

Rules: the last word about a model wins, whoever said it. What a person unloaded stays unloaded until
somebody asks for it again or its folder goes away. Wishes know no generation: what runs is compared
with them by `plan`.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from repository.snapshot import ModelFolder
from repository.spec import ModelSpec


class Word(enum.StrEnum):
    LOAD = "load"
    UNLOAD = "unload"
    EVICTED = "evicted"  # it made room for another, or idled too long; stays away until asked for


@dataclass(frozen=True, slots=True)
class Wanted:
    """One version that should serve. A generation answers to it with the same fingerprint and an
    epoch that is not older (a forced reload raises the epoch)."""

    spec: ModelSpec
    epoch: int = 0


class Wishes:
    """`everything`: every model of the repository is wanted unless a word says otherwise; `named`:
    these are, in any case."""

    def __init__(self, *, everything: bool, named: Iterable[str] = ()) -> None:
        self.everything = everything
        self.named = frozenset(named)
        self._words: dict[str, Word] = {}
        self._epochs: dict[str, int] = {}
        self._before: dict[str, tuple[Word | None, int]] = {}  # as of a load() not granted yet

    def load(self, model: str, *, force: bool = False) -> None:
        epoch = self._epochs.get(model, 0)
        self._before.setdefault(model, (self._words.get(model), epoch))
        self._words[model] = Word.LOAD
        if force:
            self._epochs[model] = epoch + 1

    def granted(self, model: str) -> None:
        """Something of it serves: what was said before counts no more."""
        self._before.pop(model, None)

    def withdraw(self, model: str) -> None:
        """What load() asked for could not be had: what held before holds again, or the model would
        come up by surprise some day."""
        if model in self._before:
            word, self._epochs[model] = self._before.pop(model)
            self._words.pop(model, None)
            if word is not None:
                self._words[model] = word

    def unload(self, model: str) -> None:
        self._say(model, Word.UNLOAD)

    def evict(self, model: str) -> None:
        self._say(model, Word.EVICTED)

    def _say(self, model: str, word: Word) -> None:
        self._words[model] = word
        self._before.pop(model, None)

    def forget(self, model: str) -> None:
        """Its folder is gone: what was evicted or unloaded by hand is history. A wish to load is
        kept, so that a model which is wanted by name is loaded when its folder comes back."""
        if self._words.get(model) is not Word.LOAD:
            self._words.pop(model, None)
        self._epochs.pop(model, None)
        self._before.pop(model, None)

    def wants(self, model: str) -> bool:
        word = self._words.get(model)
        if word is None:
            return self.everything or model in self.named
        return word is Word.LOAD

    def word(self, model: str) -> Word | None:
        return self._words.get(model)

    def wanted(self, folder: ModelFolder | None) -> Mapping[int, Wanted]:
        """By version. Empty where the model is not wanted, or has nothing that could be loaded."""
        if folder is None or not self.wants(folder.name):
            return {}
        epoch = self._epochs.get(folder.name, 0)
        return {version: Wanted(spec, epoch) for version, spec in folder.specs.items()}
