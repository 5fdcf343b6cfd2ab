"""Has something that is seen again and again come to rest? Pure: what was seen and times in.

Rule: content is at rest once two looks at least `settle_s` apart saw the same, or when its newest
change is `settle_s` old already. What is gone counts as content too.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass


@dataclass(slots=True)
class _Candidate:
    fingerprint: str | None  # None: it is gone
    since: float  # wall seconds when it was first seen like this


class Rest:
    """One for all things of a kind; `key` says which."""

    def __init__(self, settle_s: float) -> None:
        self._settle_s = settle_s
        self._candidates: dict[Hashable, _Candidate] = {}

    def wait(
        self, key: Hashable, fingerprint: str | None, newest_ctime: float, now: float
    ) -> float | None:
        """In how many seconds it may be at rest, if it stays as it is; None: it is, and is
        forgotten here. `fingerprint` None: it is gone."""
        candidate = self._candidates.get(key)
        if candidate is None or candidate.fingerprint != fingerprint or candidate.since > now:
            candidate = self._candidates[key] = _Candidate(fingerprint, now)
        due = candidate.since + self._settle_s
        if fingerprint is not None:
            due = min(due, newest_ctime + self._settle_s)
        if now < due:
            return due - now
        del self._candidates[key]
        return None

    def forget(self, key: Hashable) -> None:
        """It is again what it was."""
        self._candidates.pop(key, None)

    def keep(self, which: Callable[[Hashable], bool]) -> None:
        """Forgets all others."""
        for key in [k for k in self._candidates if not which(k)]:
            del self._candidates[key]
