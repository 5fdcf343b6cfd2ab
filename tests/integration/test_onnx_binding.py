"""onnxruntime's outputs where they are wanted: in the room, whole, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
from onnx import helper, numpy_helper

from repository.backends.base import Order, Room
from repository.backends.onnx import OnnxBackend
from repository.forms import form_of
from repository.messages import InferRequest
from repository.tensors import Tensor, address
from tests import models

COUNT = 1000


@contextmanager
def loaded(path: Path) -> Iterator[OnnxBackend]:
    backend = OnnxBackend()
    try:
        spec = models.spec_of(path)
        backend.load(Order("m", 1, spec.path, spec.model_file, spec.config))
        yield backend
    finally:
        backend.unload()


@contextmanager
def counted(backend: OnnxBackend, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Each run of the session, as it comes: bound or plain."""
    runs: list[str] = []
    session = backend._session

    class Session:
        def run(self, *args: object) -> object:
            runs.append("plain")
            return session.run(*args)

        def run_with_iobinding(self, *args: object) -> object:
            runs.append("bound")
            return session.run_with_iobinding(*args)

    with monkeypatch.context() as patch:
        patch.setattr(backend, "_session", Session())
        patch.setattr(backend._binding, "_session", Session())
        yield runs


def asked(x: np.ndarray, outputs: tuple[str, ...] = (), form=None) -> InferRequest:
    tensor = Tensor.of("x", x)
    return InferRequest([tensor], outputs, form=form or form_of([tensor], outputs))


def lies_in(memory: memoryview, tensor: Tensor) -> bool:
    begin = address(memory)
    return begin <= address(tensor.data) <= begin + len(memory) - len(tensor.data)


def test_from_the_second_request_of_a_form_on_outputs_are_written_into_the_room(
    tmp_path, monkeypatch
):
    path = models.two_by_two_onnx(tmp_path / "m/1/model.onnx", (-1,))
    with loaded(path) as backend, counted(backend, monkeypatch) as runs:
        x = np.arange(COUNT, dtype=np.float32)
        a, b = Tensor.of("a", 3 * x), Tensor.of("b", x)
        request = InferRequest([a, b], form=form_of([a, b]))
        for expected in ("plain", "bound", "bound"):
            memory = memoryview(bytearray(9 * COUNT))
            response = backend.infer_into(request, Room(memory))
            assert runs.pop() == expected
            total, difference = response.outputs
            assert np.array_equal(total.array(), np.arange(COUNT) * 4)
            assert np.array_equal(difference.array(), np.arange(COUNT) * 2)
            assert lies_in(memory, total) is lies_in(memory, difference) is (expected == "bound")
        small = Room(memoryview(bytearray(5 * COUNT)))
        assert len(backend.infer_into(request, small).outputs) == 2
        assert runs.pop() == "plain"
        assert small.take(5 * COUNT) is not None


def test_a_form_whose_outputs_change_is_not_bound_again(tmp_path, monkeypatch):
    path = models._write(
        tmp_path / "m/1/model.onnx",
        [helper.make_node("NonZero", ["x"], ["y"])],
        [("x", "FP32", (-1,))],
        [("y", "INT64", (1, -1))],
    )
    with loaded(path) as backend, counted(backend, monkeypatch) as runs:
        form = asked(np.ones(COUNT, np.float32)).form
        for count in (COUNT, COUNT, COUNT // 2, COUNT, COUNT):
            x = np.zeros(COUNT, np.float32)
            x[:count] = 1
            room = Room(memoryview(bytearray(16 * COUNT)))
            response = backend.infer_into(asked(x, form=form), room)
            assert response.outputs[0].array().tolist() == [list(range(count))]
        assert runs == ["plain", "bound", "bound", "plain", "plain", "plain"]


def test_a_request_that_the_model_refuses_costs_its_form_nothing(tmp_path, monkeypatch):
    table = np.arange(COUNT, dtype=np.float32)
    path = models._write(
        tmp_path / "m/1/model.onnx",
        [helper.make_node("Gather", ["table", "x"], ["y"])],
        [("x", "INT64", (-1,))],
        [("y", "FP32", (-1,))],
        [numpy_helper.from_array(table, "table")],
    )
    with loaded(path) as backend, counted(backend, monkeypatch) as runs:
        form = asked(np.zeros(COUNT, np.int64)).form
        for index in (1, 2, COUNT, 3):
            request = asked(np.full(COUNT, index), form=form)
            room = Room(memoryview(bytearray(9 * COUNT)))
            with nullcontext() if index < COUNT else pytest.raises(Exception, match="indices"):
                (y,) = backend.infer_into(request, room).outputs
                assert set(y.array().tolist()) == {float(index)}
        assert runs == ["plain", "bound", "bound", "plain", "bound"]


@pytest.mark.parametrize(
    ("datatype", "outputs"), [("BF16", ()), ("BYTES", ()), ("FP32", ("y", "y"))]
)
def test_what_cannot_be_bound_is_run_as_ever(tmp_path, monkeypatch, datatype, outputs):
    path = models.identity_onnx(tmp_path / "m/1/model.onnx", datatype, (-1,))
    values = {"BF16": np.ones(9, np.uint16), "BYTES": np.full(9, b"t"), "FP32": np.ones(9, "f4")}
    tensor = Tensor.of("x", values[datatype], datatype)
    request = InferRequest([tensor], outputs, form=form_of([tensor], outputs))
    with loaded(path) as backend:
        for _ in range(3):
            room = Room(memoryview(bytearray(b"?" * 1000)))
            try:
                response = backend.infer_into(request, room)
            except Exception as error:  # noqa: BLE001 - the same as without a room
                with pytest.raises(type(error)):
                    backend.infer(request)
            else:
                assert all(bytes(t.data) == bytes(tensor.data) for t in response.outputs)
