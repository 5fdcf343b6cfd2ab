"""Which adapter does each row of a request use? Parameters become an input that only models see.

    adapter    a name: all rows use it
    adapters   names, one per row ("": none), as a list or as JSON in a text

They leave the parameters, and ROW_ADAPTERS goes behind the inputs: so requests for different adapters
share a batch, whose rows are joined as those of any input are. What is concluded of a header is
concluded once, as everywhere (`repository.forms`): requests of one form get one form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from repository.adapters.orders import ROW_ADAPTERS
from repository.adapting.fitting import Fitting
from repository.errors import AdapterNotFoundError, InvalidRequestError, InvalidTensorError
from repository.forms import Blank, Form
from repository.messages import InferRequest
from repository.names import shown
from repository.tensors import LENGTH, Tensor

REMEMBERED = 256  # forms of one generation
MOST_ROWS = 1 << 20
# Of the names of one request. An empty tensor costs its client nothing, whatever rows it has.
MOST_BYTES, REMEMBERED_BYTES = 16 << 20, 64 << 10
ONE, EACH = "adapter", "adapters"


class _Told:
    """What a form says of adapters. `names`: each once; `form`: the one that a model sees."""

    __slots__ = ("form", "names", "tensor")

    def __init__(self, names: tuple[str, ...], tensor: Tensor, form: Form) -> None:
        self.names = names
        self.tensor = tensor
        self.form = form


class RowAdapters:
    """Of one generation that can adapt. `whole`: it takes requests one by one, without a batch axis."""

    def __init__(self, fitting: Fitting, *, whole: bool = False) -> None:
        self._fitting = fitting
        self._whole = whole
        self._told: dict[Form, _Told] = {}

    def name(self, request: InferRequest) -> InferRequest:
        """The request as the model gets it: itself where no adapter is named and there is none.

        Raises InvalidRequestError, AdapterNotFoundError, AdapterRefusedError, ModelNotReadyError.
        """
        parameters = request.parameters
        if self._fitting.idle and ONE not in parameters and EACH not in parameters:
            return request
        form = request.form
        told = self._told.get(form) if form is not None else None
        if told is None:
            told = self._conclude(request)
            if form is not None and len(told.tensor.data) <= REMEMBERED_BYTES:
                if len(self._told) >= REMEMBERED:
                    self._told.clear()
                self._told[form] = told
        for name in told.names:
            self._fitting.check(name)
        for name in told.names:
            self._fitting.asked(name)
        return InferRequest(
            [*request.inputs, told.tensor],
            request.outputs,
            request.id,
            told.form.parameters,
            told.form if form is not None else None,
        )

    def _conclude(self, request: InferRequest) -> _Told:
        rows = _rows(request)
        each = named(request.parameters, rows, whole=self._whole)
        names = tuple(dict.fromkeys(name for name in each if name))
        for name in names:  # before they are written once a row
            self._fitting.check(name)
        data = _written(each)
        tensor = Tensor(ROW_ADAPTERS, "BYTES", (rows,), data)
        rest = {k: v for k, v in request.parameters.items() if k not in (ONE, EACH)}
        blanks = request.form.blanks if request.form is not None else ()
        blank = Blank(ROW_ADAPTERS, "BYTES", (rows,), len(data))
        return _Told(names, tensor, Form([*blanks, blank], request.outputs, rest))


def _rows(request: InferRequest) -> int:
    """Of the first axis, which all inputs share; 1 where they do not."""
    axes = {tensor.shape[:1] for tensor in request.inputs}
    rows = next(iter(axes))[0] if len(axes) == 1 and () not in axes else 1
    if rows > MOST_ROWS:
        raise InvalidRequestError(
            f"a request of {rows} rows is too large for a model with adapters; at most {MOST_ROWS}"
        )
    return rows


def _written(each: Sequence[str]) -> bytes:
    """The names as BYTES. Raises InvalidRequestError."""
    sizes = {name: LENGTH.size + len(name.encode()) for name in dict.fromkeys(each)}
    largest = max(sizes.values(), default=0) * len(each)
    if largest > MOST_BYTES and sum(sizes[name] for name in each) > MOST_BYTES:
        raise InvalidRequestError(
            f"the names of the adapters of {len(each)} rows are more than {MOST_BYTES} bytes: send "
            "fewer rows at once"
        )
    parts = {name: LENGTH.pack(size - LENGTH.size) + name.encode() for name, size in sizes.items()}
    if len(parts) == 1:
        return parts[each[0]] * len(each)
    return b"".join([parts[name] for name in each])


def named(parameters: Mapping[str, Any], rows: int, *, whole: bool = False) -> Sequence[str]:
    """The adapter of each row. `whole`: the model takes requests one by one, so that a list of one
    name speaks for all of it. Raises InvalidRequestError."""
    one, each = parameters.get(ONE), parameters.get(EACH)
    if one is not None and each is not None:
        raise InvalidRequestError(
            f"give '{ONE}' (for all rows) or '{EACH}' (one per row), not both"
        )
    said = one if each is None else each
    if said is None:
        return [""] * rows
    if each is not None and isinstance(said, str) and said.startswith("["):
        try:
            said = msgspec.json.decode(said)
        except msgspec.DecodeError:
            raise InvalidRequestError(f"parameter '{EACH}' is no list of names") from None
    if isinstance(said, str):
        return [said] * rows
    if one is not None or not isinstance(said, list) or not all(isinstance(n, str) for n in said):
        what = f"'{ONE}' must be a name" if each is None else f"'{EACH}' must be a list of names"
        raise InvalidRequestError(f"parameter {what}")
    if len(said) == 1 and whole:
        return said * rows
    if len(said) != rows:
        raise InvalidRequestError(
            f"'{EACH}' has {len(said)} names for {rows} rows; give one per row, or one for all"
        )
    return said


def refuse_names(parameters: Mapping[str, Any], model: str) -> None:
    """To a model that takes no adapters. Raises AdapterNotFoundError if one is named."""
    said = parameters.get(ONE) or parameters.get(EACH)
    found = next((n for n in (said if isinstance(said, list) else [said]) if n), None)
    if found is not None:
        raise AdapterNotFoundError(
            f"The adapter {shown(str(found))} has not been registered: model '{model}' takes none"
        )


def check_inputs(request: InferRequest) -> None:
    """Raises InvalidTensorError for an input that no client may send."""
    if any(tensor.name == ROW_ADAPTERS for tensor in request.inputs):
        raise InvalidTensorError(
            f"input '{ROW_ADAPTERS}' is the server's own; name adapters by the parameter '{ONE}'"
        )
