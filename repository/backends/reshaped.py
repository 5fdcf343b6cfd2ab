"""A backend whose model has other shapes than clients see, as its config's `reshape` says.

It stands around any backend: requests go in as the model wants them, answers come out as clients see
them. Only shapes change: the bytes stay where they are. The batch axis is in neither shape, and stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import msgspec

from repository.backends.abilities import Asked, Asks, Reply, Validates
from repository.backends.base import Backend, Order, Room, RoomyBackend
from repository.config import ModelConfig, TensorConfig
from repository.errors import InferenceFailedError, InvalidTensorError, RepositoryError
from repository.messages import InferRequest, InferResponse, Loaded, TensorSpec
from repository.tensors import Shape, Tensor

SCALARS = "scalars"  # in `Loaded.details`: whose shape [1] was made of none


class Shapes(NamedTuple):
    """`seen` by clients, `had` by the model."""

    seen: Shape
    had: Shape


def is_needed(config: ModelConfig) -> bool:
    if any(t.reshape is not None for t in (*(config.inputs or ()), *(config.outputs or ()))):
        return True
    return completes(config)


def completes(config: ModelConfig) -> bool:
    """A config in Triton's form that leaves inputs or outputs to the model, which may have scalars:
    clients of Triton see them as [1]."""
    left_out = config.inputs is None or config.outputs is None
    return bool(config.triton) and config.backend == "onnx" and left_out


class Reshaped:
    """What it has beside these, the backend has."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._inputs: dict[str, Shapes] = {}
        self._outputs: dict[str, Shapes] = {}
        self._batched = False
        if hasattr(backend, "infer_into"):
            self.infer_into = self._infer_into
        if hasattr(backend, "ask"):
            self.ask = self._ask
        if hasattr(backend, "validate"):
            self.validate = self._validate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def load(self, order: Order) -> Loaded:
        config = order.config
        loaded = self._backend.load(_inner(order))
        self._batched = loaded.max_batch_size > 0
        self._inputs = _said(config.inputs) | self._scalars(config, config.inputs, loaded.inputs)
        self._outputs = _said(config.outputs) | self._scalars(
            config, config.outputs, loaded.outputs
        )
        names = [n for n, s in (self._inputs | self._outputs).items() if s == SCALAR]
        return msgspec.structs.replace(
            loaded,
            inputs=self._shown(loaded.inputs, self._inputs),
            outputs=self._shown(loaded.outputs, self._outputs),
            details={**loaded.details, SCALARS: names} if names else loaded.details,
        )

    def infer(self, request: InferRequest) -> InferResponse:
        return self._outward(self._backend.infer(self._inward(request)))

    def unload(self) -> None:
        self._backend.unload()

    def _infer_into(self, request: InferRequest, room: Room) -> InferResponse:
        roomy = cast("RoomyBackend", self._backend)
        return self._outward(roomy.infer_into(self._inward(request), room))

    def _validate(self, order: Order) -> None:
        cast("Validates", self._backend).validate(_inner(order))

    def _ask(self, asked: Sequence[Asked]) -> None:
        fit: list[Asked] = []
        for request, reply in asked:
            try:
                fit.append(Asked(self._inward(request), _Reply(reply, self)))
            except RepositoryError as error:
                reply.end(error)
        if fit:
            cast("Asks", self._backend).ask(fit)

    # shapes -------------------------------------------------------------------------------------

    def _inward(self, request: InferRequest) -> InferRequest:
        inputs = [self._turned(tensor, self._inputs, inward=True) for tensor in request.inputs]
        return InferRequest(inputs, request.outputs, request.id, request.parameters, request.form)

    def _outward(self, response: InferResponse) -> InferResponse:
        response.outputs = [
            self._turned(tensor, self._outputs, inward=False) for tensor in response.outputs
        ]
        return response

    def _turned(self, tensor: Tensor, known: dict[str, Shapes], *, inward: bool) -> Tensor:
        shapes = known.get(tensor.name)
        if shapes is None:
            return tensor
        old, new = shapes if inward else (shapes.had, shapes.seen)
        shape = turned(tensor.shape, old, new, batched=self._batched)
        if shape is None:
            kind = InvalidTensorError if inward else InferenceFailedError
            raise kind(
                f"'{tensor.name}' has shape {list(tensor.shape)}, which its reshape in the config "
                f"({list(old)} to {list(new)}) does not fit"
            )
        return Tensor(tensor.name, tensor.datatype, shape, tensor.data)

    def _scalars(
        self,
        config: ModelConfig,
        said: Iterable[TensorConfig] | None,
        specs: Iterable[TensorSpec],
    ) -> dict[str, Shapes]:
        if said is not None or not completes(config):
            return {}
        return {spec.name: SCALAR for spec in specs if spec.shape == ()}

    def _shown(
        self, specs: Iterable[TensorSpec], known: dict[str, Shapes]
    ) -> tuple[TensorSpec, ...]:
        axis = (-1,) if self._batched else ()
        return tuple(
            msgspec.structs.replace(spec, shape=axis + known[spec.name].seen)
            if spec.name in known
            else spec
            for spec in specs
        )


class _Reply:
    def __init__(self, reply: Reply, shapes: Reshaped) -> None:
        self._reply, self._shapes = reply, shapes

    def send(self, response: InferResponse) -> None:
        self._pass_on(self._reply.send, response)

    def last(self, response: InferResponse) -> None:
        self._pass_on(self._reply.last, response)

    def _pass_on(self, tell: Callable[[InferResponse], None], response: InferResponse) -> None:
        """An answer of another form is the request's end: the model's code is not to see that."""
        try:
            made = self._shapes._outward(response)
        except RepositoryError as error:
            self._reply.end(error)
        else:
            tell(made)

    def end(self, error: RepositoryError | None = None) -> None:
        self._reply.end(error)

    @property
    def cancelled(self) -> bool:
        return self._reply.cancelled


SCALAR = Shapes((1,), ())


def turned(shape: Shape, old: Shape, new: Shape, *, batched: bool) -> Shape | None:
    """`shape` is of the form `old`; the same elements in the form `new`, where each -1 is as large as it
    is in `old`. None: it is not of that form."""
    rows, rest = (shape[:1], shape[1:]) if batched else ((), shape)
    if len(rest) != len(old) or any(o not in (-1, s) for o, s in zip(old, rest, strict=True)):
        return None
    free = iter([s for o, s in zip(old, rest, strict=True) if o == -1])
    made = rows + tuple(next(free, 0) if n == -1 else n for n in new)
    return made if math.prod(made) == math.prod(shape) else None


def _inner(order: Order) -> Order:
    """As the model itself sees it."""
    config = order.config
    made = msgspec.structs.replace(config, inputs=_had(config.inputs), outputs=_had(config.outputs))
    return replace(order, config=made)


def _had(tensors: Sequence[TensorConfig] | None) -> tuple[TensorConfig, ...] | None:
    if tensors is None:
        return None
    return tuple(
        t if t.reshape is None else msgspec.structs.replace(t, shape=t.reshape, reshape=None)
        for t in tensors
    )


def _said(tensors: Iterable[TensorConfig] | None) -> dict[str, Shapes]:
    return {t.name: Shapes(t.shape, t.reshape) for t in tensors or () if t.reshape is not None}
