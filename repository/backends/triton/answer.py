"""`pb_utils.InferenceResponse`: what a model answers one request with, and what others answered it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from repository.backends.triton.errors import TritonError, TritonModelException
from repository.backends.triton.tensor import Tensor


class InferenceResponse:
    """Either tensors or an error. `parameters`: text -> text, bool or number."""

    __slots__ = ("_error", "_parameters", "_tensors")

    def __init__(
        self,
        output_tensors: Sequence[Tensor] = (),
        error: TritonError | None = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> None:
        for tensor in output_tensors:
            if not isinstance(tensor, Tensor):
                raise TritonModelException(
                    f"output_tensors holds {type(tensor).__name__}; it takes pb_utils.Tensor alone"
                )
        if error is not None and not isinstance(error, TritonError):
            raise TritonModelException(
                f"error must be a pb_utils.TritonError, not {type(error).__name__}"
            )
        self._tensors = list(output_tensors)
        self._error = error
        self._parameters = checked(parameters)

    def output_tensors(self) -> list[Tensor]:
        return self._tensors

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error

    def parameters(self) -> str:
        """As JSON."""
        return json.dumps(self._parameters)

    def said(self) -> dict[str, Any]:
        """The same, not as text."""
        return self._parameters


def checked(parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """A copy of what may travel. Raises TritonModelException."""
    found = dict(parameters or {})
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, str | bool | int | float):
            raise TritonModelException(
                f"parameter {key!r} is {value!r}; a name is text, a value text, bool or a number"
            )
    return found
