"""One request to a torch model, from its tensors to those of its answer. The same for all of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from repository.adapters.orders import ROW_ADAPTERS
from repository.backends import torch_io
from repository.backends.base import Room
from repository.errors import InferenceFailedError, InvalidTensorError
from repository.messages import InferRequest, InferResponse, TensorSpec
from repository.tensors import Tensor, unpack_bytes

FLOATING = {n: dtype for n, dtype in torch_io.DTYPES.items() if dtype.is_floating_point}

# Inputs by name, and the adapter of each row where the request says so.
Run: TypeAlias = Callable[[dict[str, torch.Tensor], Sequence[str]], Any]

log = logging.getLogger(__name__)


class Call:
    """What of a model every request needs.

    inputs, outputs  as they are declared; none: anything goes, and outputs have their own names
    batched          the first axis of every input and output is the batch
    own              answers outlive the next run (see `torch_io.Departure`)
    dtype            floating inputs are given in it, floating outputs converted to what is declared
    """

    def __init__(
        self,
        run: Run,
        device: torch.device,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        *,
        batched: bool,
        own: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._run = run
        self._device = device
        self._inputs = {spec.name: spec.datatype for spec in inputs}
        self._outputs = {spec.name: spec.datatype for spec in outputs}
        self._names = tuple(self._outputs)
        self._batched = batched
        self._own = own
        self._dtype = dtype
        self._writes = False  # the model has written to an input: it gets copies since

    def __call__(self, request: InferRequest, room: Room | None) -> InferResponse:
        """Raises InvalidTensorError, InferenceFailedError, and what the model raises."""
        inputs, adapters = self._arrived(request)
        rows = torch_io.rows_of(inputs.values()) if self._batched else None
        # Seen from outside of inference mode an input counts how often it is written to.
        before = [tensor._version for tensor in inputs.values()]
        answer = self._run(inputs, adapters)
        self._watch(inputs, before)
        found = torch_io.named(answer, self._names)
        departure = torch_io.Departure(room, inputs.values(), own=self._own)
        outputs = []
        for name in request.outputs or self._names or tuple(found):
            value = self._output(name, found)
            torch_io.check_rows(name, value, rows)
            outputs.append(departure.tensor(name, value, self._outputs.get(name)))
        return InferResponse(outputs)

    def _arrived(self, request: InferRequest) -> tuple[dict[str, torch.Tensor], list[str]]:
        inputs: dict[str, torch.Tensor] = {}
        adapters: list[str] = []
        for tensor in request.inputs:
            if tensor.name == ROW_ADAPTERS:
                adapters = [name.decode() for name in unpack_bytes(tensor.data)]
                continue
            self._check(tensor)
            made = torch_io.arrived(tensor, self._device, own=self._writes)
            if self._dtype is not None and made.is_floating_point():
                made = made.to(self._dtype)
            inputs[tensor.name] = made
        return inputs, adapters

    def _check(self, tensor: Tensor) -> None:
        wanted = self._inputs.get(tensor.name, "" if self._inputs else tensor.datatype)
        if tensor.datatype == wanted:
            return
        raise InvalidTensorError(
            f"input '{tensor.name}' is {tensor.datatype}; the model wants {wanted}"
            if wanted
            else f"the model has no input '{tensor.name}'"
        )

    def _watch(self, inputs: Mapping[str, torch.Tensor], before: Sequence[int]) -> None:
        if self._writes:
            return
        for (name, tensor), version in zip(inputs.items(), before, strict=True):
            if tensor._version != version:
                self._writes = True
                log.warning("the model writes to its input '%s': it gets copies from now on", name)

    def _output(self, name: str, found: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if name not in found:
            there = ", ".join(f"'{key}'" for key in found) or "nothing"
            if name not in self._outputs:
                raise InvalidTensorError(f"the model has no output '{name}'; it has {there}")
            raise InferenceFailedError(f"the model returned no '{name}'; it returned {there}")
        value, wanted = found[name], self._outputs.get(name, "")
        if self._dtype is not None and wanted in FLOATING and value.is_floating_point():
            return value.to(FLOATING[wanted])
        return value
