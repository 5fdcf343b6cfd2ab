"""What a backend may offer beside `infer`. As there: plain calls, all from the backend's one thread.

A worker whose backend generates never waits inside it for long: it begins what was asked, cancels
what nobody wants any more, and steps as long as anything is unfinished. Between two steps it looks
for new requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from repository.adapters.orders import AdapterOrder, AdapterReport
from repository.backends.base import Backend, Order
from repository.errors import RepositoryError
from repository.figures import Figures
from repository.generate import Ended, GenerateRequest, Piece
from repository.lifecycle.placement import Memory
from repository.messages import InferRequest, InferResponse


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


class Sleeps(Backend, Protocol):
    """Offered where `Loaded.abilities` has "sleep": a backend whose loaded model cannot may have the
    methods all the same."""

    def sleep(self) -> None:
        """What is on the device goes to host memory, and the device gets its memory back. Nothing runs,
        and nothing is asked until `wake`. Raises what went wrong; then only `unload` is called."""
        ...

    def wake(self) -> None:
        """As before `sleep`, to the last bit. Raises what went wrong; then only `unload` is called."""
        ...


class Reply(Protocol):
    """One request's way back. Any thread may use it, also after `Asks.ask` has returned."""

    def send(self, response: InferResponse) -> None:
        """One answer."""
        ...

    def last(self, response: InferResponse) -> None:
        """`send` and `end` in one. Of a model that is not decoupled it may wait until `ask` returns, to
        go out with the answers to the others: for what is said right before that."""
        ...

    def end(self, error: RepositoryError | None = None) -> None:
        """The last word, once. Again: nothing."""
        ...

    @property
    def cancelled(self) -> bool:
        """Nobody wants the rest."""
        ...


class Asked(NamedTuple):
    """`request` is whole: its id, and all parameters (sequence_id, timeout, ...). Its tensors may be
    used until `reply` has ended."""

    request: InferRequest
    reply: Reply


class Others(Protocol):
    """The other models of the server. Any thread may call; the calls block, and raise what the call came
    to (RepositoryError)."""

    def call(
        self, model: str, version: int | None, request: InferRequest
    ) -> Iterator[InferResponse]:
        """Its answers as they come. Closing the iterator leaves the rest."""
        ...

    def load(
        self, model: str, config: str | None = None, files: Mapping[str, bytes] | None = None
    ) -> None:
        """`config` and `files` as `reports.Brought` has them."""
        ...

    def unload(self, model: str, dependents: bool = False) -> None:
        """`dependents`: of an ensemble, also the models that only it needs."""
        ...

    def is_ready(self, model: str, version: int | None = None) -> bool: ...

    def show(self, figures: Sequence[Figures]) -> None:
        """What the model counts itself, all of it. Of what was shown before nothing is left. Raises
        OSError where nobody is there any more."""
        ...


class Asks(Backend, Protocol):
    """Offered where `Loaded.abilities` has "ask": takes several requests at once, as they are."""

    def meet(self, others: Others) -> None:
        """Before `load`, and only in a worker process: how to ask other models."""
        ...

    def ask(self, asked: Sequence[Asked]) -> None:
        """The model's thread is here until it can take the next ones. What it raises, all of those end
        with that have not ended."""
        ...

    def is_ready(self) -> bool:
        """What the model says of itself; only where `Loaded.abilities` has "ready". What it raises means
        no."""
        ...


class Measures(Backend, Protocol):
    def memory(self) -> Memory:
        """Bytes by device and kind (weights, kv, adapters), as far as it holds them now; what sleeps
        under "host". Of a GPU all that the process has there, workspace and context too; of the CPU
        only what it knows: whoever measures the process adds the rest. It imports nothing for that,
        and starts no device."""
        ...


class Validates(Backend, Protocol):
    def validate(self, order: Order) -> None:
        """In place of `load`, without the memory that a load takes, and nothing on a device. Raises
        what `load` would, as far as headers and structure show it; `unload` comes next."""
        ...
