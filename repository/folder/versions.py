"""Which versions a version policy chooses."""

from __future__ import annotations

from collections.abc import Collection

from repository.config import VersionPolicy

MOST_TOLD = 10


def choose(policy: VersionPolicy, versions: Collection[int]) -> tuple[int, ...]:
    """Those of `versions` that should serve, newest first."""
    newest_first = sorted(set(versions), reverse=True)
    if policy.specific is not None:
        return tuple(v for v in newest_first if v in policy.specific)
    if policy.all:
        return tuple(newest_first)
    return tuple(newest_first[: policy.latest])


def missing(policy: VersionPolicy, versions: Collection[int]) -> tuple[int, ...]:
    """Versions that the policy names and that do not exist."""
    return tuple(sorted(set(policy.specific or ()).difference(versions)))


def described(policy: VersionPolicy) -> str:
    if policy.specific is not None:
        first = ", ".join(map(str, policy.specific[:MOST_TOLD]))
        return f"specific: [{first}{', ...' if len(policy.specific) > MOST_TOLD else ''}]"
    return "all" if policy.all else f"latest: {policy.latest}"
