"""Which rows of a batch run together: those of like length, so that padding costs little."""

from __future__ import annotations

from collections.abc import Sequence

# What one more run of an encoder costs, in tokens. A run of MiniLM on one core takes about 15 ms
# where it has 8 tokens, and 0.25 ms more for each further one.
RUN_COSTS = 64


def by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Every row once, by its place. A run ends where padding the rest to its longest row would cost
    more than another run."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    runs: list[list[int]] = []
    longest = 0
    for done, row in enumerate(order):
        saved = (longest - lengths[row]) * (len(order) - done)
        if not runs or saved > RUN_COSTS:
            runs.append([])
            longest = lengths[row]
        runs[-1].append(row)
    return runs
