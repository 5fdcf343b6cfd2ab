"""Who leaves: only the idle, never in vain, the least."""

from hypothesis import given
from hypothesis import strategies as st

from repository.lifecycle.generation import Trigger
from repository.lifecycle.residency import Moment, expired, in_use, victims
from tests.fakes.heart import newborn, resident, spec


def leave(need, free, gens, now):
    return victims({"cpu": need - free}, gens, Moment(now))


def names(gens):
    return None if gens is None else [g.spec.model for g in gens]


def test_nobody_leaves_when_there_is_room():
    assert leave(10, 10, [resident("a", 5)], now=0) == []


def test_nobody_leaves_when_it_would_not_help():
    assert leave(100, 10, [resident("a", 50)], now=0) is None


def test_the_longest_unused_leaves_first():
    gens = [resident("a", 10, last_used=5), resident("b", 10, last_used=1)]
    assert names(leave(10, 0, gens, now=9)) == ["b"]


def test_low_priority_leaves_before_the_longest_unused():
    gens = [resident("a", 10, last_used=1, priority=5), resident("b", 10, last_used=2)]
    assert names(leave(10, 0, gens, now=9)) == ["b"]


def test_an_expired_one_leaves_before_low_priority():
    gens = [resident("a", 10, ttl_s=3.0, priority=5), resident("b", 10)]
    assert names(leave(10, 0, gens, now=9)) == ["a"]


def test_pinned_and_leased_ones_stay():
    leased = resident("b", 10)
    with leased.lease():
        assert leave(10, 0, [resident("a", 10, pin=True), leased], now=0) is None


def test_a_small_one_is_spared_when_a_later_big_one_is_enough():
    gens = [resident("small", 10, last_used=1), resident("big", 90, last_used=2)]
    assert names(leave(90, 0, gens, now=9)) == ["big"]


@given(
    sizes=st.lists(st.tuples(st.integers(1, 50), st.booleans(), st.integers(0, 9)), max_size=8),
    need=st.integers(0, 200),
    free=st.integers(0, 100),
)
def test_the_set_is_sufficient_minimal_and_allowed(sizes, need, free):
    gens = [
        resident(f"m{i}", n, i, last_used=used, pin=pin) for i, (n, pin, used) in enumerate(sizes)
    ]
    chosen = leave(need, free, gens, now=10)
    may = sum(n for n, pin, _ in sizes if not pin)
    if chosen is None:
        assert free + may < need
        return
    got = free + sum(g.reserved for g in chosen)
    assert got >= need or not chosen
    assert not any(g.spec.config.pin for g in chosen)
    assert all(got - g.reserved < need for g in chosen)


def test_expiry_is_named_with_the_next_one_to_come():
    gens = [
        resident("a", 1, ttl_s=5.0),
        resident("b", 1, ttl_s=50.0),
        resident("c", 1),
        resident("d", 1, ttl_s=1.0, pin=True),
    ]
    over, next_at = expired(gens, now=6)
    assert names(over) == ["a"] and next_at == 50.0


def test_a_model_leaves_with_all_its_versions_or_not_at_all():
    busy = resident("a", 10, 2)
    gens = [resident("a", 30, 1), busy, resident("b", 30, 3, last_used=5)]
    with busy.lease():
        assert names(leave(30, 0, gens, now=9)) == ["b"]
    busy.last_used = 1
    assert names(leave(30, 0, gens, now=9)) == ["a", "a"]


def test_a_model_with_a_load_on_its_way_that_somebody_waits_for_stays():
    idle, rising = resident("a", 10, 1), newborn(spec("a"), 2, trigger=Trigger.API)
    assert leave(10, 0, [idle, rising], now=9) is None
    assert in_use([idle, rising]) == {"a"}
    rising.trigger = Trigger.WATCH
    assert names(leave(10, 0, [idle, rising], now=9)) == ["a"]


def test_a_model_expires_when_the_last_of_its_versions_does():
    gens = [resident("a", 1, 1, ttl_s=5.0), resident("a", 1, 2, last_used=4, ttl_s=5.0)]
    assert expired(gens, now=6) == ([], 9.0)
    assert names(expired(gens, now=9)[0]) == ["a", "a"]
