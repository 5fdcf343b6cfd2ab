"""Who is dear: what is back late for what it frees, and was used since others left."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repository.lifecycle.placement import HOST
from repository.lifecycle.residency import Moment, victims
from repository.lifecycle.states import Event, State
from repository.lifecycle.worth import LEAST_S, credit, may_sleep, per_byte, seconds_back, settle
from repository.messages import Loaded
from tests.fakes.heart import at, resident

MIB, GIB = 1 << 20, 1 << 30
CPU = {"cpu": 1}


def loaded_in(gen, took_s, last_used=0.0):
    gen.admitted_at, gen.ready_at, gen.last_used = 100.0, 100.0 + took_s, last_used
    return gen


def leaves(gens, clock=0.0, short=None, now=1000.0):
    found = victims(short or {"cpu": 300 * MIB}, gens, Moment(now, clock=clock))
    return [g.spec.model for g in found or ()]


def test_of_equals_the_longest_unused_leaves():
    gens = [resident("a", 300 * MIB, 1, last_used=9), resident("b", 300 * MIB, 2, last_used=1)]
    assert leaves(gens) == ["b"]


def test_what_takes_long_to_bring_back_stays_though_it_was_unused_for_longer():
    slow = loaded_in(resident("slow", 300 * MIB, 1), 60.0, last_used=1)
    fast = loaded_in(resident("fast", 300 * MIB, 2), 2.0, last_used=500)
    assert leaves([slow, fast]) == ["fast"]


def test_near_equal_costs_fall_back_to_the_longest_unused():
    one = loaded_in(resident("one", 300 * MIB, 1), 2.3, last_used=5)
    other = loaded_in(resident("other", 300 * MIB, 2), 2.0, last_used=9)
    assert leaves([one, other]) == ["one"]


def test_of_quick_loads_the_time_counts_for_nothing():
    one = loaded_in(resident("one", 300 * MIB, 1), 0.1, last_used=9)
    other = loaded_in(resident("other", 300 * MIB, 2), 0.9, last_used=5)
    assert leaves([one, other]) == ["other"]


def test_a_dear_one_that_nobody_uses_leaves_in_the_end():
    """Others come and go, and the clock rises past it."""
    dear = loaded_in(resident("dear", 300 * MIB, 1), 60.0)
    settle([dear], 0.0)
    clock, rounds = 0.0, 0
    while rounds < 100:
        rounds += 1
        cheap = loaded_in(resident("cheap", 300 * MIB, 1 + rounds), 2.0, last_used=rounds)
        if leaves([dear, cheap], clock) == ["dear"]:
            break
        settle([dear, cheap], clock)
        clock = max(clock, credit([cheap], CPU, clock))
    assert 5 < rounds < 60


def test_a_use_lifts_it_to_the_clock_of_that_moment():
    gen = loaded_in(resident("a", GIB, 1), 4.0, last_used=200)
    settle([gen], 0.0)
    assert credit([gen], CPU, 7.0) == 4.0  # not used since the clock moved
    gen.last_used = 300
    assert credit([gen], CPU, 7.0) == 11.0
    settle([gen], 7.0)
    assert credit([gen], CPU, 9.0) == 11.0


def test_bytes_on_the_device_that_is_short_are_what_counts():
    gen = loaded_in(resident("a", GIB, 1), 4.0)
    gen.held = {"cuda:0": GIB, "cuda:1": 4 * GIB}
    settle([gen], 0.0)
    assert credit([gen], {"cuda:0": 1}, 0.0) == 4.0
    assert credit([gen], {"cuda:1": 1}, 0.0) == 1.0


def test_one_that_would_sleep_costs_what_it_takes_to_wake_it():
    gen = loaded_in(at("cuda:0", resident("a", 8 * GIB, 1)), 60.0)
    assert seconds_back(gen) == 60.0 and not may_sleep(gen)
    gen.loaded = Loaded(abilities=frozenset({"sleep"}))
    assert may_sleep(gen) and seconds_back(gen) == LEAST_S


@pytest.mark.parametrize(
    ("device", "evict_to", "sleeps"),
    [
        ("cuda:0", "auto", True),
        ("cuda:0", "host", True),
        ("cuda:0", "disk", False),
        ("cpu", "auto", False),
        ("cpu", "host", True),
    ],
)
def test_who_falls_asleep_when_driven_out(device, evict_to, sleeps):
    gen = at(device, resident("a", GIB, 1, evict_to=evict_to))
    gen.loaded = Loaded(abilities=frozenset({"sleep"}))
    assert may_sleep(gen) is sleeps


def asleep(name, serial, device_bytes, host_bytes, **config):
    gen = at("cuda:0", resident(name, device_bytes, serial, **config))
    gen.step(Event.RETIRE)
    gen.step(Event.SLEPT)
    assert gen.state is State.ASLEEP
    gen.held = {"cuda:0": device_bytes, HOST: host_bytes}
    return gen


def test_those_asleep_leave_before_anybody_who_serves():
    sleeper = asleep("sleeper", 1, 20, 300, priority=9)
    idle = at("cuda:0", resident("idle", 20, 2, ttl_s=1.0))
    assert leaves([idle, sleeper], short={"cuda:0": 10}) == ["sleeper"]


def test_who_frees_nothing_of_what_is_short_stays():
    sleeper = asleep("sleeper", 1, 0, 300)
    there = at("cuda:1", resident("there", 300, 2))
    here = at("cuda:0", resident("here", 300, 3))
    assert leaves([sleeper, there, here], short={"cuda:0": 100}) == ["here"]
    assert leaves([sleeper, there, here], short={HOST: 100}) == ["sleeper"]


def test_a_pinned_sleeper_stays():
    sleeper = asleep("sleeper", 1, 20, 300, pin=True)
    assert leaves([sleeper], short={HOST: 100}) == []


@given(cost=st.floats(1e-3, 1e5), size=st.integers(1, 1 << 45))
def test_costs_per_byte_are_rounded_down_to_powers_of_two(cost, size):
    found = per_byte(cost, size)
    assert found <= cost * GIB / size < 2 * found * (1 + 1e-9)


@given(
    here=st.lists(
        st.tuples(
            st.integers(0, 50),
            st.integers(0, 50),
            st.booleans(),
            st.integers(0, 9),
            st.integers(0, 2),
        ),
        max_size=8,
    ),
    short=st.tuples(st.integers(0, 120), st.integers(0, 120)),
)
def test_over_several_devices_the_set_is_sufficient_minimal_and_allowed(here, short):
    gens = []
    for i, (first, second, pin, used, priority) in enumerate(here):
        gen = resident(f"m{i}", 1, i, last_used=used, pin=pin, priority=priority)
        gen.held = {"cuda:0": first, "cuda:1": second}
        gens.append(gen)
    needs = {"cuda:0": short[0], "cuda:1": short[1]}
    chosen = victims(needs, gens, Moment(100.0))

    def enough(of):
        return all(sum(g.held[d] for g in of) >= n for d, n in needs.items())

    if chosen is None:
        assert not enough([g for g in gens if not g.pinned])
        return
    assert enough(chosen) and not any(g.pinned for g in chosen)
    assert not any(enough([g for g in chosen if g is not one]) for one in chosen)
