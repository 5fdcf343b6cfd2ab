"""Adapters for tests: PEFT's files written by hand for a small model, and what they come to, computed
directly.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from repository.adapters.orders import AdapterFile, AdapterOrder

PREFIX = "base_model.model."


@contextmanager
def one_thread() -> Iterator[None]:
    """Small products in several threads wait for each other more than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Mlp(nn.Module):
    """16 → 32 → 8."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.fc1 = nn.Linear(16, 32)
        self.norm = nn.LayerNorm(32)
        self.fc2 = nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.fc2(torch.relu(self.fc1(x)))
        return result


MLP = {"fc1": (32, 16), "fc2": (8, 32)}


@dataclass(frozen=True)
class Made:
    """An adapter that was written. `a`, `b`, `scaling` of each layer, as PEFT means them."""

    path: Path
    parts: dict[str, tuple[torch.Tensor, torch.Tensor, float]]

    def mlp(self, model: Mlp, x: torch.Tensor) -> torch.Tensor:
        """What an Mlp with it gives."""
        return self._layer(model, "fc2", torch.relu(self._layer(model, "fc1", x)))

    def _layer(self, model: Mlp, name: str, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = getattr(model, name)(x)
        if name in self.parts:
            a, b, scaling = self.parts[name]
            y = y + (x @ a.t()) @ b.t() * scaling
        return y


def write(
    path: Path,
    layers: Mapping[str, tuple[int, int]] = MLP,
    *,
    seed: int = 0,
    r: int = 4,
    alpha: float = 8,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Made:
    """`layers`: name -> [out, in]."""
    made = tensors(layers, seed=seed, r=r, dtype=dtype)
    path.mkdir(parents=True, exist_ok=True)
    save_file(made, path / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, **config}
    (path / "adapter_config.json").write_text(json.dumps(said))
    a, b = ".lora_A.weight", ".lora_B.weight"
    return Made(
        path,
        {
            n: (made[PREFIX + n + a].float(), made[PREFIX + n + b].float(), alpha / r)
            for n in layers
        },
    )


def tensors(
    layers: Mapping[str, tuple[int, int]], *, seed: int = 0, r: int = 4, dtype: Any = torch.float32
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, torch.Tensor] = {}
    for name, (out_features, in_features) in layers.items():
        a = torch.randn(r, in_features, generator=generator)
        b = torch.randn(out_features, r, generator=generator)
        made[f"{PREFIX}{name}.lora_A.weight"] = (a * 0.3).to(dtype)
        made[f"{PREFIX}{name}.lora_B.weight"] = (b * 0.3).to(dtype)
    return made


def order(path: Path, name: str, **wishes: Any) -> AdapterOrder:
    """As the front would give it now."""
    files = []
    for file in sorted(path.iterdir()):
        found = file.stat()
        files.append(AdapterFile(file.name, found.st_size, found.st_mtime_ns, found.st_ino))
    return AdapterOrder(
        name, path=str(path.resolve()), fingerprint=repr(files), files=tuple(files), **wishes
    )
