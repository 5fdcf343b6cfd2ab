"""What the server itself says to a model that takes sequences, and what the model says only to itself:
control tensors, and states that come out of one request and go into the next. All in wire form.

Controls and states have one row where the model batches. A state is kept as a copy: an answer's own
memory is lent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from repository.config import Control, Sequences, State
from repository.errors import InferenceFailedError, InvalidRequestError
from repository.messages import InferRequest, InferResponse, Loaded
from repository.sequences.asked import OF_A_SEQUENCE, Asked, SequenceId, named
from repository.tensors import DATATYPES, LENGTH, Buffer, Shape, Tensor

OF_THE_LINE = frozenset({*OF_A_SEQUENCE, "priority", "timeout"})
CORRID_TYPES = ("UINT64", "INT64", "UINT32", "INT32", "BYTES")
States = Mapping[str, Tensor]  # the model's input -> what it gets


class Wiring:
    """`initial`: what the states of a new sequence are. `whole`: the model is given requests as they
    are, with all parameters, and each answers for itself; it need not say a state every time."""

    def __init__(
        self, model: str, config: Sequences, loaded: Loaded, initial: States, *, whole: bool
    ) -> None:
        self.initial = initial
        self._model = model
        self._states = config.states
        self._whole = whole
        self._batched = loaded.max_batch_size > 0
        self._own_outputs = config.own_outputs
        shapes = {spec.name: spec.shape for spec in loaded.inputs}
        self._controls = [_teller(c, self._shape(shapes.get(c.name))) for c in config.controls]
        self._corrids = [c for c in config.controls if c.kind == "corrid"]

    def _shape(self, of_model: Shape | None) -> Shape:
        if of_model is None:
            return (1, 1) if self._batched else (1,)
        return (1,) * len(of_model)

    def check(self, sequence: SequenceId) -> None:
        """Raises InvalidRequestError for an id that the model's control cannot say."""
        for control in self._corrids:
            _id_bytes(sequence, control, self._model)

    def dress(
        self, request: InferRequest, asked: Asked, states: States, left_us: int | None
    ) -> InferRequest:
        """As the model gets it. `left_us`: how long it may still wait."""
        inputs = [
            *request.inputs,
            *[tell(asked) for tell in self._controls],
            *[states[state.input] for state in self._states],
        ]
        outputs = request.outputs
        if outputs and self._states:
            outputs += tuple(s.output for s in self._states if s.output not in outputs)
        said = request.parameters
        if not self._whole:
            said = {k: v for k, v in said.items() if k not in OF_THE_LINE}
        if left_us is not None:
            said = {**said, "timeout": left_us}
        return InferRequest(inputs, outputs, request.id, said)

    def blank(self, like: InferRequest) -> InferRequest:
        """A row that nobody asked for, of the shape of `like` (dressed): zeros, and not ready."""
        mine = len(self._controls) + len(self._states)
        nobody = [tell(None) for tell in self._controls]
        others = [_zeros(t) for t in like.inputs[: len(like.inputs) - mine]]
        states = [_zeros(t) for t in like.inputs[len(like.inputs) - len(self._states) :]]
        states = states if self._states else []
        return InferRequest([*others, *nobody, *states], like.outputs, "", like.parameters)

    def keep(self, response: InferResponse, states: States) -> tuple[InferResponse, States]:
        """What clients get of an answer, and what the next request gets. Raises InferenceFailedError
        where a state is not what the config says."""
        if not self._states:
            return response, states
        said = {tensor.name: tensor for tensor in response.outputs}
        after = dict(states)
        for state in self._states:
            found = said.get(state.output)
            if found is not None:
                after[state.input] = self._kept(state, found)
            elif not self._whole:
                raise InferenceFailedError(
                    f"model '{self._model}' did not say its state '{state.output}'"
                )
        outputs = [t for t in response.outputs if t.name not in self._own_outputs]
        response.outputs, response.form = outputs, None
        return response, after

    def _kept(self, state: State, said: Tensor) -> Tensor:
        wanted = ((1,) if self._batched else ()) + state.shape
        fits = len(wanted) == len(said.shape) and all(
            w in (-1, g) for w, g in zip(wanted, said.shape, strict=True)
        )
        if said.datatype != state.datatype or not fits:
            raise InferenceFailedError(
                f"model '{self._model}' said its state '{state.output}' as {said.datatype} "
                f"{list(said.shape)}; its config has {state.datatype} {list(wanted)}"
            )
        return Tensor(state.input, said.datatype, said.shape, bytes(said.data))


def group_of(request: InferRequest) -> tuple[Any, ...]:
    """Of dressed requests: those of equal groups can be rows of one batch."""
    parts = tuple([(t.name, t.datatype, t.shape[1:]) for t in request.inputs])
    return parts, request.outputs, sorted(map(repr, request.parameters.items()))


def zeros(name: str, datatype: str, shape: Shape) -> Tensor:
    """Of BYTES: empty texts."""
    size = DATATYPES[datatype].size or LENGTH.size
    return Tensor(name, datatype, shape, bytes(size * math.prod(shape)))


def _zeros(like: Tensor) -> Tensor:
    return zeros(like.name, like.datatype, like.shape)


def value_of(control: Control, value: float) -> bytes:
    """In the control's datatype. Raises OverflowError, ValueError for one that it cannot say."""
    dtype = DATATYPES[control.datatype].dtype
    plain = int(value) if dtype.kind in "iu" else value
    return np.array(plain, dtype).tobytes()


def _teller(control: Control, shape: Shape) -> Callable[[Asked | None], Tensor]:
    """Its tensor for a request; for nobody's row, None."""
    name, datatype = control.name, control.datatype
    if control.kind == "corrid":
        return lambda asked: Tensor(
            name, datatype, shape, _id_bytes(asked.id if asked is not None else 0, control, "")
        )
    off, on = [
        Tensor(name, datatype, shape, value_of(control, v)) for v in (control.off, control.on)
    ]
    if control.kind == "ready":
        return lambda asked: off if asked is None else on
    if control.kind == "start":
        return lambda asked: on if asked is not None and asked.start else off
    return lambda asked: on if asked is not None and asked.end else off


def _id_bytes(sequence: SequenceId, control: Control, model: str) -> Buffer:
    if control.datatype == "BYTES":
        text = (str(sequence) if sequence else "").encode(errors="replace")
        return LENGTH.pack(len(text)) + text
    if isinstance(sequence, str):
        raise InvalidRequestError(
            f"sequence_id {named(sequence)} is a text; model '{model}' takes a number "
            f"({control.datatype}, its input '{control.name}')"
        )
    try:
        return value_of(control, sequence)
    except OverflowError as error:
        raise InvalidRequestError(
            f"sequence_id {sequence} does not fit {control.datatype}, which model '{model}' has for it "
            f"(its input '{control.name}')"
        ) from error


def rows_of(request: InferRequest) -> int:
    """Of the batch axis; 1 where there is none."""
    inputs: Sequence[Tensor] = request.inputs
    return inputs[0].shape[0] if inputs and inputs[0].shape else 1
