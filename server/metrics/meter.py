"""What a face tells whoever counts inference. The face knows nothing of metrics formats.

Both calls come from the event loop's thread, return at once and never raise.
"""

from __future__ import annotations

from typing import Literal, Protocol, TypeAlias

from server.metrics.traces import Trace

Outcome: TypeAlias = Literal[
    "success", "rejected", "canceled", "timeout", "backend_error", "bad_request"
]

# The label of a request that named no model we know: a client must not invent label values.
UNKNOWN_MODEL = "_unknown"


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
    ) -> None:
        """It is over. Without a lease: UNKNOWN_MODEL, version 0.

        duration_s   end to end, with reading the body and sending the answer
        input_s      from its head until the model was asked: body, decoding, checks
        queue_s      waiting for its batch; compute_s: inside the backend
        output_s     from the model's answer until it was handed over. (What is left of `duration_s` is
                     the way to the worker and back, and the loop's other work.)
        samples      rows of the batch axis (1 where the model does not batch); 0 if it did not run
        batch_size   of the whole batch that it was part of (0: it ran alone)
        trace        what it is known by elsewhere, where it said so and that may be shown
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
