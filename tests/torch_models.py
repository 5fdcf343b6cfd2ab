"""Tiny torch models for tests, written when they are needed, and torch backends in this process."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from repository.backends import registry
from repository.backends.base import Backend, Order
from repository.config import ModelConfig, TensorConfig
from repository.messages import InferResponse, Loaded
from repository.tensors import Tensor

MLP = """
    import torch
    class Model(torch.nn.Module):
        def __init__(self, width=8):
            super().__init__()
            self.one = torch.nn.Linear(4, width)
            self.two = torch.nn.Linear(width, 3)
        def forward(self, x):
            return self.two(torch.relu(self.one(x)))
"""
ECHO = """
    import torch
    class Model(torch.nn.Module):
        def forward(self, x):
            return {"y": x}
"""


class Mlp(torch.nn.Module):
    """What MLP says."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.one = torch.nn.Linear(4, width)
        self.two = torch.nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.two(torch.relu(self.one(x)))
        return found


def mlp(seed: int = 0, width: int = 8) -> Mlp:
    torch.manual_seed(seed)
    return Mlp(width).eval().requires_grad_(False)


def write(
    folder: Path, source: str = MLP, tensors: Mapping[str, torch.Tensor] | None = None
) -> Path:
    """A version's folder: model.py and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.py").write_text(textwrap.dedent(source))
    save_file(dict(tensors or {}), folder / "model.safetensors")
    return folder


def write_mlp(folder: Path, seed: int = 0, **tensors: torch.Tensor) -> Path:
    return write(folder, MLP, {**mlp(seed).state_dict(), **tensors})


def order_of(
    folder: Path,
    backend: str = "torch_module",
    *,
    model_file: str = "",
    private: bool = False,
    device: str = "cpu",
    extra: dict[str, Any] | None = None,
    **config: Any,
) -> Order:
    return Order(
        model="m",
        version=1,
        path=folder,
        model_file=model_file,
        config=ModelConfig(backend=backend, **config),
        device=device,
        private=private,
        extra={"shares_process": True, **(extra or {})},
    )


@contextmanager
def loaded(order: Order) -> Iterator[tuple[Any, Loaded]]:
    """A backend in this process, unloaded afterwards."""
    backend: Backend = registry.make(str(order.config.backend), order.config)
    try:
        yield backend, backend.load(order)
    finally:
        backend.unload()


def listed(name: str, datatype: str = "FP32", shape: tuple[int, ...] = (-1,), **more: Any) -> Any:
    return TensorConfig(name=name, datatype=datatype, shape=shape, **more)


def given(**arrays: Any) -> list[Tensor]:
    return [Tensor.of(name, np.asarray(array)) for name, array in arrays.items()]


def answer(response: InferResponse) -> dict[str, Any]:
    return {tensor.name: tensor.array() for tensor in response.outputs}


@contextmanager
def quiet() -> Iterator[None]:
    """Torch warns of what it does itself when it exports, traces or compiles."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def export(path: Path, model: torch.nn.Module, *args: Any, **more: Any) -> Path:
    """A .pt2 of the model. `more`: dynamic_shapes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with quiet():
        torch.export.save(torch.export.export(model, args, **more), path)
    return path
