"""Slots, host memory and the order of rows, without a model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repository.backends.lora.arrange import arrange
from repository.backends.lora.table import SlotTable


def seated(table: SlotTable, *keys: str) -> None:
    for key in keys:
        slot = table.free()
        assert slot is not None
        table.put(slot, key)


def test_empty_slots_are_filled_first_then_the_one_taken_longest_ago_goes() -> None:
    table = SlotTable(3)
    seated(table, "a", "b", "c")
    assert [table.find(key) for key in "abc"] == [1, 2, 3]
    table.take(1)
    table.give(1)
    assert table.free() == 2
    seated(table, "d")
    assert table.find("b") is None and table.find("d") == 2


def test_slots_in_use_and_pinned_ones_are_never_free() -> None:
    table = SlotTable(2)
    seated(table, "a", "b")
    table.take(1)
    table.take(1)
    table.pin(2, True)
    assert table.free() is None and table.pinned == 1
    assert not table.give(1)
    assert table.free() is None
    assert table.give(1)
    assert table.free() == 1


def test_a_dropped_adapter_keeps_its_slot_for_those_who_use_it() -> None:
    table = SlotTable(1)
    seated(table, "a")
    table.take(1)
    table.pin(1, True)
    table.drop("a")
    assert table.find("a") is None and table.free() is None and table.pinned == 0
    table.give(1)
    assert table.free() == 1
    table.drop("a")  # again: nothing


@pytest.mark.parametrize("slot", [-1, 0, 1, 3])
def test_giving_back_what_was_not_taken_is_an_error(slot: int) -> None:
    table = SlotTable(2)
    seated(table, "a", "b")
    table.take(2)
    with pytest.raises(ValueError, match="not taken"):
        table.give(slot)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40))
def test_every_row_with_an_adapter_has_one_place_in_the_group_of_its_slot(slots: list[int]) -> None:
    seen: list[int] = []
    for group in arrange(slots) if any(slots) else []:
        order = group.slots or tuple(range(group.first, group.first + group.count))
        assert len(group.padded) == group.count * group.size
        assert len(group.rows) == len(group.places)
        for row, place in zip(group.rows, group.places, strict=True):
            assert slots[row] == order[place // group.size]
            assert group.padded[place] == row
        if group.begin is not None:
            assert (
                group.padded
                == group.rows
                == tuple(range(group.begin, group.begin + len(group.rows)))
            )
        assert len(group.padded) <= 4 * len(group.rows)  # the waste has a limit
        seen += group.rows
    assert sorted(seen) == [row for row, slot in enumerate(slots) if slot]


def test_rows_in_the_order_of_their_slots_need_not_be_moved() -> None:
    (group,) = arrange([0, 2, 2, 3, 3, 0])
    assert (group.begin, group.first, group.count, group.size) == (1, 2, 2, 2)
    (group,) = arrange([3, 2])
    assert group.begin is None
