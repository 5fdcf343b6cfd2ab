"""Which layers of a model the keys of an adapter mean.

Each means exactly one Linear, or Conv1D of transformers, with the features that the adapter has. An
adapter that was made for the model inside another one, or around it, is understood where that can mean
one thing only: its names then lack, or have, the same words in front, all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from repository.errors import AdapterRefusedError

DATATYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHOWN = 3  # layers that an error names


class ModelLayers:
    """All layers of a model by their paths. Of one that has several, the first counts."""

    def __init__(self, model: nn.Module) -> None:
        named = model.named_modules(remove_duplicate=False)
        self._modules: dict[str, nn.Module] = {path: module for path, module in named if path}
        self._linear = {path: m for path, m in self._modules.items() if features(m) is not None}
        self._first: dict[int, str] = {}
        for path, layer in self._linear.items():
            self._first.setdefault(id(layer), path)

    def __getitem__(self, path: str) -> nn.Module:
        return self._linear[path]

    def match(self, wanted: Mapping[str, tuple[int, int]]) -> dict[str, str]:
        """`wanted`: a layer's name in the adapter -> [out, in]. Its path in the model, of each.
        Raises AdapterRefusedError."""
        paths = self._paths(list(wanted))
        seen: dict[int, str] = {}
        for name, path in paths.items():
            self._fits(name, path, wanted[name])
            other = seen.setdefault(id(self._linear[path]), name)
            if other != name:
                raise AdapterRefusedError(
                    f"{other} and {name} are the same layer of the model: the adapter was made for "
                    "another model"
                )
        return {name: self._first[id(self._linear[path])] for name, path in paths.items()}

    def _paths(self, names: Sequence[str]) -> dict[str, str]:
        if all(name in self._modules for name in names):
            return {name: name for name in names}
        fitting = [
            paths for paths in self._moved(names) if all(p in self._linear for p in paths.values())
        ]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            both = " or ".join(next(iter(paths.values())) for paths in fitting[:2])
            raise AdapterRefusedError(
                f"{names[0]} may mean {both} of the model: save the adapter with the model's own names"
            )
        raise AdapterRefusedError(self._unmatched(names))

    def _moved(self, names: Sequence[str]) -> Iterable[dict[str, str]]:
        """All names with the same words more, or fewer, in front."""
        name = names[0]
        for path in self._linear:
            if path.endswith("." + name):
                more = path[: -len(name)]
                yield {each: more + each for each in names}
            elif name.endswith("." + path):
                fewer = name[: -len(path)]
                if all(each.startswith(fewer) for each in names):
                    yield {each: each.removeprefix(fewer) for each in names}

    def _unmatched(self, names: Sequence[str]) -> str:
        missing = [name for name in names if name not in self._modules]
        which = (
            "matches no layer of this model"
            if len(missing) == len(names)
            else f"has {len(missing)} layers of {len(names)} that this model has not"
        )
        return (
            f"it {which}: it changes {_some(missing)}; the model has {_some(list(self._linear))}. "
            "Use an adapter that was made for this model"
        )

    def _fits(self, name: str, path: str, wanted: tuple[int, int]) -> None:
        layer = self._modules[path]
        has = features(layer)
        if has is None:
            raise AdapterRefusedError(
                f"{name} is a {type(layer).__name__} in this model: only Linear layers (and Conv1D of "
                "transformers) with floating weights can have adapters"
            )
        if has != tuple(wanted):
            raise AdapterRefusedError(
                f"{name} has {wanted[1]} features in and {wanted[0]} out, the model's has {has[1]} "
                f"and {has[0]}: the adapter was made for another model"
            )
        owner = self._modules.get(path.rpartition(".")[0])
        if isinstance(owner, nn.MultiheadAttention):
            raise AdapterRefusedError(
                f"{name} belongs to a torch.nn.MultiheadAttention, which uses its weight without "
                "calling it: adapters cannot change it"
            )


def features(layer: nn.Module) -> tuple[int, int] | None:
    """[out, in]; None: it is no layer that can have adapters."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.dtype not in DATATYPES or weight.ndim != 2:
        return None
    if isinstance(layer, nn.Linear):
        return weight.shape[0], weight.shape[1]
    if _is_conv1d(layer):
        return weight.shape[1], weight.shape[0]
    return None


def weight_of(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def _is_conv1d(layer: nn.Module) -> bool:
    """transformers' own, a Linear with its weight the other way round. By its name: a model that has
    none needs no transformers."""
    return any(
        kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
        for kind in type(layer).__mro__
    )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:SHOWN]) or "no Linear layer"
    return f"{shown} and {len(names) - SHOWN} more" if len(names) > SHOWN else shown
