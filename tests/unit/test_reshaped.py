"""A backend that others see in other shapes than it has: requests, answers, models that are asked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repository.backends.abilities import Asked
from repository.backends.base import Order
from repository.backends.reshaped import Reshaped, is_needed, turned
from repository.config import ModelConfig, TensorConfig
from repository.errors import InferenceFailedError, InvalidTensorError, RepositoryError
from repository.messages import InferRequest, InferResponse, Loaded, TensorSpec
from repository.tensors import Tensor

X = TensorConfig(name="x", datatype="FP32", shape=(4,), reshape=(2, 2))
Y = TensorConfig(name="y", datatype="FP32", shape=(1, -1), reshape=(-1,))
CONFIG = ModelConfig(max_batch_size=8, inputs=(X,), outputs=(Y,))


class Doubles:
    """A model of its own shapes: it remembers what it was given, and answers `said`."""

    def __init__(self, said: tuple[int, ...] = (3, 4)) -> None:
        self.said = said
        self.given: list[tuple[int, ...]] = []
        self.order: Order | None = None

    def load(self, order: Order) -> Loaded:
        self.order = order
        ins, outs = TensorSpec("x", "FP32", (-1, 2, 2)), TensorSpec("y", "FP32", (-1, -1))
        return Loaded((ins,), (outs,), max_batch_size=8)

    def infer(self, request: InferRequest) -> InferResponse:
        self.given.append(request.inputs[0].shape)
        return InferResponse([Tensor.of("y", np.zeros(self.said, np.float32))])

    def unload(self) -> None:
        self.order = None

    def measured(self) -> str:
        return "by the backend"


class Asking(Doubles):
    def validate(self, order: Order) -> None:
        self.order = order

    def ask(self, asked: Sequence[Asked]) -> None:
        for request, reply in asked:
            assert not reply.cancelled
            reply.send(self.infer(request))
            reply.end()


class Told:
    def __init__(self) -> None:
        self.answers: list[InferResponse] = []
        self.ended: list[RepositoryError | None] = []
        self.cancelled = False

    def send(self, response: InferResponse) -> None:
        self.answers.append(response)

    def last(self, response: InferResponse) -> None:
        self.send(response)
        self.end()

    def end(self, error: RepositoryError | None = None) -> None:
        self.ended.append(error)


def order(config: ModelConfig = CONFIG) -> Order:
    return Order("m", 1, Path(), "model.py", config)


def asked(*shape: int) -> InferRequest:
    return InferRequest([Tensor.of("x", np.zeros(shape, np.float32))])


def test_the_model_is_loaded_with_its_own_shapes_and_shown_with_those_of_clients() -> None:
    inner = Doubles()
    outer = Reshaped(inner)
    loaded = outer.load(order())
    assert inner.order is not None and inner.order.config.inputs is not None
    (own,) = inner.order.config.inputs
    assert (own.shape, own.reshape) == ((2, 2), None)
    assert loaded.inputs[0].shape == (-1, 4) and loaded.outputs[0].shape == (-1, 1, -1)
    assert outer.measured() == "by the backend"
    assert not any(hasattr(outer, name) for name in ("infer_into", "ask", "validate"))


def test_requests_go_in_and_answers_come_out_reshaped() -> None:
    inner = Doubles()
    outer = Reshaped(inner)
    outer.load(order())
    answer = outer.infer(asked(3, 4))
    assert inner.given == [(3, 2, 2)]
    assert answer.outputs[0].shape == (3, 1, 4)
    with pytest.raises(InvalidTensorError, match="does not fit"):
        outer.infer(asked(3, 5))


def test_an_answer_of_another_form_is_the_models_fault() -> None:
    outer = Reshaped(Doubles(said=(3, 4, 1)))
    outer.load(order())
    with pytest.raises(InferenceFailedError, match=r"'y' has shape \[3, 4, 1\]"):
        outer.infer(asked(3, 4))


def test_one_that_is_asked_is_reshaped_too_and_who_does_not_fit_ends_alone() -> None:
    inner = Asking()
    outer: Any = Reshaped(inner)
    outer.load(order())
    good, bad = Told(), Told()
    outer.ask([Asked(asked(3, 4), good), Asked(asked(3, 5), bad)])
    assert inner.given == [(3, 2, 2)]
    assert [a.outputs[0].shape for a in good.answers] == [(3, 1, 4)] and good.ended == [None]
    assert isinstance(bad.ended[0], InvalidTensorError) and bad.answers == []
    outer.validate(order())
    assert inner.order is not None and inner.order.config.inputs is not None
    assert inner.order.config.inputs[0].shape == (2, 2)


def test_an_answer_of_another_form_ends_the_request_that_was_asked() -> None:
    outer: Any = Reshaped(Asking(said=(3,)))
    outer.load(order())
    told = Told()
    outer.ask([Asked(asked(3, 4), told)])
    assert told.answers == [] and isinstance(told.ended[0], InferenceFailedError)


@pytest.mark.parametrize(
    ("shape", "old", "new", "batched", "made"),
    [
        ((4,), (4,), (2, 2), False, (2, 2)),
        ((7, 4), (4,), (2, 2), True, (7, 2, 2)),
        ((5, 1), (1,), (), True, (5,)),
        ((5,), (), (1,), True, (5, 1)),
        ((), (), (1,), False, (1,)),
        ((3, 2, 9), (-1, 2, -1), (2, -1, -1), False, (2, 3, 9)),
        ((0, 4), (4,), (2, 2), True, (0, 2, 2)),
        ((3,), (4,), (2, 2), False, None),
        ((2, 2), (4,), (2, 2), False, None),
    ],
)
def test_free_axes_keep_their_sizes(
    shape: Any, old: Any, new: Any, batched: bool, made: Any
) -> None:
    assert turned(shape, old, new, batched=batched) == made


def test_nobody_stands_around_a_model_that_has_the_shapes_of_its_clients() -> None:
    plain = TensorConfig(name="x", datatype="FP32", shape=(4,))
    assert not is_needed(ModelConfig(inputs=(plain,), outputs=(plain,)))
    assert not is_needed(ModelConfig(backend="onnx"))
    assert is_needed(CONFIG)
    assert is_needed(ModelConfig(backend="onnx", triton={"name": "m"}))
