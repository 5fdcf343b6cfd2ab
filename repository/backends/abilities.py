"""What a backend may offer beside `infer`. As there: plain calls, all from the backend's one thread.

A worker whose backend generates never waits inside it for long: it begins what was asked, cancels
what nobody wants any more, and steps as long as anything is unfinished. Between two steps it looks
for new requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from repository.adapters.orders import AdapterOrder, AdapterReport
from repository.backends.base import Backend
from repository.errors import RepositoryError
from repository.generate import Ended, GenerateRequest, Piece


class Told(NamedTuple):
    """One thing that a step has to say of the sequence `number`. Ended or an error is the last."""

    number: int
    what: Piece | Ended | RepositoryError


class Generates(Backend, Protocol):
    """`begin` takes a sequence in, without running the model; raises InvalidRequestError for one that
    cannot run, AdapterNotFoundError. `number` is the caller's own.

    `step` does one round (a piece of a prompt, one token for every running sequence) and returns what
    there is to tell. It does not raise for what one sequence did: if it raises, all of them have
    failed and are cancelled, and one more step must end them, or the worker ends. `cancel` ends a
    sequence at the next step, which tells Ended("cancelled"); of one that has ended: nothing.
    """

    @property
    def unfinished(self) -> int:
        """Sequences that have begun and not ended."""
        ...

    def begin(self, number: int, request: GenerateRequest) -> None: ...

    def cancel(self, number: int) -> None: ...

    def step(self) -> Sequence[Told]: ...


class Adapts(Backend, Protocol):
    """Requests name adapters: in the input ROW_ADAPTERS, or in GenerateRequest.adapter."""

    def adapt(self, orders: Sequence[AdapterOrder]) -> list[AdapterReport]:
        """One report for each order, in their order. Never raises for what one of them is. With no
        orders: where each adapter is now; those that are in no memory may be left out."""
        ...
