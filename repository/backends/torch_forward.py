"""Which input goes to which parameter of a model's `forward`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from repository.errors import InvalidTensorError, LoadFailedError

_ORDERED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def parameters_of(model: torch.nn.Module) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):  # it does not tell: everything goes in order
        return [inspect.Parameter("inputs", inspect.Parameter.VAR_POSITIONAL)]


class Forward:
    """`found`: its parameters. `listed`: the names of the config's inputs, in order; what goes to
    parameters in order goes in this one. Raises LoadFailedError where those cannot be meant."""

    def __init__(
        self, model: Callable[..., Any], found: Sequence[inspect.Parameter], listed: Sequence[str]
    ) -> None:
        self._model = model
        self._listed = tuple(listed)
        kinds = {p.kind for p in found}
        self._any_name = inspect.Parameter.VAR_KEYWORD in kinds
        self._any_number = inspect.Parameter.VAR_POSITIONAL in kinds
        self._ordered = [p for p in found if p.kind in _ORDERED]
        self._named = {p.name for p in found if p.kind in _NAMED}
        self._needed = {
            p.name
            for p in found
            if p.default is p.empty and p.kind in (*_ORDERED, inspect.Parameter.KEYWORD_ONLY)
        }
        self._takes = ", ".join(str(p).partition(":")[0].partition("=")[0] for p in found)
        if listed:
            try:
                self._is_by_name(listed)
            except InvalidTensorError as error:
                raise LoadFailedError(f"{error}; name the inputs in the config so") from error

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> Any:
        """Raises InvalidTensorError for inputs that `forward` does not take, and what it raises."""
        if self._is_by_name(tuple(inputs)):
            missing = self._needed - inputs.keys()
            if missing:
                raise InvalidTensorError(
                    f"input '{min(missing)}' is missing: forward() takes ({self._takes})"
                )
            return self._model(**inputs)
        return self._model(*self._in_order(inputs))

    def _is_by_name(self, names: Sequence[str]) -> bool:
        """All by name, or all in order."""
        unknown = [name for name in names if name not in self._named and not self._any_name]
        if not unknown:
            return True
        if len(unknown) < len(names):
            raise InvalidTensorError(f"forward() takes ({self._takes}), and no '{unknown[0]}'")
        return False

    def _in_order(self, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        order = [name for name in self._listed if name in inputs] or list(inputs)
        most = len(self._ordered)
        least = sum(p.name in self._needed for p in self._ordered)
        keyword = self._needed - {p.name for p in self._ordered}
        if len(order) < least or keyword or (len(order) > most and not self._any_number):
            raise InvalidTensorError(
                f"forward() takes ({self._takes}); the request has {len(order)} inputs "
                f"({', '.join(order)})"
            )
        if order != list(self._listed[: len(order)]) and self._listed:
            gap = next(name for name in self._listed if name not in inputs)
            raise InvalidTensorError(
                f"input '{gap}' is missing, and what comes after it goes to forward() in order"
            )
        return [inputs[name] for name in order]
