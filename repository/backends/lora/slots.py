"""The slots of the layers that adapters change, and what a forward does with them.

A layer itself stays as it is; while any row of the batch has an adapter, a forward hook adds to what it
gave. With none, no hook is there: the model is what it was before. A row of slot 0 in a mixed batch is
left alone too: it has the bits that the same batch gives without adapters.

What a slot holds is padded with zeros to the rank of the slots, and B was multiplied with the adapter's
scaling beforehand: y += (x · Aᵀ) · B.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from repository.backends.lora.arrange import Groups, arrange
from repository.backends.lora.matching import weight_of
from repository.errors import InferenceFailedError

Tensor = torch.Tensor


class RowsUnclearError(InferenceFailedError):
    """A layer was given something of which nobody can tell where the rows of the batch lie in it."""


class Rows:
    """Which slot each row of the next forward belongs to. Shared by all layers of a model.

    `rows_first`: see `LoraAdapters.rows`.
    """

    def __init__(self) -> None:
        self.slots: tuple[int, ...] = ()
        self.rows_first = True
        self.shared: int | None = 0  # the slot, where it is the same for all rows
        self.groups: list[Groups] = []
        self._indices: dict[tuple[int, torch.device], tuple[Tensor, ...]] = {}

    def set(self, slots: Sequence[int]) -> None:
        self.slots = tuple(slots)
        distinct = set(slots)
        self.shared = next(iter(distinct), 0) if len(distinct) < 2 else None
        self.groups = [] if self.shared is not None else arrange(slots)
        self._indices.clear()

    def indices(self, at: int, device: torch.device) -> tuple[Tensor, ...]:
        """Of group `at`: padded, places, rows, slots; made once a forward, not once a layer."""
        found = self._indices.get((at, device))
        if found is None:
            group = self.groups[at]
            numbers = (group.padded, group.places, group.rows, group.slots or ())
            found = tuple(torch.tensor(each, dtype=torch.long, device=device) for each in numbers)
            self._indices[at, device] = found
        return found


class LayerSlots:
    """The slots of one layer: `a` [slots + 1, rank, in], `b` [slots + 1, rank, out]; slot 0 is zeros.

    `ranks`: how much of each slot is in use.
    """

    def __init__(
        self, path: str, layer: nn.Module, features: tuple[int, int], slots: int, rank: int
    ) -> None:
        out_features, in_features = features
        weight = weight_of(layer)
        self._path = path
        like: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
        with torch.inference_mode(False):  # slots are written to outside of it too
            self.a = torch.zeros(slots + 1, rank, in_features, **like)
            self.b = torch.zeros(slots + 1, rank, out_features, **like)
        self._ranks = [0] * (slots + 1)
        self._hook: Any = None

    @property
    def bytes(self) -> int:
        return self.a.nbytes + self.b.nbytes

    def fill(self, slot: int, a: Tensor, b: Tensor) -> None:
        """`a` [r, in], `b` [r, out], of the layer's datatype."""
        rank, before = len(a), self._ranks[slot]
        self.a[slot, :rank].copy_(a, non_blocking=True)
        self.b[slot, :rank].copy_(b, non_blocking=True)
        if before > rank:
            self.a[slot, rank:before].zero_()
            self.b[slot, rank:before].zero_()
        self._ranks[slot] = rank

    def clear(self, slot: int) -> None:
        if self._ranks[slot]:
            self.a[slot].zero_()
            self.b[slot].zero_()
            self._ranks[slot] = 0

    def hook(self, layer: nn.Module, rows: Rows) -> None:
        """From now on, what the rows' adapters change is added to what `layer` gives, which is the
        one that this was made for: not kept, so that hook and layer do not keep each other alive."""
        if self._hook is not None:
            return

        def add(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any], y: Tensor) -> Tensor:
            x = args[0] if args else next(iter(named.values()))
            return self._add(x, y, rows)

        self._hook = layer.register_forward_hook(add, with_kwargs=True)

    def unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _add(self, x: Tensor, y: Tensor, rows: Rows) -> Tensor:
        if not y.numel():
            return y
        if x.dtype is self.a.dtype is y.dtype and y.is_contiguous():
            self._add_to(y, x, rows)
            return y
        # Under autocast, say: in the datatype of the slots, beside what the layer gave.
        with torch.autocast(self.a.device.type, enabled=False):
            change = torch.zeros(y.shape, dtype=self.a.dtype, device=y.device)
            self._add_to(change, x.to(self.a.dtype), rows)
        return y + change.to(y.dtype)

    def _add_to(self, y: Tensor, x: Tensor, rows: Rows) -> None:
        if rows.shared is not None:
            flat = y.view(-1, y.shape[-1])
            h = torch.mm(x.reshape(-1, x.shape[-1]), self.a[rows.shared].t())
            flat.addmm_(h, self.b[rows.shared])
            return
        count = len(rows.slots)
        if not _is_by_rows(x, count, known=rows.rows_first):
            raise RowsUnclearError(
                f"layer {self._path} was given {list(x.shape)} in a batch of {count} rows: requests "
                "for different adapters cannot share a batch of this model; set max_batch_size to 0"
            )
        # [rows, in], [rows, any, in] or [rows * any, in] -> [rows, any, in]
        x = x.reshape(count, -1, x.shape[-1])
        y = y.view(count, -1, y.shape[-1])
        for at, group in enumerate(rows.groups):
            if group.begin is None or group.slots is not None:
                self._add_gathered(y, x, group, rows.indices(at, x.device))
            else:
                self._add_straight(y, x, group, group.begin)

    def _add_straight(self, y: Tensor, x: Tensor, group: Groups, begin: int) -> None:
        end, slots = begin + len(group.rows), slice(group.first, group.first + group.count)
        x = x[begin:end].reshape(group.count, -1, x.shape[-1])
        y = y[begin:end].view(group.count, -1, y.shape[-1])
        y.baddbmm_(torch.bmm(x, self.a[slots].transpose(1, 2)), self.b[slots])

    def _add_gathered(
        self, y: Tensor, x: Tensor, group: Groups, indices: tuple[Tensor, ...]
    ) -> None:
        padded, places, rows, slots = indices
        if group.slots is None:
            beside = slice(group.first, group.first + group.count)
            a, b = self.a[beside], self.b[beside]
        else:
            a, b = self.a.index_select(0, slots), self.b.index_select(0, slots)
        each = x.shape[1]
        x = x.index_select(0, padded).view(group.count, group.size * each, x.shape[-1])
        change = torch.bmm(torch.bmm(x, a.transpose(1, 2)), b).view(-1, each, y.shape[-1])
        y.index_add_(0, rows, change.index_select(0, places))


def _is_by_rows(x: Tensor, count: int, *, known: bool) -> bool:
    """Is it [rows, ..., in], or (where that is `known` of the model) [rows * any, in]? By its shape."""
    if x.ndim < 2:
        return False
    if known:
        return len(x) == count or (x.ndim == 2 and len(x) % count == 0)
    return len(x) == count and count not in x.shape[1:-1]
