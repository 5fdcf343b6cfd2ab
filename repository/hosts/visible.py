"""Which GPU a worker sees. Set in the worker, before anything has started CUDA there.

A part of a GPU (MIG) can only be used by a process that sees it alone, by its UUID; inside, it is the
first GPU. Whole GPUs are seen as the server sees them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from repository.lifecycle.placement import Memory

ALONE = "visible"  # in an order's `extra`: device -> UUID of a part that has to be seen alone
INSIDE = "cuda:0"


class Visible(NamedTuple):
    """`outside`: what others call the device; `device`: what it is here. Both empty: the same."""

    outside: str = ""
    device: str = ""

    def shown(self, memory: Memory) -> Memory:
        """In everybody's words."""
        if not self.device:
            return memory
        return {self.outside if d == self.device else d: kinds for d, kinds in memory.items()}


AS_IS = Visible()


def only(device: str, extra: Mapping[str, Any]) -> Visible:
    """Sees to it that this process sees no more than that part, where the order says so."""
    uuid = extra.get(ALONE, {}).get(device)
    if uuid is None:
        return AS_IS
    os.environ["CUDA_VISIBLE_DEVICES"] = uuid
    return Visible(device, INSIDE)
