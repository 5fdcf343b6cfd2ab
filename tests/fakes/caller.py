"""Other models, as a host may ask for them: those of a reconciler over fake hosts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from repository.errors import ModelNotReadyError
from repository.lifecycle.generation import Generation, Lease
from repository.messages import InferRequest, InferResponse
from repository.reconciler import Reconciler
from repository.responding import Responses


class FakeCaller:
    """`models` is asked at each call, as hosts are made before there is a reconciler."""

    def __init__(self, models: Callable[[], Reconciler]) -> None:
        self._models = models

    def lease(
        self, model: str, version: int | None = None, parameters: Mapping[str, Any] | None = None
    ) -> Lease:
        gen = self._models().routes.find(model, version)
        if gen is None:
            raise ModelNotReadyError(f"'{model}' does not serve")
        return gen.lease()

    def infer(self, gen: Generation, request: InferRequest) -> asyncio.Future[InferResponse]:
        assert gen.signature is not None and gen.batcher is not None
        gen.signature.accept(request)
        return gen.batcher.submit(request)

    def stream(self, gen: Generation, request: InferRequest) -> Responses:
        assert gen.signature is not None and gen.batcher is not None
        gen.signature.accept(request)
        return gen.batcher.open(request)

    def call(self, model: str, version: int | None, request: InferRequest) -> Responses:
        raise NotImplementedError

    async def load_by_name(
        self,
        model: str,
        config: Mapping[str, Any] | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        raise NotImplementedError

    async def unload_by_name(self, model: str, *, dependents: bool = False) -> None:
        raise NotImplementedError
