"""Looked at when a model with sequences is loaded: whether it has what its config says, and what the
states of a new sequence are. Blocks: files are read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from repository.config import Control, Sequences, State
from repository.errors import InvalidNameError, InvalidTensorError, LoadFailedError
from repository.messages import Loaded, TensorSpec
from repository.names import contain, shown
from repository.sequences.wiring import CORRID_TYPES, value_of, zeros
from repository.sizes import human
from repository.spec import ModelSpec
from repository.tensors import DATATYPES, LENGTH, Shape, Tensor

FOLDER = "initial_state"
LARGEST = 1 << 30  # bytes of one state


def first_states(spec: ModelSpec, loaded: Loaded) -> dict[str, Tensor]:
    """By the model's inputs; nothing of a model without sequences. Raises LoadFailedError."""
    rules = spec.config.sequences
    if rules is None:
        return {}
    batched = loaded.max_batch_size > 0
    _check(rules, loaded, batched=batched)
    return {state.input: _first(spec, state, batched=batched) for state in rules.states}


# what the model has -------------------------------------------------------------------------------


def _check(rules: Sequences, loaded: Loaded, *, batched: bool) -> None:
    """A model that does not say what it has is believed to have it as the config says."""
    inputs = {spec.name: spec for spec in loaded.inputs}
    outputs = {spec.name: spec for spec in loaded.outputs}
    if "ask" not in loaded.abilities:  # else it reads what it knows of, and nobody knows that
        _check_there("input", rules.own_inputs, inputs)
        _check_there("output", rules.own_outputs, outputs)
    for control in rules.controls:
        _check_control(control, inputs.get(control.name), batched=batched)
    axis = (-1,) if batched else ()
    for state in rules.states:
        if state.datatype not in DATATYPES:
            raise LoadFailedError(f"state '{state.input}' has no datatype '{state.datatype}'")
        wanted = axis + state.shape
        _check_state("input", state.input, state.datatype, wanted, inputs.get(state.input))
        _check_state("output", state.output, state.datatype, wanted, outputs.get(state.output))


def _check_there(side: str, own: Iterable[str], known: Mapping[str, TensorSpec]) -> None:
    missing = [name for name in own if name not in known] if known else []
    if missing:
        raise LoadFailedError(
            f"the config's sequences need the {side} '{min(missing)}', which the model does not have; "
            f"it has {', '.join(map(repr, known))}"
        )


def _check_control(control: Control, found: TensorSpec | None, *, batched: bool) -> None:
    what = f"the control '{control.name}' ({control.kind})"
    if control.datatype not in DATATYPES:
        raise LoadFailedError(f"{what} has no datatype '{control.datatype}'")
    if control.kind == "corrid":
        if control.datatype not in CORRID_TYPES:
            raise LoadFailedError(
                f"{what} is {control.datatype}; an id can be one of {', '.join(CORRID_TYPES)}"
            )
    else:
        _check_values(control, what)
    if found is None:
        return
    if found.datatype != control.datatype:
        raise LoadFailedError(
            f"{what} is {control.datatype} in the config; in the model it is {found.datatype}"
        )
    if any(size not in (-1, 1) for size in found.shape[1 if batched else 0 :]):
        raise LoadFailedError(
            f"{what} has shape {list(found.shape)} in the model; a control is one value for each "
            f"request"
        )


def _check_values(control: Control, what: str) -> None:
    if control.datatype in ("BYTES", "BF16"):
        raise LoadFailedError(f"{what} cannot be {control.datatype}; BOOL, INT32 or FP32 can")
    for value in (control.off, control.on):
        try:
            value_of(control, value)
        except (OverflowError, ValueError) as error:
            raise LoadFailedError(f"{what}: {value:g} does not fit {control.datatype}") from error


def _check_state(
    side: str, name: str, datatype: str, wanted: Shape, found: TensorSpec | None
) -> None:
    if found is None:
        return
    fits = len(found.shape) == len(wanted) and all(
        -1 in (a, b) or a == b for a, b in zip(wanted, found.shape, strict=True)
    )
    if found.datatype != datatype or not fits:
        raise LoadFailedError(
            f"the state's {side} '{name}' is {datatype} {list(wanted)} by the config; in the model "
            f"it is {found.datatype} {list(found.shape)}"
        )


# what it begins with ------------------------------------------------------------------------------


def _first(spec: ModelSpec, state: State, *, batched: bool) -> Tensor:
    dims = _dims(state)
    shape = ((1,) if batched else ()) + dims
    size = math.prod(dims) * DATATYPES[state.datatype].size
    needed = size or math.prod(dims) * LENGTH.size
    if needed > LARGEST:
        raise LoadFailedError(
            f"state '{state.input}' would begin with shape {list(dims)}, {human(needed)}; one may have "
            f"{human(LARGEST)}"
        )
    if not state.initial:
        return zeros(state.input, state.datatype, shape)
    data = _read(spec, state, size)
    found = Tensor(state.input, state.datatype, shape, data)
    try:
        found.check_size()
    except InvalidTensorError as error:
        raise LoadFailedError(f"{FOLDER}/{shown(state.initial)}: {error}") from error
    return found


def _dims(state: State) -> Shape:
    said = state.initial_shape
    if said is None or (state.shape and not said):
        return tuple([1 if size == -1 else size for size in state.shape])
    fits = len(said) == len(state.shape) and all(
        g >= 0 and w in (-1, g) for w, g in zip(state.shape, said, strict=True)
    )
    if not fits:
        raise LoadFailedError(
            f"state '{state.input}' has shape {list(state.shape)}; it cannot begin with {list(said)}"
        )
    return said


def _read(spec: ModelSpec, state: State, size: int) -> bytes:
    """`size`: bytes that it must have; 0: nobody knows (texts)."""
    where = f"{FOLDER}/{shown(state.initial)}"
    folder = spec.folder / FOLDER
    try:
        file = contain(folder, folder / state.initial)
        has = file.stat().st_size
        if has > LARGEST or (size and has != size):
            raise LoadFailedError(
                f"{where} has {has} bytes; state '{state.input}' begins with {size or LARGEST}"
            )
        return file.read_bytes()
    except InvalidNameError as error:
        raise LoadFailedError(f"{where}: it leads out of the folder {FOLDER}") from error
    except OSError as error:
        raise LoadFailedError(
            f"{where} cannot be read, with which state '{state.input}' is to begin: "
            f"{error.strerror}"
        ) from error
