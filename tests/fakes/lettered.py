"""Models that Triton's wire is tried on, over real signatures, without hosts.

simple     OUTPUT0 = INPUT0 + INPUT1, OUTPUT1 = INPUT0 - INPUT1; INT32 [16], batch up to 8, labelled
floats     y = x; FP32 [-1, -1], no batches
half       y = x; FP16 [2]
bits       y = x; BF16 [2]
text       y = x; BYTES [1], batch up to 8
open       y = x; FP32 [-1], batch up to 8
none       y has no elements
many       decoupled
full late  refuse as a full queue and a request's timeout do
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import msgspec

from repository.errors import QueueFullError, RepositoryError, RequestTimeoutError
from repository.lifecycle.generation import Generation
from repository.messages import InferRequest, InferResponse, Loaded, TensorSpec
from repository.signature import Signature
from repository.tensors import Tensor
from tests.fakes.repository import FakeRepository


def _same(datatype: str, *dims: int, most_rows: int = 0) -> Loaded:
    shape = ((-1,) if most_rows else ()) + dims
    return Loaded(
        inputs=(TensorSpec("x", datatype, shape),),
        outputs=(TensorSpec("y", datatype, shape),),
        max_batch_size=most_rows,
    )


_SIXTEEN = (-1, 16)
SIMPLE = Loaded(
    inputs=tuple(TensorSpec(f"INPUT{n}", "INT32", _SIXTEEN) for n in (0, 1)),
    outputs=tuple(TensorSpec(f"OUTPUT{n}", "INT32", _SIXTEEN) for n in (0, 1)),
    max_batch_size=8,
)
MODELS = {
    "simple": SIMPLE,
    "floats": _same("FP32", -1, -1),
    "half": _same("FP16", 2),
    "bits": _same("BF16", 2),
    "text": _same("BYTES", 1, most_rows=8),
    "open": _same("FP32", -1, most_rows=8),
    "none": _same("FP32", -1, most_rows=8),
    "many": msgspec.structs.replace(_same("FP32", 1), abilities=("ask", "decoupled")),
    "full": _same("FP32", 1),
    "late": _same("FP32", 1),
}
LABELS = tuple(f"label{n}" for n in range(10))  # fewer than there are classes
FAILING: dict[str, Callable[[], RepositoryError]] = {
    "full": lambda: QueueFullError("Exceeds maximum queue size", retry_after_s=1.0),
    "late": lambda: RequestTimeoutError("Request timeout expired"),
}


class Lettered(FakeRepository):
    """`asked`: the requests that were let through, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[InferRequest] = []
        for name, loaded in MODELS.items():
            self.add(name)
            gen = self.bring_up(name)
            gen.loaded, gen.signature = loaded, Signature(name, loaded)
        spec = self.generations["simple"][0].spec
        object.__setattr__(spec, "labels", MappingProxyType({"OUTPUT0": LABELS}))

    def release(self) -> None:
        """Nothing waits."""

    def infer(self, gen: Generation, request: InferRequest) -> Any:
        assert gen.signature is not None
        gen.signature.accept(request)
        self.asked.append(request)
        future: asyncio.Future[InferResponse] = asyncio.get_running_loop().create_future()
        name = gen.spec.model
        if name in FAILING:
            future.set_exception(FAILING[name]())
        else:
            future.set_result(InferResponse(_outputs(name, request)))
        return future

    @property
    def leases(self) -> int:
        return sum(g.leases for gens in self.generations.values() for g in gens)

    rooms = 0


def _outputs(name: str, request: InferRequest) -> list[Tensor]:
    if name == "simple":
        a, b = (t.array() for t in sorted(request.inputs, key=lambda t: t.name))
        found = [Tensor.of("OUTPUT0", a + b), Tensor.of("OUTPUT1", a - b)]
        return [t for t in found if not request.outputs or t.name in request.outputs]
    (x,) = request.inputs
    if name == "none":
        return [Tensor("y", "FP32", (x.shape[0], 0), b"")]
    return [Tensor("y", x.datatype, x.shape, bytes(x.data))]
