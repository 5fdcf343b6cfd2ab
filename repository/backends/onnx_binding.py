"""Runs of onnxruntime that write their outputs where they are wanted (IO binding).

onnxruntime has to know the shapes before the run. They are taken from the run before of the same
form; where the shapes depend on the data that guess may fail, then nothing is lost but the time of
one run, and the form is not bound again. An output is used only if onnxruntime says that it lies
where it was told to: what it has not written there is another request's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from repository.backends.base import Room
from repository.forms import Form
from repository.messages import InferRequest, InferResponse
from repository.tensors import DATATYPES, Array, Shape, Tensor, address

MOST_FORMS = 256


class _Output(NamedTuple):
    name: str
    datatype: str
    dtype: np.dtype[Any]
    shape: Shape
    size: int


class Binding:
    """Of one session on the CPU."""

    def __init__(self, session: Any, run_options: Any = None) -> None:
        self._session = session
        self._run_options = run_options
        self._io = session.io_binding()
        self._known: dict[Form, tuple[_Output, ...]] = {}  # empty: not to be bound

    def knows(self, form: Form) -> bool:
        return form in self._known

    def remember(self, request: InferRequest, response: InferResponse) -> None:
        """What the next request of the same form will answer, if it can be bound."""
        form = request.form
        if form is None:
            return
        if len(self._known) >= MOST_FORMS:
            self._known.clear()
        self._known[form] = _outputs(response.outputs) if _is_plain(request, response) else ()

    def run(
        self,
        form: Form,
        feeds: Mapping[str, Array],
        room: Room,
        plain: Callable[[], InferResponse],
    ) -> InferResponse:
        """The answer, in `room` where that can be; else that of `plain`, and `room` is as it was."""
        outputs = self._known[form]
        places = [room.take(output.size) for output in outputs]
        if not outputs or None in places:
            room.reset()
            return plain()
        found = [place for place in places if place is not None]
        if self._write(feeds, outputs, found):
            return InferResponse(
                [
                    Tensor(output.name, output.datatype, output.shape, place)
                    for output, place in zip(outputs, found, strict=True)
                ]
            )
        room.reset()
        response = plain()  # where this fails too the request was at fault, and not its form
        self._known[form] = ()
        return response

    def _write(
        self, feeds: Mapping[str, Array], outputs: Sequence[_Output], places: Sequence[memoryview]
    ) -> bool:
        io, told = self._io, [address(place) for place in places]
        try:
            for name, array in feeds.items():
                io.bind_cpu_input(name, array)
            for output, pointer in zip(outputs, told, strict=True):
                io.bind_output(output.name, "cpu", 0, output.dtype.type, output.shape, pointer)
            self._session.run_with_iobinding(io, self._run_options)
            return [value.data_ptr() for value in io.get_outputs()] == told
        except Exception:  # noqa: BLE001 - a plain run will say what is wrong, if anything is
            return False
        finally:
            io.clear_binding_inputs()
            io.clear_binding_outputs()


def _outputs(tensors: Sequence[Tensor]) -> tuple[_Output, ...]:
    return tuple(
        _Output(t.name, t.datatype, DATATYPES[t.datatype].dtype, t.shape, len(t.data))
        for t in tensors
    )


def _is_plain(request: InferRequest, response: InferResponse) -> bool:
    """All are numbers that numpy knows, and no output is empty."""
    tensors = (*request.inputs, *response.outputs)
    return all(tensor.datatype not in ("BYTES", "BF16") for tensor in tensors) and all(
        len(tensor.data) > 0 for tensor in response.outputs
    )
