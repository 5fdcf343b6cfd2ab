"""The part of the facade that is about adapters (`repository.repository` is the whole)."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Mapping

from repository.adapting import rows
from repository.adapting.desk import Desk
from repository.errors import ModelNotFoundError
from repository.lifecycle.generation import Generation
from repository.messages import InferRequest
from repository.names import shown
from repository.reports import AdapterView

MOST_TOLD = 5  # models that share an adapter's name
LOOK_S = 0.5  # how long a worker may take to say where its adapters are


class AdapterCalls(ABC):
    """What the facade brings: `_desk`, and the names and generations of its models."""

    _desk: Desk

    @abstractmethod
    def _model_of(self, name: str) -> str:
        """Aliases are followed. Raises ModelNotFoundError, InvalidNameError."""

    @abstractmethod
    def _of(self, name: str) -> list[Generation]:
        """Its generations, oldest first."""

    @abstractmethod
    def _not_draining(self) -> None:
        """Raises DrainingError."""

    async def register_adapter(
        self,
        model: str,
        name: str,
        src: str,
        *,
        preload: bool = True,
        pin: bool = False,
        options: Mapping[str, str] | None = None,
    ) -> AdapterView:
        """Returns when every READY generation has taken it; at once, after a look at its headers, where
        none runs. `src`: a folder in the model's own (relative paths begin there), in the repository,
        or in one of `Options.allowed_roots`.

        After any error nothing has changed: ModelNotFoundError, InvalidNameError, ConflictError for a
        name that is taken, InvalidRequestError, AdapterRefusedError, NoAdapterSlotError, NotKeptError
        where it could not be remembered beyond a restart.
        """
        known = self._wished(model)
        said = options or {}
        return await self._desk.register(known, name, src, preload=preload, pin=pin, options=said)

    async def update_adapter(
        self,
        model: str,
        name: str,
        *,
        src: str | None = None,
        preload: bool | None = None,
        pin: bool | None = None,
        options: Mapping[str, str] | None = None,
    ) -> AdapterView:
        """As `register_adapter`, of one that there is; None leaves things as they are, `options` are
        laid over the old ones. Raises AdapterNotFoundError too."""
        known = self._wished(model)
        return await self._desk.update(
            known, name, src=src, preload=preload, pin=pin, options=options
        )

    async def unregister_adapter(self, model: str, name: str) -> None:
        """Returns when no generation takes requests for it any more. What lies in the folder stays
        there, and stays unregistered until it is registered by call or its folder comes anew.

        Raises ModelNotFoundError, AdapterNotFoundError; NotKeptError where it is unregistered, and a
        restart may not know of it.
        """
        await self._desk.unregister(self._wished(model), name)

    def adapters(self, model: str) -> list[AdapterView]:
        """Those that are registered, by name. Where each is (`residence`) is what the workers said
        last. Raises ModelNotFoundError."""
        return self._desk.describe(self._model_of(model))

    async def adapters_now(self, model: str) -> list[AdapterView]:
        """As `adapters`, after asking the workers, which have LOOK_S to answer; and with those of the
        folder whose files are still being written."""
        known = self._model_of(model)
        shelf = self._desk.shelf
        await asyncio.gather(*[f.look(LOOK_S) for f in shelf.fittings(known)])
        return sorted([*self.adapters(known), *shelf.settling(known)], key=lambda view: view.name)

    def resolve(self, name: str) -> tuple[str, str]:
        """What OpenAI calls `model`, as (model, adapter): "m", "m:a", or the bare name of an adapter
        that only one model has. Whether the model has that adapter is seen when it is asked for.

        Raises ModelNotFoundError.
        """
        model, colon, adapter = name.partition(":")
        if colon and not adapter:
            raise ModelNotFoundError(f"'{shown(name)}' names no adapter behind its colon")
        try:
            return self._model_of(model), adapter
        except ModelNotFoundError:
            holders = self._desk.shelf.holders(name)
            if len(holders) == 1:
                return holders[0], name
            if not holders:
                raise
            told = ", ".join(f"{holder}:{name}" for holder in holders[:MOST_TOLD])
            raise ModelNotFoundError(
                f"no model '{shown(name)}' in the repository, and {len(holders)} models have an "
                f"adapter of that name: say which ({told})"
            ) from None

    def _wished(self, model: str) -> str:
        self._not_draining()
        return self._model_of(model)


def with_adapters(gen: Generation, request: InferRequest) -> InferRequest:
    """The request as the model gets it, for one that takes adapters or names one. Raises what
    `RowAdapters.name` does."""
    rows.check_inputs(request)
    if gen.rows is not None:
        return gen.rows.name(request)
    rows.refuse_names(request.parameters, gen.spec.model)
    return request


def check_adapter(gen: Generation, name: str) -> None:
    """Of a request that is not made of rows. Raises AdapterNotFoundError, AdapterRefusedError."""
    if gen.fitting is not None:
        gen.fitting.check(name)
        gen.fitting.asked(name)
    else:
        rows.refuse_names({rows.ONE: name}, gen.spec.model)
