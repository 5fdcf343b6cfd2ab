"""How often the adapters of one model were asked for, and taken by its workers. Plain numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Count:
    requests: int = 0
    loaded: int = 0
    failed: int = 0


class Counts:
    """By name, for as long as the adapter is registered."""

    def __init__(self) -> None:
        self._found: dict[str, Count] = {}

    def of(self, name: str) -> Count:
        return self._found.get(name) or Count()

    def asked(self, name: str) -> None:
        self._mine(name).requests += 1

    def loaded(self, name: str, *, success: bool) -> None:
        count = self._mine(name)
        if success:
            count.loaded += 1
        else:
            count.failed += 1

    def forget(self, name: str) -> None:
        self._found.pop(name, None)

    def _mine(self, name: str) -> Count:
        count = self._found.get(name)
        if count is None:
            count = self._found[name] = Count()
        return count
