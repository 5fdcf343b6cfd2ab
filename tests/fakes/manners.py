"""Models known by how they behave, over real generations and real signatures, without hosts.

double       y = 2x, at once; org/name and a+b do the same; wide too, with rows without number
next         the same, a turn of the loop later
slow         the same, SLOW_S later
held         the same, once `release` is called; `asked` is set as soon as one waits; wide-held too
large        as many bytes as x[0, 0] says
named        y = 2x, and says the request's parameters back
broken full gone stuck    fail as their names say; `stuck` in a way that nobody foresaw
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

import msgspec
import numpy as np

from repository.errors import InferenceFailedError, QueueFullError, RepositoryError, WorkerDiedError
from repository.lifecycle.generation import Generation
from repository.messages import InferRequest, InferResponse, Loaded, TensorSpec
from repository.signature import Signature
from repository.tensors import Tensor
from tests.fakes.repository import FakeRepository

SLOW_S = 0.01
WITHIN_S = 20.0
ROWS = Loaded(
    inputs=(TensorSpec("x", "FP32", (-1, 2)),),
    outputs=(TensorSpec("y", "FP32", (-1, 2)),),
    max_batch_size=8,
    platform="fake",
)
FREE = msgspec.structs.replace(ROWS, max_batch_size=0)
Future: TypeAlias = asyncio.Future[InferResponse]


class Manners(FakeRepository):
    """`waiting`: what `held` was asked and has not answered; `unwanted`: how many of these nobody
    wants any more. `rooms`: the places given out by `room` (from `room_from` bytes on) and not given
    back."""

    def __init__(self, *, room_from: int | None = None) -> None:
        super().__init__()
        self.waiting: list[tuple[InferRequest, Future]] = []
        self.asked = asyncio.Event()
        self.rooms = 0
        self.roomed = 0
        self.room_from = room_from
        for name in MANNERS:
            versions = (1, 2) if name == "double" else (1,)
            self.add(name, *versions)
            for version in versions:
                gen = self.bring_up(name, version)
                gen.loaded = FREE if name.startswith("wide") else ROWS
                gen.signature = Signature(name, gen.loaded)

    def infer(self, gen: Generation, request: InferRequest) -> Future:
        assert gen.signature is not None
        gen.signature.accept(request)
        future: Future = asyncio.get_running_loop().create_future()
        MANNERS[gen.spec.model](self, request, future)
        return future

    def room(self, model: str, version: int | None, size: int) -> memoryview | None:
        if self.room_from is None or size < self.room_from:
            return None
        place = np.zeros(size, np.uint8)
        self.rooms += 1
        self.roomed += 1
        weakref.finalize(place, self._given_back)
        return memoryview(place)  # type: ignore[arg-type]

    def _given_back(self) -> None:
        self.rooms -= 1

    def release(self) -> None:
        """`held` answers all that wait."""
        for request, future in self.waiting:
            settle(future, request)
        self.waiting.clear()

    @property
    def unwanted(self) -> int:
        return sum(future.cancelled() for _, future in self.waiting)

    @property
    def leases(self) -> int:
        return sum(g.leases for gens in self.generations.values() for g in gens)


def settle(future: Future, request: InferRequest) -> None:
    if not future.done():
        (x,) = request.inputs
        y = Tensor.of("y", x.array() * 2)
        future.set_result(InferResponse([y], queue_s=0.25, compute_s=0.5, batch_size=4))


Manner: TypeAlias = Callable[[Manners, InferRequest, Future], Any]


def at_once(_: Manners, request: InferRequest, future: Future) -> None:
    settle(future, request)


def next_turn(_: Manners, request: InferRequest, future: Future) -> None:
    asyncio.get_running_loop().call_soon(settle, future, request)


def later(_: Manners, request: InferRequest, future: Future) -> None:
    asyncio.get_running_loop().call_later(SLOW_S, settle, future, request)


def when_released(models: Manners, request: InferRequest, future: Future) -> None:
    models.waiting.append((request, future))
    models.asked.set()


def much(_: Manners, request: InferRequest, future: Future) -> None:
    size = int(request.inputs[0].array()[0, 0])
    future.set_result(InferResponse([Tensor.of("y", np.arange(size, dtype=np.uint8))]))


def named(_: Manners, request: InferRequest, future: Future) -> None:
    settle(future, request)
    future.result().parameters = dict(request.parameters)


def failing(error: Callable[[], Exception], *, at_the_door: bool = False) -> Manner:
    def fail(_: Manners, request: InferRequest, future: Future) -> None:
        if at_the_door:
            raise error()
        future.set_exception(error())

    return fail


def busy() -> RepositoryError:
    return QueueFullError("Exceeds maximum queue size", retry_after_s=3.0)


MANNERS: dict[str, Manner] = {
    "double": at_once,
    "org/name": at_once,
    "a+b": at_once,
    "wide": at_once,
    "next": next_turn,
    "slow": later,
    "held": when_released,
    "wide-held": when_released,
    "large": much,
    "named": named,
    "broken": failing(lambda: InferenceFailedError("the model failed: no such luck")),
    "full": failing(busy, at_the_door=True),
    "gone": failing(lambda: WorkerDiedError("its worker has died; ask again")),
    "stuck": failing(lambda: ZeroDivisionError("nobody foresaw this")),
}
