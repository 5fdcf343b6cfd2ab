"""Over which devices the instances of a model may be spread. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations
from math import comb

MOST_CHOICES = 64  # of as many devices; a machine with more is offered neighbours only


def spreads(instances: int, devices: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """One device for each instance, as evenly as can be. First over as many devices as there are
    instances, then over fewer and fewer; of each sort every choice of devices."""
    for n in range(min(instances, len(devices)), 0, -1):
        every = comb(len(devices), n) * (1 if instances % n == 0 else n) <= MOST_CHOICES
        chosen = combinations(devices, n) if every else _neighbours(devices, n)
        for few in chosen:
            turns = 1 if instances % n == 0 else n  # who of them has one more
            for turn in range(turns):
                order = few[turn:] + few[:turn]
                yield tuple(order[i % n] for i in range(instances))


def _neighbours(devices: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    ring = (*devices, *devices)
    for first in range(len(devices) if n < len(devices) else 1):
        yield ring[first : first + n]


def shared(n_bytes: int, devices: Sequence[str]) -> dict[str, int]:
    """Of the bytes that all instances need, what those on each device do; rounded up."""
    counts = Counter(devices)
    return {device: -(-n_bytes * n // len(devices)) for device, n in counts.items()}
