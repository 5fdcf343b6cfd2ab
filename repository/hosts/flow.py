"""One request to an ensemble, on its way through the steps.

    its tensors ─▶ every step whose inputs are there is asked at once ─▶ what it answers is more tensors
      └─ a step with any number of answers: each of them is a Flow of its own from there on

A step's answer is handed to the next as it is: the same bytes under another name. Flows go on side by
side; what comes out of them is told in the order in which they began.

Rule: `end` is called once, whatever happens, unless the request has been left (`leave`). All of it runs
on the loop's thread.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial

from repository.calling import Caller
from repository.errors import InferenceFailedError, InvalidRequestError, RepositoryError, retold
from repository.hosts.crew import Crew
from repository.messages import InferRequest, InferResponse, Parameters
from repository.prompt import error_of, listen, own
from repository.tensors import Tensor
from repository.wiring import Step, Wiring

STOPPED = "its model was stopped before it answered; ask again"


@dataclass(slots=True, eq=False)
class Flow:
    """`tensors`: those that were made here (None: it will not come). `wants`: step -> how many of its
    tensors are not there yet. `left`: steps of this level that are not done, but for one that gives any
    number of answers: that is `gives`, and each of its answers is one of `below`."""

    above: Flow | None
    level: int
    tensors: dict[str, Tensor | None]
    wants: dict[int, int] = field(default_factory=dict)
    left: int = 0
    gives: bool = False
    below: deque[Flow] = field(default_factory=deque)
    parameters: Parameters = field(default_factory=dict)

    def knows(self, tensor: str) -> bool:
        at: Flow | None = self
        while at is not None:
            if tensor in at.tensors:
                return True
            at = at.above
        return False

    def find(self, tensor: str) -> Tensor | None:
        at: Flow | None = self
        while at is not None:
            if tensor in at.tensors:
                return at.tensors[tensor]
            at = at.above
        return None

    @property
    def done(self) -> bool:
        """All steps are, here and above."""
        at: Flow | None = self
        while at is not None:
            if at.left:
                return False
            at = at.above
        return True


class Run:
    """`needed`: the steps that the wanted outputs come from. `tell` and `end`: as of `Responses`.
    `read`: as `Responses.until_read`. It may tell any number of answers where its config says
    decoupled; else exactly one."""

    def __init__(
        self,
        caller: Caller,
        wiring: Wiring,
        crew: Crew,
        needed: frozenset[int],
        request: InferRequest,
        tell: Callable[[InferResponse], None],
        end: Callable[[BaseException | None], None],
        read: Callable[[int], Awaitable[None]] | None = None,
    ) -> None:
        self.over = False
        self._until_read = read
        self._caller, self._wiring, self._crew, self._needed = caller, wiring, crew, needed
        self._request = request
        self._tell, self._end = tell, end
        self._several = wiring.config.decoupled
        self._most = wiring.config.ensemble.max_inflight if wiring.config.ensemble else 0
        self._many = [i for i in crew.fitted.many if i in needed]
        self._told = 0
        self._asking: set[asyncio.Future[InferResponse]] = set()
        self._reading: set[asyncio.Task[None]] = set()
        self._moved = asyncio.Event()
        self._root: Flow | None = None
        self._began = time.perf_counter()

    def start(self) -> None:
        tensors: dict[str, Tensor | None] = dict.fromkeys(self._wiring.inputs)
        tensors |= {tensor.name: tensor for tensor in self._request.inputs}
        self._root = Flow(None, 0, tensors)
        self._enter(self._root)

    def leave(self) -> None:
        """Nobody wants the rest."""
        self._stop()

    def fail(self, error: BaseException) -> None:
        if not self.over:
            self._stop()
            self._end(error)

    def _stop(self) -> None:
        if self.over:
            return
        self.over = True
        for future in self._asking:
            future.cancel()
        for task in self._reading:
            task.cancel()
        self._asking.clear()
        self._root = None
        self._crew.let_go()

    # through the steps ------------------------------------------------------------------------------

    def _enter(self, flow: Flow) -> None:
        """Asks all steps of its level that can be asked."""
        level = self._crew.fitted.level
        mine = [i for i in self._wiring.order if i in self._needed and level[i] == flow.level]
        flow.gives = any(i in self._many for i in mine)
        flow.left = len(mine) - flow.gives
        for i in mine:
            tensors = {t for _, t in self._wiring.steps[i].inputs}
            flow.wants[i] = sum(not flow.knows(t) for t in tensors)
        for i in mine:
            if flow.wants.get(i) == 0:
                self._ask(flow, i)
        self._look()

    def _ask(self, flow: Flow, i: int) -> None:
        if self.over:
            return
        del flow.wants[i]
        step = self._wiring.steps[i]
        inputs = [
            Tensor(name, found.datatype, found.shape, found.data)
            for name, tensor in step.inputs
            if (found := flow.find(tensor)) is not None
        ]
        if step.inputs and not inputs:  # nothing comes, so nothing comes of it
            self._skip(flow, step)
            return
        request = InferRequest(
            inputs, step.asks, id=self._request.id, parameters=self._request.parameters
        )
        if i in self._many:
            task = asyncio.create_task(self._read(flow, step, request))
            self._reading.add(task)
            task.add_done_callback(self._reading.discard)
            return
        try:
            future = self._caller.infer(self._crew.gens[i], request)
        except Exception as error:  # noqa: BLE001 - whatever broke, its client is told
            self._broke(step, error)
            return
        self._asking.add(future)
        listen(future, partial(self._answered, flow, step))

    def _answered(self, flow: Flow, step: Step, future: asyncio.Future[InferResponse]) -> None:
        self._asking.discard(future)
        error = error_of(future)
        if self.over:
            return
        if error is not None:
            self._broke(step, error)
        else:
            self._made(flow, step, future.result())

    async def _read(self, flow: Flow, step: Step, request: InferRequest) -> None:
        """Of a step with any number of answers."""
        try:
            answers = self._caller.stream(self._crew.gens[step.index], request)
            try:
                async for response in answers:
                    await self._room(flow)
                    below = Flow(flow, flow.level + 1, _named(step, response))
                    below.parameters = response.parameters
                    flow.below.append(below)
                    self._enter(below)
            finally:
                answers.close()
        except Exception as error:  # noqa: BLE001 - as above
            self._broke(step, error)
            return
        flow.gives = False
        self._look()

    def _skip(self, flow: Flow, step: Step) -> None:
        if step.index in self._many:
            flow.gives = False
        else:
            self._made(flow, step, InferResponse([]))

    async def _room(self, flow: Flow) -> None:
        while self._most and len(flow.below) >= self._most:
            self._moved.clear()
            await self._moved.wait()
        # One reader waits at a time; of steps behind each other several would.
        if self._most and self._until_read is not None and len(self._many) == 1:
            await self._until_read(self._most)

    def _made(self, flow: Flow, step: Step, response: InferResponse) -> None:
        flow.tensors |= _named(step, response)
        flow.parameters |= response.parameters
        flow.left -= 1
        self._spread(flow, {tensor for _, tensor in step.outputs})
        self._look()

    def _spread(self, flow: Flow, made: set[str]) -> None:
        """Steps that have waited for these, here and below."""
        for i in list(flow.wants):
            tensors = {t for _, t in self._wiring.steps[i].inputs} & made
            if tensors:
                flow.wants[i] -= len(tensors)
                if flow.wants[i] == 0:
                    self._ask(flow, i)
        for below in list(flow.below):
            self._spread(below, made)

    # what comes out ---------------------------------------------------------------------------------

    def _look(self) -> None:
        """Tells what has its turn."""
        if not self.over and self._root is not None and self._drain(self._root):
            if not self._told and not self._several:
                self.fail(self._of(InferenceFailedError("it gave no answer")))
            elif not self.over:
                self._stop()
                self._end(None)

    def _drain(self, flow: Flow) -> bool:
        """All of it has been told."""
        if flow.level == len(self._many):
            return flow.done and self._answer(flow)
        while flow.below:
            if not self._drain(flow.below[0]):
                return False
            flow.below.popleft()
            self._moved.set()
        return flow.done and not flow.gives

    def _answer(self, flow: Flow) -> bool:
        if self.over:
            return False
        wanted = self._request.outputs or self._wiring.outputs
        found = {name: flow.find(name) for name in wanted}
        missing = [name for name, tensor in found.items() if tensor is None]
        if missing and not self._several:
            step = self._wiring.steps[self._wiring.makers[missing[0]]]
            why = f"{step.said} did not answer with what becomes the output '{missing[0]}'"
            self.fail(self._of(InferenceFailedError(why)))
            return False
        if self._told and not self._several:
            step = self._wiring.steps[self._many[0]]
            why = f"{step.said} gave more than one answer; set the ensemble's 'decoupled' to true"
            self.fail(self._of(InvalidRequestError(why)))
            return False
        outputs = [tensor for tensor in found.values() if tensor is not None]
        if outputs or not flow.level:
            self._told += 1
            took_s = time.perf_counter() - self._began
            self._tell(InferResponse(outputs, dict(flow.parameters), compute_s=took_s))
        return not self.over

    # what goes wrong --------------------------------------------------------------------------------

    def _broke(self, step: Step, error: BaseException) -> None:
        mine = own(error, STOPPED)
        self.fail(self._of(mine, f"{step.said}: "))

    def _of(self, error: RepositoryError, where: str = "") -> RepositoryError:
        return retold(error, f"in ensemble '{self._wiring.name}', {where}{error}")


def _named(step: Step, response: InferResponse) -> dict[str, Tensor | None]:
    """What the step has made, under the ensemble's names."""
    made = {tensor.name: tensor for tensor in response.outputs}
    return {
        tensor: Tensor(tensor, found.datatype, found.shape, found.data) if found else None
        for name, tensor in step.outputs
        for found in (made.get(name),)
    }
