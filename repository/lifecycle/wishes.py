"""What is wanted, and why: the mode's policy, and what people said about single models.

Rules: the last word about a model wins, whoever said it. What a person unloaded stays unloaded until
somebody asks for it again or its folder goes away. Wishes know no generation: what runs is compared
with them by `plan`.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from repository.snapshot import ModelFolder
from repository.spec import ModelSpec


class Word(enum.StrEnum):
    LOAD = "load"
    UNLOAD = "unload"
    EVICTED = "evicted"  # it made room for another; the next request for it brings it back


@dataclass(frozen=True, slots=True)
class Wanted:
    """One version that should serve. A generation answers to it with the same fingerprint and an
    epoch that is not older (a forced reload raises the epoch)."""

    spec: ModelSpec
    epoch: int = 0


class Wishes:
    """`everything`: every model of the repository is wanted unless a word says otherwise."""

    def __init__(self, *, everything: bool) -> None:
        self.everything = everything
        self._words: dict[str, Word] = {}
        self._epochs: dict[str, int] = {}

    def load(self, model: str, *, force: bool = False) -> None:
        self._words[model] = Word.LOAD
        if force:
            self._epochs[model] = self._epochs.get(model, 0) + 1

    def unload(self, model: str) -> None:
        self._words[model] = Word.UNLOAD

    def evict(self, model: str) -> None:
        self._words[model] = Word.EVICTED

    def forget(self, model: str) -> None:
        """Its folder is gone: what was evicted or unloaded by hand is history. A wish to load is
        kept, so that a model which is wanted by name is loaded when its folder comes back."""
        if self._words.get(model) is not Word.LOAD:
            self._words.pop(model, None)
        self._epochs.pop(model, None)

    def wants(self, model: str) -> bool:
        word = self._words.get(model)
        return self.everything if word is None else word is Word.LOAD

    def word(self, model: str) -> Word | None:
        return self._words.get(model)

    def wanted(self, folder: ModelFolder | None) -> Mapping[int, Wanted]:
        """By version. Empty where the model is not wanted, or has nothing that could be loaded."""
        if folder is None or not self.wants(folder.name):
            return {}
        epoch = self._epochs.get(folder.name, 0)
        return {version: Wanted(spec, epoch) for version, spec in folder.specs.items()}
