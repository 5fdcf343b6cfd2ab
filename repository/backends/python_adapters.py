"""Adapters of a model written in Python: the model keeps them, this says which and for which rows."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from repository.adapters.orders import ROW_ADAPTERS, AdapterOrder, AdapterReport
from repository.errors import AdapterNotFoundError, AdapterRefusedError
from repository.messages import InferRequest
from repository.tensors import Tensor, unpack_bytes

log = logging.getLogger(__name__)

METHODS = ("add_adapter", "remove_adapter")


class PythonAdapters:
    """Of one instance of the model's class."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._known: dict[str, AdapterOrder] = {}
        self.can = all(callable(getattr(model, name, None)) for name in METHODS)
        self._wants_rows = self.can and "adapters" in inspect.signature(model.infer).parameters

    def adapt(self, orders: Sequence[AdapterOrder]) -> list[AdapterReport]:
        """As `abilities.Adapts`."""
        if not orders:
            return [_report(order) for order in self._known.values()]
        return [self._carry_out(order) for order in orders]

    def take(self, request: InferRequest) -> tuple[list[Tensor], dict[str, Any]]:
        """The inputs that are the model's, and what `infer` is given beside them. Raises
        AdapterNotFoundError."""
        inputs = request.inputs
        if not self.can:
            return inputs, {}
        names: list[str] | None = None
        if inputs and inputs[-1].name == ROW_ADAPTERS:
            names = [raw.decode() for raw in unpack_bytes(inputs[-1].data)]
            inputs = inputs[:-1]
            for name in names:
                if name and name not in self._known:
                    raise AdapterNotFoundError(f"The adapter {name} has not been registered")
        if not self._wants_rows:
            return inputs, {}
        return inputs, {"adapters": [""] * _rows(inputs) if names is None else names}

    def _carry_out(self, order: AdapterOrder) -> AdapterReport:
        try:
            if order.remove:
                if self._known.pop(order.name, None) is not None:
                    self._model.remove_adapter(order.name)
                return AdapterReport(order.name)
            before = self._known.get(order.name)
            if before is None or _content(before) != _content(order):
                _check_files(order)
                self._model.add_adapter(order.name, Path(order.path), dict(order.options))
            self._known[order.name] = order
            return _report(order)
        except (Exception, SystemExit) as error:  # the model's edge
            ours = isinstance(error, AdapterRefusedError)
            if not ours:
                log.warning("adapter %s: the model raised", order.name, exc_info=error)
            text = str(error) if ours else f"{type(error).__name__}: {error}"
            told = text.replace(order.path, ".") if order.path else text
            return AdapterReport(order.name, error=told)


def _content(order: AdapterOrder) -> object:
    return order.fingerprint, order.path, order.options


def _check_files(order: AdapterOrder) -> None:
    for file in order.files:
        try:
            now = os.stat(os.path.join(order.path, file.name))
        except OSError as error:
            raise AdapterRefusedError(f"{file.name} cannot be read: {error.strerror}") from None
        if (now.st_size, now.st_mtime_ns, now.st_ino) != (file.size, file.mtime_ns, file.inode):
            raise AdapterRefusedError(f"{file.name} has changed since it was looked at")


def _report(order: AdapterOrder) -> AdapterReport:
    """What the model makes of it nobody knows; the files are what they are."""
    size = sum(file.size for file in order.files)
    return AdapterReport(order.name, residence="host", bytes=size)


def _rows(inputs: Sequence[Tensor]) -> int:
    """As the front counts them: the first axis, where all inputs share one."""
    axes = {tensor.shape[:1] for tensor in inputs}
    return next(iter(axes))[0] if len(axes) == 1 and () not in axes else 1
