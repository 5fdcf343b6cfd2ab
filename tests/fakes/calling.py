"""A `Caller` with a few hosts behind it and no repository."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, cast

from repository.errors import ModelNotFoundError, RepositoryError
from repository.hosts.base import Host
from repository.lifecycle.generation import Generation, Lease
from repository.lines import Line
from repository.messages import InferRequest, InferResponse
from repository.responding import Responses


class OtherModels:
    """`models`: name -> its line and its host; `answering`: name -> what it answers. `leases`: calls
    that are under way; `calls`: all that came. `told`: what was loaded and unloaded."""

    def __init__(self) -> None:
        self.models: dict[str, tuple[Line, Host]] = {}
        self.leases = 0
        self.calls: list[str] = []
        self.told: list[tuple[str, str, object]] = []
        self.answering: dict[str, Callable[[InferRequest], Responses]] = {}

    def lease(
        self,
        model: str,
        version: int | None = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> Lease:
        if model in self.answering:
            return _leased(None)
        if model not in self.models:
            raise ModelNotFoundError(f"Request for unknown model: '{model}' is not found")
        return _leased(self.models[model][1])

    def infer(self, gen: Generation, request: InferRequest) -> asyncio.Future[InferResponse]:
        raise NotImplementedError("models do not ask so")

    def stream(self, gen: Generation, request: InferRequest) -> Responses:
        raise NotImplementedError("models do not ask so")

    def call(self, model: str, version: int | None, request: InferRequest) -> Responses:
        self.calls.append(model)
        try:
            self.lease(model, version)
            if model in self.answering:
                responses = self.answering[model](request)
            else:
                responses = self.models[model][0].open(request)
        except RepositoryError as error:
            responses = Responses(request)
            responses.end(error)
            return responses
        self.leases += 1
        asyncio.create_task(self._until_over(responses))  # noqa: RUF006 - it ends with the call
        return responses

    async def _until_over(self, responses: Responses) -> None:
        while not responses.over:  # noqa: ASYNC110 - it has one listener, and that is not us
            await asyncio.sleep(0.005)
        self.leases -= 1

    async def load_by_name(
        self,
        model: str,
        config: Mapping[str, Any] | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        if model == "broken":
            raise ModelNotFoundError("failed to load 'broken', no such model")
        self.told.append(("load", model, (config, dict(files)) if files else config))

    async def unload_by_name(self, model: str, *, dependents: bool = False) -> None:
        self.told.append(("unload", model, dependents or None))


def _leased(host: Host | None) -> Lease:
    return cast("Lease", SimpleNamespace(generation=SimpleNamespace(host=host, says_ready=_yes)))


async def _yes() -> bool:
    return True
