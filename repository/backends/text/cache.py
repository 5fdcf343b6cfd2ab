"""Keys and values of all slots, allocated once: what stands where a model expects its own cache.

Per layer K [slots, heads, max_len, size] and V alike (its own size). A forward takes neighbouring
rows, from `first` on, each row at positions of its own; it reads a window from 0, as wide as the
longest row needs. What lies behind a row's own length is old, and masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers.cache_utils import Cache

WINDOW = 64  # windows are multiples of it: few different shapes, little that is read in vain


class LayerShape(NamedTuple):
    heads: int
    key_size: int
    value_size: int


class SlotCache(Cache):  # type: ignore[misc]  # of a library without types
    def __init__(
        self,
        shapes: Sequence[LayerShape],
        slots: int,
        max_len: int,
        *,
        dtype: torch.dtype,
        device: str,
    ) -> None:
        super().__init__(layers=[])
        self.slots, self.max_len = slots, max_len
        self._keys = [
            torch.zeros(slots, s.heads, max_len, s.key_size, dtype=dtype, device=device)
            for s in shapes
        ]
        self._values = [
            torch.zeros(slots, s.heads, max_len, s.value_size, dtype=dtype, device=device)
            for s in shapes
        ]
        self._all = [*self._keys, *self._values]
        self._device = device
        self._first = self._rows = self._window = 0
        self._positions = torch.zeros(0, 0, dtype=torch.long)
        self._places: dict[int, torch.Tensor] = {}

    @property
    def bytes(self) -> int:
        return sum(part.nbytes for part in self._all)

    @property
    def all(self) -> Sequence[torch.Tensor]:
        return self._all

    def rest(self) -> None:
        """Forgets where the last forward wrote."""
        self._places.clear()
        self._positions = torch.zeros(0, 0, dtype=torch.long)

    def aim(self, first: int, positions: torch.Tensor, longest: int) -> int:
        """Where the next forward writes: rows `first` ..., positions [rows, tokens]. Returns the
        width of the window that it reads; `longest` positions of it must be seen."""
        self._first, self._rows = first, positions.shape[0]
        self._positions = positions
        self._places.clear()
        self._window = min(self.max_len, longest + -longest % WINDOW)
        return self._window

    def _place(self, heads: int) -> torch.Tensor:
        """Of every new vector, [rows · heads · tokens], in a layer seen as [slots·heads·max_len, size].
        The same for all layers of a forward."""
        place = self._places.get(heads)
        if place is None:
            end = self._first + self._rows
            row = torch.arange(self._first, end, device=self._device)[:, None, None] * heads
            head = torch.arange(heads, device=self._device)[None, :, None]
            place = (row + head) * self.max_len + self._positions[:, None, :]
            place = self._places[heads] = place.flatten()
        return place

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: object,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by each attention layer: key_states [rows, heads, tokens, size]."""
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        place = self._place(keys.shape[1])
        for all_of, new in ((keys, key_states), (values, value_states)):
            size = all_of.shape[3]
            all_of.view(-1, size).index_copy_(0, place, new.reshape(-1, size).to(all_of.dtype))
        rows = slice(self._first, self._first + self._rows)
        return keys[rows, :, : self._window], values[rows, :, : self._window]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # positions and masks are given to every forward: nobody has to count

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._window, 0

    @property
    def is_compileable(self) -> bool:
        return False

    def move(self, source: int, target: int, length: int) -> None:
        """Row `target` becomes what row `source` is, as far as it has been written."""
        for part in self._all:
            part[target, :, :length] = part[source, :, :length]

    def swap(self, one: int, other: int, length: int) -> None:
        """`length`: of the longer one."""
        for part in self._all:
            kept = part[one, :, :length].clone()
            part[one, :, :length] = part[other, :, :length]
            part[other, :, :length] = kept

    def wipe(self, row: int) -> None:
        """After numbers that are none: masked ones still spoil what they are multiplied with."""
        for part in self._all:
            part[row].zero_()
