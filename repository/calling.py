"""What a model may ask of other models: one step of an ensemble, a call from a model's own code.

The facade is the `Caller`; hosts get it with their birth and know nothing else of the repository.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Protocol

from repository.lifecycle.generation import Generation, Lease
from repository.messages import InferRequest, InferResponse
from repository.responding import Responses


class Caller(Protocol):
    def lease(
        self,
        model: str,
        version: int | None = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> Lease:
        """As `Repository.lease`."""
        ...

    def infer(self, gen: Generation, request: InferRequest) -> asyncio.Future[InferResponse]:
        """As `Repository.infer`, on a generation that is leased."""
        ...

    def stream(self, gen: Generation, request: InferRequest) -> Responses:
        """As `Repository.stream`, the same."""
        ...

    def call(self, model: str, version: int | None, request: InferRequest) -> Responses:
        """As a client's request, but for the key: admission, batching, statistics and all. It holds a
        lease of its own until the answers have ended or nobody wants them.

        Never raises: whatever is wrong is what the answers end with.
        """
        ...

    async def load_by_name(
        self,
        model: str,
        config: Mapping[str, Any] | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        """As `Repository.load`. Raises UnsupportedRequestError for files where loads may bring none."""
        ...

    async def unload_by_name(self, model: str, *, dependents: bool = False) -> None:
        """As `Repository.unload`."""
        ...
