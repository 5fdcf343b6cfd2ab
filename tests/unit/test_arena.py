"""Memory shared with workers: given out and taken back by nobody's word."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repository.hosts.arena import PAGE, REST_S, Arena, Window

MIB = 1 << 20


@contextmanager
def arena_of(size: int) -> Iterator[tuple[Arena, int]]:
    """An arena, and a second descriptor of its memory."""
    arena = Arena(size)
    fd = os.dup(arena.fd)
    try:
        yield arena, fd
    finally:
        arena.close()
        os.close(fd)


def taken(arena: Arena, size: int) -> memoryview:
    found = arena.take(size)
    assert found is not None
    return found[0]


def place(arena: Arena, view: memoryview) -> int:
    at = arena.place_of(view)
    assert at is not None
    return at


def memory_of(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


def mappings() -> int:
    with open("/proc/self/maps") as file:
        return sum("memfd:modeldepot" in line for line in file)


async def test_a_place_is_free_again_when_the_last_view_of_it_has_died():
    with arena_of(4 * PAGE) as (arena, _):
        whole = taken(arena, 4 * PAGE)
        part = np.frombuffer(whole[PAGE : 2 * PAGE], np.uint8).reshape(2, -1)[1].data
        del whole
        assert arena.take(1) is None
        del part
        assert len(taken(arena, 4 * PAGE)) == 4 * PAGE


async def test_a_view_may_die_on_another_thread_or_in_a_cycle():
    with arena_of(2 * PAGE) as (arena, _):
        views = [taken(arena, PAGE), taken(arena, PAGE)]
        thread = threading.Thread(target=views.pop)
        thread.start()
        thread.join()
        assert arena.take(PAGE) is not None
        cycle: list[object] = [views.pop()]
        cycle.append(cycle)
        del cycle
        gc.collect()
        assert arena.take(2 * PAGE) is not None


async def test_places_are_given_from_the_lowest_address_that_fits():
    with arena_of(8 * PAGE) as (arena, _):
        first, second, third = (taken(arena, size) for size in (PAGE, 2 * PAGE, 1))
        assert [place(arena, v) for v in (first, second, third)] == [0, PAGE, 3 * PAGE]
        del second
        assert place(arena, taken(arena, 3 * PAGE)) == 4 * PAGE
        again = taken(arena, PAGE + 1)
        assert place(arena, again) == PAGE


async def test_a_full_arena_gives_nothing_and_gives_again_when_there_is_room():
    with arena_of(2 * PAGE) as (arena, _):
        one, other = taken(arena, 1), taken(arena, 1)
        assert arena.take(1) is None
        assert arena.take(3 * PAGE) is None
        del one
        assert place(arena, taken(arena, PAGE)) == 0
        del other


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-6, 6), max_size=60))
def test_no_two_places_overlap_and_all_becomes_one_again(steps):
    """A step takes so many pages, or lets go of the place that is so far from the newest."""

    async def story() -> None:
        with arena_of(12 * PAGE) as (arena, _):
            held: list[tuple[int, int, memoryview]] = []
            for step in steps:
                if step > 0 and (found := arena.take(step * PAGE)) is not None:
                    view, at = found
                    end = at + len(view)
                    assert all(end <= begin or at >= stop for begin, stop, _ in held)
                    held.append((at, end, view))
                    del found, view
                elif step < 0 and -step <= len(held):
                    held.pop(step)
            held.clear()
            assert arena.take(12 * PAGE) is not None

    asyncio.run(story())


async def test_what_lies_in_it_is_known_by_its_address():
    with arena_of(4 * PAGE) as (arena, _), arena_of(PAGE) as (other, _):
        assert arena.place_of(b"before anything lies there") is None
        keep, view = taken(arena, 1), taken(arena, PAGE)
        assert arena.place_of(view[10:20]) == PAGE + 10
        assert arena.place_of(view[10:20].toreadonly()) == PAGE + 10
        assert arena.place_of(np.frombuffer(view, np.uint8)[7:].data) == PAGE + 7
        for elsewhere in (b"x", bytearray(9), memoryview(bytes(9)), taken(other, 9), view[:0]):
            assert arena.place_of(elsewhere) is None
        del keep


async def test_it_is_no_memory_until_it_is_used():
    arenas = [Arena() for _ in range(100)]
    try:
        assert sum(memory_of(arena.fd) for arena in arenas) == 0
        assert mappings() == 0
    finally:
        for arena in arenas:
            arena.close()


async def test_a_place_that_may_stay_unused_costs_nothing_before_it_is_written():
    with arena_of(MIB) as (arena, fd):
        found = arena.take(MIB, populate=False)
        assert found is not None and memory_of(fd) == 0
        found[0][0] = 1
        assert memory_of(fd) == PAGE


@pytest.mark.looptime
async def test_memory_goes_back_when_nothing_lies_there_any_more():
    with arena_of(4 * MIB) as (arena, fd):
        view = taken(arena, 2 * MIB)
        view[:] = b"x" * len(view)
        await asyncio.sleep(3 * REST_S)
        assert memory_of(fd) == 2 * MIB
        del view
        await asyncio.sleep(2 * REST_S)
        assert memory_of(fd) == 0
        again = taken(arena, 2 * MIB)
        assert not any(again)


@pytest.mark.looptime
async def test_memory_above_what_is_used_goes_back_while_the_rest_stays_in_use():
    with arena_of(4 * MIB) as (arena, fd):
        low, high = taken(arena, PAGE), taken(arena, 3 * MIB)
        low[:4], high[:4] = b"here", b"high"
        del high
        for _ in range(4):
            await asyncio.sleep(REST_S)
            assert place(arena, taken(arena, PAGE)) == PAGE
        assert memory_of(fd) == 2 * PAGE
        assert bytes(low[:4]) == b"here"


@pytest.mark.looptime
async def test_an_arena_at_rest_wakes_nobody(looptime):
    with arena_of(MIB) as (arena, _):
        taken(arena, PAGE)
        await asyncio.sleep(3 * REST_S)
        assert arena._timer is None


async def test_nobody_can_take_memory_away_from_under_the_front():
    with arena_of(4 * PAGE) as (arena, fd):
        view = taken(arena, 4 * PAGE)
        for size in (0, 8 * PAGE):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
        view[-1] = 1


async def test_closed_it_gives_nothing_and_goes_with_the_last_view():
    files = len(os.listdir("/proc/self/fd"))
    arena = Arena(4 * PAGE)
    view = taken(arena, 2 * PAGE)
    view[:5] = b"still"
    arena.close()
    assert arena.take(1) is None
    assert arena.place_of(view) is None
    assert bytes(view[:5]) == b"still" and mappings() == 1
    del view
    assert mappings() == 0
    assert arena.take(1) is None
    assert len(os.listdir("/proc/self/fd")) == files


async def test_a_window_shows_the_same_memory_and_nothing_beyond_it():
    with arena_of(4 * PAGE) as (arena, fd):
        view = taken(arena, PAGE)
        window = Window(os.dup(fd))
        view[3:6] = b"yes"
        there = window.view(3, 3)
        assert bytes(there) == b"yes"
        there[:] = b"and"
        assert bytes(view[3:6]) == b"and"
        for at, size in ((4 * PAGE, 1), (0, 4 * PAGE + 1), (2**63, 2)):
            with pytest.raises(ValueError, match="arena of"):
                window.view(at, size)
