"""What a face tells whoever counts inference. The face knows nothing of metrics formats.

Both calls come from the event loop's thread, return at once and never raise.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple, Protocol, TypeAlias

from repository.tensors import Tensor
from server.metrics.traces import Trace

Outcome: TypeAlias = Literal[
    "success", "rejected", "canceled", "timeout", "backend_error", "bad_request"
]

# The label of a request that named no model we know: a client must not invent label values.
UNKNOWN_MODEL = "_unknown"


class Traced(Protocol):
    """A request that has ended, as whoever ran it still knows it. Asked of a traced one only."""

    @property
    def request_id(self) -> str: ...

    @property
    def inputs(self) -> Iterable[Tensor]: ...

    @property
    def outputs(self) -> Iterable[Tensor]: ...


class Times(NamedTuple):
    """Seconds, as in `InferMeter.done`."""

    duration_s: float
    input_s: float
    queue_s: float
    compute_s: float
    output_s: float


class Tracer(Protocol):
    """`active`: it wants to be told."""

    active: bool

    def ended(
        self,
        model: str,
        version: int,
        outcome: str,
        times: Times,
        *,
        protocol: str,
        parent: Trace | None = None,
        of: Traced | None = None,
    ) -> None:
        """A request that held a lease has ended. Returns at once, and never raises."""
        ...


class InferMeter(Protocol):
    """Every request ends in exactly one `done`; `begin` comes before it iff a lease was taken.
    `wrote` may come before it, of one that held a lease."""

    def begin(self, model: str, version: int) -> None:
        """A request holds a lease on this model."""
        ...

    def done(
        self,
        model: str,
        version: int,
        outcome: Outcome,
        *,
        duration_s: float,
        queue_s: float = 0.0,
        input_s: float = 0.0,
        compute_s: float = 0.0,
        output_s: float = 0.0,
        samples: int = 0,
        batch_size: int = 0,
        protocol: str = "http",
        trace: Trace | None = None,
        of: Traced | None = None,
    ) -> None:
        """It is over. Without a lease: UNKNOWN_MODEL, version 0.

        duration_s   end to end, with reading the body and sending the answer
        input_s      from its head until the model was asked: body, decoding, checks
        queue_s      waiting for its batch; compute_s: inside the backend, 0 where it was not run
        output_s     from the model's answer until it was handed over. (What is left of `duration_s` is
                     the way to the worker and back, and the loop's other work.)
        samples      rows of the batch axis (1 where the model does not batch); 0 if it did not run
        batch_size   of the whole batch that it was part of (0: it ran alone)
        trace        what it is known by elsewhere, where it said so and that may be shown
        of           the request itself, for whoever traces it
        """
        ...

    def wrote(
        self,
        model: str,
        version: int,
        *,
        prompt_tokens: int,
        completion_tokens: int,
        first_s: float | None = None,
    ) -> None:
        """Tokens that were read and written, those that nobody waited for included.

        first_s   from the request to the first that it was told; None: it was told none
        """
        ...

    def answered(
        self, model: str, version: int, index: int, *, good: bool, empty: bool, took_s: float
    ) -> None:
        """One answer of a model that may give any number: its place in the row from 0, whether it was
        one (`empty`: without tensors), and the seconds since the one before."""
        ...
