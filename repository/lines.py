"""What stands in front of one generation's host: where its requests wait for their turn. Which kind
it is follows from the model (`repository.entrance`)."""

from __future__ import annotations

import asyncio
from typing import Protocol

from repository.messages import InferRequest, InferResponse
from repository.responding import Responses


class Counting(Protocol):
    """
    executions, samples   what was given to the model, and the rows in it
    batches               rows of an execution -> how many there were, and their seconds
    in_flight             requests that the host has
    """

    @property
    def executions(self) -> int: ...

    @property
    def samples(self) -> int: ...

    @property
    def batches(self) -> dict[int, list[float]]: ...

    @property
    def in_flight(self) -> int: ...


class Line(Counting, Protocol):
    @property
    def queue_length(self) -> int: ...

    def submit(self, request: InferRequest) -> asyncio.Future[InferResponse]:
        """As `Batcher.submit`."""
        ...

    def open(self, request: InferRequest) -> Responses:
        """The same for one that may have any number of answers. Raises as `submit`."""
        ...

    def room(self, size: int) -> memoryview | None: ...

    def close(self, cause: BaseException) -> None:
        """What waits and what runs fails with `cause`, and so does whatever comes later."""
        ...
