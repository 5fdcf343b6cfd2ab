"""Models as OpenAI's clients list them. An adapter is a model of its own, "model:adapter", whose
`parent` is its model, as vLLM's servers list theirs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

from repository.lifecycle.status import ModelStatus, Public
from repository.reports import AdapterView

BETWEEN = ":"  # a model and its adapter; no model's name may hold one


class ModelCard(msgspec.Struct):
    """`root`: the model that does the work. `status`: loaded or not."""

    id: str
    created: int
    owned_by: str
    status: str
    root: str
    parent: str | None = None
    object: Literal["model"] = "model"


def cards_of(status: ModelStatus, adapters: Iterable[AdapterView], owner: str) -> list[ModelCard]:
    """The model, and then those of its adapters that can be used."""
    name, created, word = status.name, created_of(status), word_of(status.state)
    cards = [ModelCard(name, created, owner, word, name)]
    for adapter in adapters:
        if adapter.state != "failed":
            id = f"{name}{BETWEEN}{adapter.name}"
            cards.append(ModelCard(id, created, owner, word, name, name))
    return cards


def word_of(state: Public) -> str:
    """One of PolarGrid's four."""
    return Public.UNLOADED if state is Public.UNLOADING else state


def created_of(status: ModelStatus) -> int:
    """Seconds since 1970 of the folder's last change; 0 where it is not known."""
    newest = status.folder.newest_ctime if status.folder else 0.0
    return int(newest) if 0 < newest < float("inf") else 0
