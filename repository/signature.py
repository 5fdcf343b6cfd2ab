"""What a request to a model must look like, checked before any device work.

Built once per generation from what the host reported. A model that says nothing about its inputs
takes any; sizes and batch are checked even then. The wording is Triton's where its clients look at
it. A request for more rows than a batch may hold is refused here, so the batcher never sees one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from repository.config import ModelConfig, TensorConfig
from repository.errors import InvalidTensorError
from repository.forms import Form
from repository.messages import InferRequest, Loaded, TensorSpec
from repository.tensors import Shape, Tensor

REMEMBERED = 256  # forms that need no second look
BATCH_NOTE = (
    " NOTE: Setting a non-zero max_batch_size puts a batch dimension before the others of every "
    "input; with max_batch_size 0 a shape is exactly what is sent."
)


class Signature:
    """`config` speaks where `loaded` is silent: inputs, outputs, and which inputs are optional.

    `inputs`, `required` (those that are not optional) and `outputs` are as clients see them, with
    the batch axis; all are empty where nobody says.
    """

    def __init__(self, model: str, loaded: Loaded, config: ModelConfig | None = None) -> None:
        config = config or ModelConfig()
        batched = loaded.max_batch_size > 0
        inputs = loaded.inputs or _specs(config.inputs, batched=batched)
        outputs = loaded.outputs or _specs(config.outputs, batched=batched)
        if config.sequences is not None:
            inputs = tuple(i for i in inputs if i.name not in config.sequences.own_inputs)
            outputs = tuple(o for o in outputs if o.name not in config.sequences.own_outputs)
        optional = {part.name for part in config.inputs or () if part.optional}
        self.inputs = inputs
        self.required = tuple(i for i in inputs if not i.optional and i.name not in optional)
        self.outputs = outputs
        self._model = model
        self._most = loaded.max_batch_size
        self._inputs = {spec.name: spec for spec in inputs}
        self._required = [spec.name for spec in self.required]
        self._outputs = frozenset(spec.name for spec in outputs)
        self._accepted: set[Form] = set()
        self._metadata = {"inputs": _described(inputs), "outputs": _described(outputs)}

    def metadata(self) -> dict[str, list[dict[str, Any]]]:
        """Inputs and outputs as KServe V2's model metadata lists them: name, datatype, shape."""
        return self._metadata

    def accept(self, request: InferRequest) -> None:
        """Raises InvalidTensorError, naming what does not fit, unless the model can take it."""
        form = request.form
        if form is not None and form in self._accepted:
            return
        if len(request.inputs) > 1:
            self._check_names_differ(request.inputs)
        self._check(request)
        # Where a text ends is not in the form, nor what a model takes that names no inputs.
        if form is not None and form.fixed and self._inputs:
            if len(self._accepted) >= REMEMBERED:
                self._accepted.clear()
            self._accepted.add(form)

    def _check(self, request: InferRequest) -> None:
        inputs = request.inputs
        if self._inputs:
            self._check_inputs(inputs)
        if self._most:
            self._check_batch(inputs)
        for tensor in inputs:
            tensor.check_size()
        if request.outputs:
            self._check_outputs(request.outputs)

    def _check_inputs(self, inputs: Sequence[Tensor]) -> None:
        known = self._inputs
        if not len(self._required) <= len(inputs) <= len(known):
            raise InvalidTensorError(self._wrong_number(inputs))
        for tensor in inputs:
            spec = known.get(tensor.name)
            if spec is None:
                raise InvalidTensorError(
                    f"unexpected inference input '{tensor.name}' for model '{self._model}'"
                )
            if tensor.datatype != spec.datatype or not _fits(tensor.shape, spec.shape):
                self._refuse(tensor, spec)
        if len(inputs) < len(known):
            self._check_required(inputs)

    def _check_names_differ(self, inputs: Sequence[Tensor]) -> None:
        seen: set[str] = set()
        for tensor in inputs:
            if tensor.name in seen:
                raise InvalidTensorError(f"input '{tensor.name}' already exists in request")
            seen.add(tensor.name)

    def _check_required(self, inputs: Sequence[Tensor]) -> None:
        given = {tensor.name for tensor in inputs}
        if not given.issuperset(self._required):
            raise InvalidTensorError(self._wrong_number(inputs))

    def _wrong_number(self, inputs: Sequence[Tensor]) -> str:
        given = [tensor.name for tensor in inputs]
        least, most = len(self._required), len(self._inputs)
        expected = f"{most} inputs" if least == most else f"between {least} and {most} inputs"
        text = (
            f"expected {expected} but got {len(given)} inputs for model '{self._model}'. "
            f"Got input(s) {_listed(given)}"
        )
        missing = [name for name in self._required if name not in given]
        if missing:
            return (
                f"{text}, but missing required input(s) {_listed(missing)}. "
                f"Please provide all required input(s)."
            )
        unknown = [name for name in given if name not in self._inputs]
        return f"{text}: unexpected inference input '{unknown[0]}' for model '{self._model}'"

    def _refuse(self, tensor: Tensor, spec: TensorSpec) -> None:
        if tensor.datatype != spec.datatype:
            raise InvalidTensorError(
                f"inference input '{tensor.name}' data-type is '{tensor.datatype}', but model "
                f"'{self._model}' expects '{spec.datatype}'"
            )
        raise InvalidTensorError(
            f"unexpected shape for input '{tensor.name}' for model '{self._model}'. Expected "
            f"{_dims(spec.shape)}, got {_dims(tensor.shape)}.{BATCH_NOTE if self._most else ''}"
        )

    def _check_batch(self, inputs: Sequence[Tensor]) -> None:
        rows = -1
        for tensor in inputs:
            if not tensor.shape:
                raise InvalidTensorError(
                    f"input '{tensor.name}' has no shape but model requires batch dimension "
                    f"for '{self._model}'"
                )
            if rows not in (-1, tensor.shape[0]):
                raise InvalidTensorError(
                    f"input '{tensor.name}' batch size does not match other inputs "
                    f"for '{self._model}': {tensor.shape[0]} and {rows}"
                )
            rows = tensor.shape[0]
        if rows > self._most:
            raise InvalidTensorError(
                f"inference request batch-size must be <= {self._most} for '{self._model}'"
            )

    def _check_outputs(self, wanted: tuple[str, ...]) -> None:
        seen: set[str] = set()
        for name in wanted:
            if name in seen:
                raise InvalidTensorError(f"output '{name}' already exists in request")
            seen.add(name)
        if not self._outputs:
            return
        for name in wanted:
            if name not in self._outputs:
                raise InvalidTensorError(
                    f"unexpected inference output '{name}' for model '{self._model}'"
                )


def _fits(shape: Shape, wanted: Shape) -> bool:
    """Negative sizes pass here where any size may: `check_size` refuses them."""
    if len(shape) != len(wanted):
        return False
    return shape == wanted or all(w in (-1, g) for g, w in zip(shape, wanted, strict=True))


def _specs(parts: Sequence[TensorConfig] | None, *, batched: bool) -> tuple[TensorSpec, ...]:
    """As clients see them: a config of a model that batches does not write the batch axis."""
    axis = (-1,) if batched else ()
    return tuple(
        TensorSpec(part.name, part.datatype, axis + part.shape, part.optional)
        for part in parts or ()
    )


def _described(specs: Sequence[TensorSpec]) -> list[dict[str, Any]]:
    return [
        {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)} for spec in specs
    ]


def _listed(names: Sequence[str]) -> str:
    return "[" + ",".join(f"'{name}'" for name in names) + "]"


def _dims(shape: Shape) -> str:
    return "[" + ",".join(map(str, shape)) + "]"
