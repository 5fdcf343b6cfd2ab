"""All layers of a model that have slots, as one: made together, filled together, told the rows once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from repository.backends.lora.matching import ModelLayers, features, weight_of
from repository.backends.lora.reading import HostCopy
from repository.backends.lora.slots import LayerSlots, Rows
from repository.errors import NoRoomError


class SlottedLayers:
    def __init__(self, model: ModelLayers, slots: int, rank: int) -> None:
        self._model = model
        self._slots = slots
        self._rank = rank
        self._layers: dict[str, LayerSlots] = {}
        self._rows = Rows()
        self._hooked = False
        self._used: dict[int, frozenset[str]] = {}

    @property
    def bytes(self) -> int:
        return sum(layer.bytes for layer in self._layers.values())

    def tensors(self) -> Iterator[torch.Tensor]:
        for layer in self._layers.values():
            yield layer.a
            yield layer.b

    def add(self, paths: Iterable[str]) -> None:
        """Slots for those that have none yet. Raises NoRoomError; then none of them has."""
        made: dict[str, LayerSlots] = {}
        needed = 0
        for path in paths:
            if path in self._layers:
                continue
            layer = self._model[path]
            out_in = features(layer)
            assert out_in is not None
            needed += (self._slots + 1) * self._rank * sum(out_in) * weight_of(layer).element_size()
            try:
                made[path] = LayerSlots(path, layer, out_in, self._slots, self._rank)
            except (MemoryError, RuntimeError) as error:  # torch says "out of memory" with either
                made.clear()
                raise NoRoomError(
                    f"no memory for the slots of its layers ({needed} bytes and more): lower "
                    "adapters.slots or adapters.max_rank in the model's config",
                    needed=needed,
                ) from error
        self._layers |= made
        for path, slots in made.items() if self._hooked else ():
            slots.hook(self._model[path], self._rows)

    def fill(self, slot: int, copy: HostCopy) -> None:
        with torch.no_grad():
            for path in self._used.get(slot, frozenset()) - copy.parts.keys():
                self._layers[path].clear(slot)
            self._used[slot] = frozenset(copy.parts)
            for path, (a, b) in copy.parts.items():
                self._layers[path].fill(slot, a, b)

    def rows(self, slots: Sequence[int], *, rows_first: bool) -> None:
        self._rows.rows_first = rows_first
        if tuple(slots) == self._rows.slots:
            return
        if not all(0 <= slot <= self._slots for slot in slots):
            raise ValueError(f"rows of slots {sorted(set(slots))}: there are 0 to {self._slots}")
        self._rows.set(slots)
        wanted = self._rows.shared != 0
        if wanted != self._hooked:
            self._hooked = wanted
            for path, layer in self._layers.items():
                if wanted:
                    layer.hook(self._model[path], self._rows)
                else:
                    layer.unhook()
