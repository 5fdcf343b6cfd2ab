"""From a model's response to what travels: the outputs that were asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from repository.backends.triton.answer import InferenceResponse
from repository.backends.triton.errors import TritonModelException
from repository.backends.triton.tensor import Tensor
from repository.messages import InferResponse
from repository.tensors import Tensor as Wire


class Outgoing:
    """declared   output -> datatype; empty: the model says nothing of its outputs, all are sent
    told       hears, once for each output, of a datatype that is not the declared one
    """

    def __init__(self, declared: Mapping[str, str], told: Callable[[str], None]) -> None:
        self.names = tuple(declared)
        self._declared = declared
        self._told = told
        self._known: set[str] = set()

    def __call__(self, wanted: tuple[str, ...], response: InferenceResponse) -> InferResponse:
        """`wanted`: empty for all that are declared. Raises TritonModelException for an output that
        cannot travel, or comes twice."""
        names = wanted or self.names
        outputs = [
            self._wire(tensor)
            for tensor in response.output_tensors()
            if not names or tensor.name() in names
        ]
        if len({tensor.name for tensor in outputs}) < len(outputs):
            raise TritonModelException("the response has two outputs of one name")
        return InferResponse(outputs, dict(response.said()))

    def _wire(self, tensor: Tensor) -> Wire:
        name = tensor.name()
        declared = self._declared.get(name, "")
        wire = tensor.wire(declared)
        if declared and wire.datatype != declared and name not in self._known:
            self._known.add(name)
            self._told(
                f"execute() answers '{name}' as {wire.datatype}, the config says {declared}: clients "
                "get what it answers"
            )
        return wire
