"""From the vectors of a text's tokens to the vector of the text, as sentence-transformers counts it.

Rows are padded behind their tokens, so a token's position is its column. All is computed in
float32, whatever the encoder computes in.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from repository.backends.embed.folder import Dense, EncoderFolder
from repository.backends.weights import read_weights, weight_files
from repository.errors import LoadFailedError

SMALLEST = 1e-9
# A missing name means Tanh, as it does to who wrote the folder.
ACTIVATIONS: dict[str, type[nn.Module]] = {
    kind.__name__: kind
    for kind in (
        nn.ELU, nn.GELU, nn.Hardswish, nn.Identity, nn.LeakyReLU, nn.Mish, nn.ReLU, nn.ReLU6,
        nn.Sigmoid, nn.SiLU, nn.Softplus, nn.Tanh,
    )
}  # fmt: skip


def _cls(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    first = mask.to(torch.int32).argmax(dim=1)
    return hidden[torch.arange(len(hidden), device=hidden.device), first]


def _max(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return hidden.masked_fill(~mask.unsqueeze(-1), float("-inf")).amax(dim=1)


def _sum(hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return torch.einsum("nld,nl->nd", hidden, weights)


def _mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weights = mask.to(hidden.dtype)
    return _sum(hidden, weights) / weights.sum(dim=1, keepdim=True).clamp(min=SMALLEST)


def _mean_sqrt_len(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weights = mask.to(hidden.dtype)
    return _sum(hidden, weights) / weights.sum(dim=1, keepdim=True).clamp(min=SMALLEST).sqrt()


def _weighted_mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(1, hidden.shape[1] + 1, device=hidden.device, dtype=hidden.dtype)
    weights = mask.to(hidden.dtype) * positions
    return _sum(hidden, weights) / weights.sum(dim=1, keepdim=True).clamp(min=SMALLEST)


def _last_token(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    columns = torch.arange(hidden.shape[1], device=hidden.device)
    last = torch.where(mask, columns, -1).amax(dim=1).clamp(min=0)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


WAYS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cls": _cls,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt_len,
    "weightedmean": _weighted_mean,
    "lasttoken": _last_token,
}


class Head(nn.Module):
    """What follows the encoder: pooling, then the steps of the folder.

    `skip`: so many tokens at the front of each row (a prompt's) are left out of the pooling.
    """

    def __init__(self, folder: EncoderFolder, hidden: int, *, private: bool) -> None:
        super().__init__()
        self._ways = [WAYS[mode] for mode in folder.pooling]
        width = hidden * len(self._ways)
        layers: list[nn.Module] = []
        for step in folder.steps:
            if isinstance(step, Dense):
                layers.append(_Linear(step, width, private=private))
                width = step.outputs
            else:
                layers.append(_UnitLength())
        self.layers = nn.ModuleList(layers)
        self.width = width

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor, skip: int = 0) -> torch.Tensor:
        """hidden [n, length, width], mask bool [n, length] -> float32 [n, dimensions]."""
        hidden = hidden.float()
        if skip:
            mask = mask.clone()
            mask[:, :skip] = False
        parts = [way(hidden, mask) for way in self._ways]
        vector = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        for layer in self.layers:
            vector = layer(vector)
        return vector


class _UnitLength(nn.Module):
    def forward(self, vector: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(vector, p=2, dim=-1)


class _Linear(nn.Module):
    """A Dense module of sentence-transformers."""

    def __init__(self, said: Dense, width: int, *, private: bool) -> None:
        super().__init__()
        where = said.folder.name
        if said.inputs != width:
            raise LoadFailedError(f"{where} takes {said.inputs} numbers; it is given {width}")
        with torch.device("meta"):
            self.linear = nn.Linear(said.inputs, said.outputs, bias=said.bias)
            if said.residual and said.inputs != said.outputs:
                self.residual = nn.Linear(said.inputs, said.outputs, bias=False)
        self._residual = said.residual
        self._same = said.inputs == said.outputs
        found = read_weights(weight_files(said.folder), private=private, dtype=torch.float32)
        _check(where, self.state_dict(), found)
        self.load_state_dict(found, assign=True)
        self.activation = _activation(where, said.activation)

    def forward(self, vector: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.activation(self.linear(vector))
        if not self._residual:
            return made
        return made + (vector if self._same else self.residual(vector))


def _activation(where: str, name: str | None) -> nn.Module:
    if name is None:
        return nn.Identity()
    known = ACTIVATIONS.get(name.rpartition(".")[2])
    if known is None or not name.startswith("torch.nn."):
        raise LoadFailedError(
            f"{where}/config.json has the activation '{name}'; known are "
            f"{', '.join(sorted(ACTIVATIONS))} of torch.nn"
        )
    return known()


def _check(where: str, wanted: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    for name, tensor in wanted.items():
        if name not in found:
            raise LoadFailedError(f"{where}: '{name}' is missing from the weights")
        if found[name].shape != tensor.shape:
            raise LoadFailedError(
                f"{where}: '{name}' has shape {list(found[name].shape)}; its config says "
                f"{list(tensor.shape)}"
            )
    if more := sorted(found.keys() - wanted.keys()):
        raise LoadFailedError(f"{where}: '{more[0]}' belongs to no part of the module")
