"""What is wanted, and why: the mode's policy, and what people said about single models.

Rules: the last word about a model wins, whoever said it. What a person unloaded stays unloaded until
somebody asks for it again or its folder goes away. Wishes know no generation: what runs is compared
with them by `plan`.

What people *said* by call outlives the server: each change of it is noted in the breath in which it is
made. Requests that wait, and evictions, change what is wanted now and nothing of what was said.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from repository.snapshot import ModelFolder
from repository.spec import ModelSpec


class Word(enum.StrEnum):
    LOAD = "load"
    UNLOAD = "unload"
    NEEDED = "needed"  # an ensemble that was wanted needs it: nobody's wish either, but it stays
    DEMAND = "demand"  # a request waited for it: nobody's wish, so it does not outlast a restart
    SLEEP = "sleep"  # somebody said so: not wanted, but what runs of it is kept where it can sleep
    EVICTED = "evicted"  # it made room for another, or idled too long; stays away until asked for


Note = Callable[[str, Word | None], None]


@dataclass(frozen=True, slots=True)
class Wanted:
    """One version that should serve. A generation answers to it with the same fingerprint and an
    epoch that is not older (a forced reload raises the epoch). `back`: an older one again, since what
    replaced it has failed; then of its epoch exactly: a forced reload of the same files is another."""

    spec: ModelSpec
    epoch: int = 0
    back: bool = False


class Before(NamedTuple):
    """What held of a model at a moment. `spoken`: how often people had said something of it."""

    word: Word | None
    said: Word | None
    epoch: int
    spoken: int


class Wishes:
    """`everything`: every model of the repository is wanted unless a word says otherwise; `named`:
    these are, in any case. `note` is told what was said last of a model, whenever that changes: LOAD,
    UNLOAD, SLEEP, or None for nothing that counts."""

    def __init__(
        self,
        *,
        everything: bool,
        named: Iterable[str] = (),
        note: Note = lambda model, said: None,
    ) -> None:
        self.everything = everything
        self.named = frozenset(named)
        self._note = note
        self._words: dict[str, Word] = {}
        self._said: dict[str, Word] = {}  # by people: LOAD, UNLOAD and SLEEP only
        self._epochs: dict[str, int] = {}
        self._spoken: dict[str, int] = {}  # how often, by people, and taken back
        self._before: dict[str, Before] = {}  # as of a load() not granted yet

    def recall(self, said: Mapping[str, str]) -> None:
        """What people said before the start. It wins over what the mode says."""
        self._said = {model: Word(word) for model, word in said.items()}
        self._words = dict(self._said)

    def load(self, model: str, *, force: bool = False) -> None:
        self._remember(model)
        self._words[model] = Word.LOAD
        self._speak(model, Word.LOAD)
        if force:
            self._epochs[model] = self._epochs.get(model, 0) + 1

    def demand(self, model: str) -> None:
        """A request waits for it. Says nothing new of what is wanted already."""
        if not self.wants(model):
            self._remember(model)
            self._words[model] = Word.DEMAND

    def need(self, model: str, *, asked: bool = False, said: bool = False) -> bool:
        """An ensemble that is wanted needs it; is that new? What people or evictions said of the model
        holds, unless somebody `asked` for the ensemble just now; and if he `said` so, that it was
        unloaded or put to sleep counts no more."""
        if self.wants(model) or (model in self._words and not asked):
            return False
        self._remember(model)
        self._words[model] = Word.NEEDED
        if said and self._said.get(model) is not Word.LOAD:
            self._say(model, None)
        return True

    def spare(self, model: str) -> bool:
        """Nothing needs it any more: it is wanted no longer if that was the only reason; was it?"""
        if self._words.get(model) is not Word.NEEDED:
            return False
        self._words.pop(model)
        self._before.pop(model, None)
        if self.wants(model):  # by the mode
            self._words[model] = Word.EVICTED
        return True

    def granted(self, model: str) -> None:
        """Something of it serves: what was said before counts no more."""
        self._before.pop(model, None)

    def withdraw(self, model: str) -> None:
        """What load() asked for could not be had: what held before holds again, or the model would
        come up by surprise some day."""
        if model in self._before:
            before = self._before.pop(model)
            self._put_back(model, before.word, before)

    def now(self, model: str) -> Before:
        return Before(
            self._words.get(model),
            self._said.get(model),
            self._epochs.get(model, 0),
            self._spoken.get(model, 0),
        )

    def take_back(self, model: str, before: Before) -> None:
        """The load() that was said right after `before` came to nothing, whether some of it served or
        not: as `withdraw`. Whatever anybody has said since holds."""
        if self._spoken.get(model, 0) != before.spoken + 1:
            return
        self._before.pop(model, None)
        word = self._words.get(model)  # of an eviction since, if it is not that load's
        self._put_back(model, before.word if word is Word.LOAD else word, before)

    def _put_back(self, model: str, word: Word | None, before: Before) -> None:
        self._epochs[model] = before.epoch
        self._words.pop(model, None)
        if word is not None:
            self._words[model] = word
        self._speak(model, before.said)

    def unload(self, model: str) -> None:
        self._words[model] = Word.UNLOAD
        self._speak(model, Word.UNLOAD)
        self._before.pop(model, None)

    def sleep(self, model: str) -> None:
        self._words[model] = Word.SLEEP
        self._speak(model, Word.SLEEP)
        self._before.pop(model, None)

    def evict(self, model: str) -> None:
        self._words[model] = Word.EVICTED
        self._before.pop(model, None)

    def forget(self, model: str) -> None:
        """Its folder is gone: what was evicted or unloaded by hand is history. A wish to load is
        kept, so that a model which is wanted by name is loaded when its folder comes back."""
        self._words.pop(model, None)
        if self._said.get(model) is Word.LOAD:
            self._words[model] = Word.LOAD
        else:
            self._say(model, None)
        self._epochs.pop(model, None)
        self._spoken.pop(model, None)
        self._before.pop(model, None)

    def _remember(self, model: str) -> None:
        self._before.setdefault(model, self.now(model))

    def _speak(self, model: str, said: Word | None) -> None:
        self._spoken[model] = self._spoken.get(model, 0) + 1
        self._say(model, said)

    def _say(self, model: str, said: Word | None) -> None:
        if self._said.get(model) is said:
            return
        self._said.pop(model, None)
        if said is not None:
            self._said[model] = said
        self._note(model, said)

    def wants(self, model: str) -> bool:
        word = self._words.get(model)
        if word is None:
            return self.everything or model in self.named
        return word in (Word.LOAD, Word.NEEDED, Word.DEMAND)

    def word(self, model: str) -> Word | None:
        return self._words.get(model)

    def said(self, model: str) -> Word | None:
        """By people, whatever has happened since: LOAD, UNLOAD, SLEEP or nothing."""
        return self._said.get(model)

    def wanted(self, folder: ModelFolder | None) -> Mapping[int, Wanted]:
        """By version. Empty where the model is not wanted, or has nothing that could be loaded."""
        return self._all(folder) if folder is not None and self.wants(folder.name) else {}

    def resting(self, folder: ModelFolder | None) -> Mapping[int, Wanted]:
        """By version: what may lie asleep. Not what was unloaded by hand, nor what is past."""
        if folder is None or self._words.get(folder.name) is Word.UNLOAD:
            return {}
        return self._all(folder)

    def _all(self, folder: ModelFolder) -> Mapping[int, Wanted]:
        epoch = self._epochs.get(folder.name, 0)
        return {version: Wanted(spec, epoch) for version, spec in folder.specs.items()}
