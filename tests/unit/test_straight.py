"""Places for large bodies: where they begin, and whose memory they are."""

from __future__ import annotations

import numpy as np
import pytest

from repository.tensors import ALIGN
from server.straight import place_for


def address(view: memoryview) -> int:
    found: int = np.frombuffer(view, np.uint8).ctypes.data
    return found


@pytest.mark.parametrize("header_length", [0, 1, 63, 64, 120, 5000])
def test_what_lies_behind_the_header_is_aligned(header_length: int) -> None:
    for shift in (0, 1, 17):
        memory = np.zeros(20_000, np.uint8)

        def room(size: int, memory: np.ndarray = memory, shift: int = shift) -> memoryview:
            return memory[shift : shift + size].data

        for place in (
            place_for(10_000, header_length, room),
            place_for(10_000, header_length, None),
        ):
            assert place is not None and len(place) == 10_000
            assert (address(place) + header_length) % ALIGN == 0


def test_a_place_that_nobody_has_is_our_own() -> None:
    place = place_for(1000, 10, lambda size: None)
    assert place is not None and len(place) == 1000 and not place.readonly


def test_without_memory_there_is_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("server.straight.np.empty", none)
    assert place_for(1 << 40, 0, None) is None
