"""Adapters that are kept in host memory: the ones asked for last, as many as the limit holds."""

from __future__ import annotations

from collections import OrderedDict

from repository.backends.lora.reading import HostCopy


class HostMemory:
    """Keys as in the SlotTable. `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._copies: OrderedDict[str, HostCopy] = OrderedDict()
        self.bytes = 0

    def __contains__(self, key: str) -> bool:
        return key in self._copies

    def get(self, key: str) -> HostCopy | None:
        copy = self._copies.get(key)
        if copy is not None:
            self._copies.move_to_end(key)
        return copy

    def keep(self, key: str, copy: HostCopy) -> None:
        """Others go for it. One that is larger than the limit is not kept."""
        self.drop(key)
        if copy.bytes > self._limit:
            return
        while self.bytes + copy.bytes > self._limit:
            _, gone = self._copies.popitem(last=False)
            self.bytes -= gone.bytes
        self._copies[key] = copy
        self.bytes += copy.bytes

    def copies(self) -> tuple[HostCopy, ...]:
        return tuple(self._copies.values())

    def drop(self, key: str) -> None:
        gone = self._copies.pop(key, None)
        if gone is not None:
            self.bytes -= gone.bytes
