"""Between what the values of a model's config may lie, and which shapes go with each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from repository.names import MAX_VERSION
from repository.sizes import MAX_BYTES

MOST_PRIORITIES = 100
LONGEST_US = 10**12

# Smallest and largest value; '*' stands for any index of a list.
RANGES: dict[str, tuple[float, float]] = {
    "max_batch_size": (0, 65536),
    "inputs.*.shape.*": (-1, MAX_VERSION),
    "outputs.*.shape.*": (-1, MAX_VERSION),
    "instances": (1, 64),
    "batching.max_delay_us": (0, 10_000_000),
    "batching.preferred_sizes.*": (1, 65536),
    "batching.max_queue": (0, 1_000_000),
    "batching.timeout_us": (0, LONGEST_US),
    "batching.priorities": (0, MOST_PRIORITIES),
    "batching.default_priority": (0, MOST_PRIORITIES),
    "batching.by_priority.*.priority": (1, MOST_PRIORITIES),
    "batching.by_priority.*.max_queue": (0, 1_000_000),
    "batching.by_priority.*.timeout_us": (0, LONGEST_US),
    "version_policy.latest": (1, MAX_VERSION),
    "version_policy.specific.*": (1, MAX_VERSION),
    "warmup.*.batch_size": (1, 65536),
    "warmup.*.count": (1, 10_000),
    "warmup.*.size": (1, MAX_VERSION),
    "checks.atol": (0, 1e30),
    "checks.rtol": (0, 1e30),
    "ttl_s": (0.001, 10**9),
    "sleep_s": (0.001, 10**9),
    "priority": (-(10**6), 10**6),
    "memory": (1, MAX_BYTES),
    "adapters.slots": (1, 256),
    "adapters.max_rank": (1, 512),
    "adapters.host_memory": (0, MAX_BYTES),
    "inputs.*.reshape.*": (-1, MAX_VERSION),
    "outputs.*.reshape.*": (-1, MAX_VERSION),
    "warmup.*.inputs.*.shape.*": (0, MAX_VERSION),
    "ensemble.steps.*.version": (1, MAX_VERSION),
    "ensemble.max_inflight": (0, 1_000_000),
    "sequences.idle_us": (1, LONGEST_US),
    "sequences.max_delay_us": (0, LONGEST_US),
    "sequences.min_slots_ratio": (0, 1),
    "sequences.max_candidates": (0, 1_000_000),
    "sequences.preferred_sizes.*": (1, 65536),
    "sequences.states.*.shape.*": (-1, MAX_VERSION),
    "sequences.states.*.initial_shape.*": (0, MAX_VERSION),
}


def unlike(shape: Sequence[int], reshape: Sequence[int]) -> str:
    """Why a tensor of `shape` cannot become one of `reshape`; "": it can. -1 is any size, and stays the
    same size; between two of them there must be as many elements in both."""
    ours, theirs = _parts(shape), _parts(reshape)
    if len(ours) != len(theirs):
        return f"it has {len(theirs) - 1} sizes that are -1, where the shape has {len(ours) - 1}"
    for a, b in zip(ours, theirs, strict=True):
        if a != b:
            return f"it holds {b} elements, where the shape holds {a}"
    return ""


def _parts(shape: Sequence[int]) -> list[int]:
    """Elements before the first -1, between the first and the second, and so on."""
    free = [-1, *(i for i, size in enumerate(shape) if size == -1), len(shape)]
    return [math.prod(shape[a + 1 : b]) for a, b in pairwise(free)]
