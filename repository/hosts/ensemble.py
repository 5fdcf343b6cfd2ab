"""Where an ensemble runs: nowhere of its own. Its steps are requests to other models of this server,
which batch, count and answer as for any client; what is here only hands tensors from one to the next.

It needs no worker and no memory. That its models serve before it does, and what becomes of it when they
leave, is the planner's business (`repository.composing`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from repository.adapters.orders import AdapterOrder, AdapterReport
from repository.calling import Caller
from repository.errors import (
    ComposingModelError,
    ConfigError,
    InvalidRequestError,
    InvalidTensorError,
    LoadFailedError,
    RepositoryError,
    WorkerDiedError,
)
from repository.generate import Ended, GenerateRequest, Piece
from repository.hosts.crew import Crew, Crews
from repository.hosts.flow import Run
from repository.lifecycle.placement import Memory
from repository.messages import InferRequest, InferResponse, Loaded
from repository.prompt import Prompt
from repository.responding import Responses
from repository.spec import ModelSpec
from repository.wiring import Needs, Wiring

STOPPED = "the ensemble was stopped before it answered; ask again"


class EnsembleHost:
    """`running`: its requests that are on their way."""

    def __init__(self, caller: Caller) -> None:
        self.died: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.slots = 1
        self.running: set[Run] = set()
        self._caller = caller
        self._needs: Needs | None = None
        self._crews: Crews | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    async def load(self, spec: ModelSpec, devices: Sequence[str]) -> Loaded:
        """Its models serve already. Raises ComposingModelError for what may mend itself with them."""
        try:
            wiring = Wiring(spec.model, spec.config)
        except ConfigError as error:
            raise LoadFailedError(str(error)) from error
        crews = Crews(wiring, self._caller)
        try:
            crew = crews.hire()
        except RepositoryError as error:
            raise ComposingModelError(str(error)) from error
        steps = [f"{gen.spec.model}:{gen.spec.version}" for gen in crew.gens]
        fitted = crew.fitted
        crew.let_go()
        self._needs, self._crews = Needs(wiring), crews
        return Loaded(
            inputs=fitted.inputs,
            outputs=fitted.outputs,
            max_batch_size=spec.config.max_batch_size,
            platform="ensemble",
            details={"steps": steps},
            abilities=("decoupled",) if spec.config.decoupled else (),
        )

    @property
    def blocked(self) -> dict[object, list[Any]]:
        """A request to it waits for the models of its steps (see `calls.circular`)."""
        gens = self._crews.gens if self._crews is not None else ()
        return {self: [gen.host for gen in gens if gen.host is not None]}

    def hire(self, parameters: Mapping[str, Any] | None) -> Crew:
        """Holds all models that it needs, also for a larger ensemble that will ask it."""
        if self._crews is None:
            raise WorkerDiedError(STOPPED)
        return self._crews.hire(parameters)

    def begin(
        self,
        request: InferRequest,
        tell: Callable[[InferResponse], None],
        end: Callable[[BaseException | None], None],
        read: Callable[[int], Awaitable[None]] | None = None,
    ) -> Run:
        """`tell` is called with each answer, then `end` once, perhaps before this returns. `read`: as
        `Responses.until_read`, so that no more answers are made than are read. Raises what a step's
        model cannot be had for."""
        if self._needs is None:
            raise WorkerDiedError(STOPPED)
        needs = self._needs
        _check_names(needs.wiring, request)
        crew = self.hire(request.parameters)

        def over(error: BaseException | None) -> None:
            self._out(run)
            end(error)

        needed = needs.of(request.outputs)
        run = Run(self._caller, needs.wiring, crew, needed, request, tell, over, read)
        self.running.add(run)
        self._idle.clear()
        run.start()
        return run

    def leave(self, run: Run) -> None:
        """Nobody wants the rest of it."""
        run.leave()
        self._out(run)

    def _out(self, run: Run) -> None:
        self.running.discard(run)
        if not self.running:
            self._idle.set()

    def infer(self, request: InferRequest, at: int | None = None) -> asyncio.Future[InferResponse]:
        future: Prompt[InferResponse] = Prompt(loop=asyncio.get_running_loop())
        future.listener = None
        found: list[InferResponse] = []

        def end(error: BaseException | None) -> None:
            if future.done():
                return
            if error is None and found:
                future.set_result(found[0])
            else:
                future.set_exception(error or WorkerDiedError(STOPPED))

        run = self.begin(request, found.append, end)
        future.add_done_callback(lambda done: self.leave(run) if done.cancelled() else None)
        return future

    def ask(self, requests: Sequence[Responses], at: int | None = None) -> asyncio.Future[None]:
        raise NotImplementedError("an ensemble is not asked so")

    def room(self, size: int) -> memoryview | None:
        """None: which of its models will read the body is not known."""
        return None

    def generate(
        self, request: GenerateRequest, tell: Callable[[Piece], None]
    ) -> asyncio.Future[Ended]:
        raise InvalidRequestError("an ensemble does not generate text")

    async def adapt(self, orders: Sequence[AdapterOrder]) -> list[AdapterReport]:
        raise InvalidRequestError("an ensemble takes no adapters")

    async def memory(self) -> Memory:
        """Nothing: what its models have is theirs."""
        return {}

    def figures(self) -> Sequence[bytes]:
        return ()

    async def ready(self) -> bool:
        """Its models are asked for themselves."""
        return True

    async def sleep(self) -> None:
        raise InvalidRequestError("an ensemble cannot sleep")

    async def wake(self) -> None:
        raise InvalidRequestError("an ensemble does not sleep")

    async def validate(self, spec: ModelSpec, device: str) -> None:
        try:
            Wiring(spec.model, spec.config)
        except ConfigError as error:
            raise LoadFailedError(str(error)) from error

    async def stop(self, grace_s: float) -> None:
        try:
            async with asyncio.timeout(grace_s):
                await self._idle.wait()
        except TimeoutError:
            pass
        for run in list(self.running):
            run.fail(WorkerDiedError(STOPPED))
        self._needs = self._crews = None


def _check_names(wiring: Wiring, request: InferRequest) -> None:
    """Of an ensemble whose models do not say what they take, its own config still does."""
    for tensor in request.inputs:
        if tensor.name not in wiring.inputs:
            raise InvalidTensorError(
                f"unexpected inference input '{tensor.name}' for model '{wiring.name}'"
            )
    for name in request.outputs:
        if name not in wiring.outputs:
            raise InvalidTensorError(
                f"unexpected inference output '{name}' for model '{wiring.name}'"
            )
    missing = set(wiring.inputs) - {tensor.name for tensor in request.inputs}
    if missing and wiring.config.inputs is None and not request.inputs:
        raise InvalidTensorError(f"model '{wiring.name}' needs the input '{min(missing)}'")
