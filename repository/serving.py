"""The part of the facade that is used: leases, requests, texts, and what models ask of each other
(`repository.repository` is the whole)."""

from __future__ import annotations

import asyncio
import json
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from repository.adapting.calls import check_adapter, with_adapters
from repository.demand import Take
from repository.errors import (
    InvalidRequestError,
    ModelNotFoundError,
    ModelNotReadyError,
    RepositoryError,
    UnsupportedRequestError,
    VersionNotFoundError,
    retold,
)
from repository.folder.mounts import is_path
from repository.generate import GenerateRequest
from repository.lifecycle.generation import Generation, Lease
from repository.lifecycle.refusals import not_serving
from repository.lifecycle.status import ModelStatus
from repository.loading import Loading
from repository.messages import InferRequest, InferResponse
from repository.names import check_name, shown
from repository.prompt import error_of, listen
from repository.reports import Brought, StepReport
from repository.responding import Responses
from repository.sequences.asked import going_on
from repository.streaming import TokenStream

NOT_SERVING = (ModelNotReadyError, VersionNotFoundError)  # what may be changed by loading it

HANDED_ON = 16  # answers of a call that wait for whoever called


class Serving(Loading):
    _calls: set[asyncio.Task[None]]  # of models by models

    @abstractmethod
    def status(self, model: str) -> ModelStatus:
        """As `Repository.status`."""

    @abstractmethod
    def loads_on_request(self, model: str) -> bool:
        """As `Sleeping.loads_on_request`."""

    def lease(
        self,
        model: str,
        version: int | None = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> Lease:
        """A lease, not yet begun, on the newest READY generation; without a version, of the highest
        version that is READY. Aliases are followed. `parameters` of the request: one that goes on with
        a sequence goes where that has begun, also if it drains.

        Raises ModelNotFoundError, InvalidNameError, VersionNotFoundError, ModelNotReadyError.
        """
        if parameters and (sequence := going_on(parameters)) is not None:
            gen = self._models.routes.begun(model, version, sequence)
            if gen is not None:
                return gen.lease(late=True)
        gen = self._models.routes.find(model, version)
        if gen is None and is_path(model):
            model = self.named(model)
            gen = self._models.routes.find(model, version)
        if gen is None:
            raise self._why_not(model, version)
        return gen.lease()

    @property
    def on_demand(self) -> bool:
        """May a request load any model that it names? See `loads_on_request`."""
        return self.options.on_demand

    def demand(self, model: str, version: int | None, take: Take) -> asyncio.Future[None]:
        """For a request that could not have a lease: loads the model, waits for it, and gives `take` a
        lease that has begun, in the breath in which the model serves. Then the future is done; who
        cancels it waits no longer. All that wait for a model share one load.

        Raises at once what waiting cannot change (what `lease` raises; NoRoomError for what is too
        large), QueueFullError, DrainingError. The future fails with the same, and with
        StillLoadingError when it has taken too long.
        """
        self._not_draining()
        return self._models.wait_for(model, version, take)

    def waiting(self, model: str) -> int:
        """Requests that wait for it to load."""
        return self._models.demand.count(model)

    def infer(self, gen: Generation, request: InferRequest) -> asyncio.Future[InferResponse]:
        """Call it between a lease's begin and end.

        Raises at once, before any device work: InvalidTensorError for a request that does not fit
        the model, InvalidRequestError, AdapterNotFoundError and AdapterRefusedError for the adapters
        that it names, QueueFullError. The future fails with InferenceFailedError, WorkerDiedError.
        """
        assert gen.signature is not None and gen.batcher is not None
        gen.signature.accept(request)
        if gen.rows is not None or request.parameters or not gen.signature.inputs:
            request = with_adapters(gen, request)
        return gen.batcher.submit(request)

    def stream(self, gen: Generation, request: InferRequest) -> Responses:
        """As `infer`, of any model: one answer, or any number where its `loaded.abilities` have
        "decoupled". Close it when nobody reads it any more. What `infer`'s future fails with the
        iteration raises."""
        assert gen.signature is not None and gen.batcher is not None
        gen.signature.accept(request)
        if gen.rows is not None or request.parameters or not gen.signature.inputs:
            request = with_adapters(gen, request)
        return gen.batcher.open(request)

    def steps(self, status: ModelStatus) -> list[StepReport]:
        """Of an ensemble, as its newest version has them; of any other model none."""
        specs = status.folder.specs if status.folder is not None else {}
        ensemble = specs[max(specs)].config.ensemble if specs else None
        found: list[StepReport] = []
        for step in ensemble.steps if ensemble is not None else ():
            gen = self._models.routes.find(step.model, step.version)
            serving = gen.spec.version if gen is not None else None
            found.append(StepReport(step.model, step.version, serving))
        return found

    # models that ask models -----------------------------------------------------------------------

    def call(self, model: str, version: int | None, request: InferRequest) -> Responses:
        """As `calling.Caller` has it."""
        answers = Responses(request)
        try:
            lease = self.lease(model, version, request.parameters)
            lease.begin()
        except RepositoryError as error:
            if isinstance(error, NOT_SERVING) and self.loads_on_request(model):
                self._call_later(model, version, answers)
            else:
                answers.end(error)
        else:
            self._call_now(lease, answers)
        return answers

    def _call_later(self, model: str, version: int | None, answers: Responses) -> None:
        """Once it is loaded."""
        try:
            waiter = self.demand(model, version, lambda lease: self._call_now(lease, answers))
        except RepositoryError as error:
            answers.end(error)
            return

        def over(waited: asyncio.Future[None]) -> None:
            if not waited.cancelled() and waited.exception() is not None:
                answers.end(waited.exception())

        answers.on_close = _leaves(waiter)
        waiter.add_done_callback(over)

    def _call_now(self, lease: Lease, answers: Responses) -> None:
        """`lease` has begun. Never raises."""
        gen = lease.generation
        try:
            if gen.decoupled:
                self._carry(lease, self.stream(gen, answers.request), answers)
                return
            future = self.infer(gen, answers.request)
        except Exception as error:  # noqa: BLE001 - whatever is wrong, who asked is told
            lease.end(used=False)
            answers.end(error)
            return

        def told(answer: asyncio.Future[InferResponse]) -> None:
            lease.end()
            error = error_of(answer)
            if error is None:
                answers.tell(answer.result())
            answers.end(error)

        answers.on_close = _leaves(future)
        listen(future, told)

    def _carry(self, lease: Lease, given: Responses, answers: Responses) -> None:
        """Of a model that gives any number of answers."""

        def over(call: asyncio.Task[None]) -> None:
            """However it ended: of one that was left before it began, nothing has run."""
            self._calls.discard(call)
            given.close()
            lease.end()
            if not call.cancelled():
                answers.end(call.exception())

        call = asyncio.create_task(_hand_on(given, answers))
        self._calls.add(call)
        call.add_done_callback(over)
        answers.on_close = _leaves(call)

    async def load_by_name(
        self,
        model: str,
        config: Mapping[str, Any] | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        if files and not self.options.allow_files:
            raise UnsupportedRequestError(
                f"the load of '{shown(model)}' brings files, which is disabled; start the server with "
                "--allow-file-override to enable it"
            )
        if files and config is None:
            raise InvalidRequestError(
                f"the load of '{shown(model)}' brings files; it needs the config that they "
                "are loaded under"
            )
        said = None if config is None else json.dumps(config)  # Triton's words for a config
        await self.load(model, config=Brought(said, files or {}))

    async def unload_by_name(self, model: str, *, dependents: bool = False) -> None:
        await self.unload(model, unload_dependents=dependents)

    def generate(self, gen: Generation, request: GenerateRequest) -> TokenStream:
        """One sequence, as it is written. Call it between a lease's begin and end; close the stream
        when nobody reads it any more.

        Raises at once: InvalidRequestError where the model does not generate, QueueFullError. What
        the model says of the request (AdapterNotFoundError, ...) the stream raises.
        """
        if gen.streams is None:
            raise InvalidRequestError(
                f"model '{gen.spec.model}' does not generate text; its backend is "
                f"'{gen.spec.backend}'"
            )
        if request.adapter:
            check_adapter(gen, request.adapter)
        return gen.streams.open(request)

    def room(self, model: str, version: int | None, size: int) -> memoryview | None:
        """A place near where the model runs for a request's body of `size` bytes, given back when the
        last view of it dies. None: there is none, keep the body yourself.

        It is no lease: if the generation has ended when the body is there, the place is memory like
        any other.
        """
        gen = self._models.routes.find(model, version)
        return None if gen is None or gen.batcher is None else gen.batcher.room(size)

    def _why_not(self, name: str, version: int | None) -> RepositoryError:
        model = self._models.routes.model(name)
        if model in self._models.folders or self._of(model):
            error = not_serving(name, version, self.status(model))
            away = self._models.away(model) if self._models.wishes.wants(model) else ""
            return retold(error, f"{error}: {away}") if away else error
        check_name(name)
        why = self._seen.near(name)
        return ModelNotFoundError(
            f"Request for unknown model: '{shown(name)}' is not found{f': {why}' if why else ''}"
        )


async def _hand_on(given: Responses, answers: Responses) -> None:
    async for response in given:
        answers.tell(response)
        await answers.until_read(HANDED_ON)


def _leaves(future: asyncio.Future[Any]) -> Callable[[Responses], None]:
    def leave(answers: Responses) -> None:
        future.cancel()

    return leave
