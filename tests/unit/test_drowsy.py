"""Who falls asleep because nobody asks for it."""

from repository.lifecycle.drowsy import drowsy
from tests.fakes.heart import resident


def told(*gens, now, may_sleep=lambda gen: True):
    return drowsy(gens, now=now, may_sleep=may_sleep)


def test_who_idles_for_its_time_and_not_before():
    gen = resident("m", 10, last_used=5.0, sleep_s=10.0)
    assert told(gen, now=14.9) == ([], 15.0) and told(gen, now=15.0) == ([gen], None)


def test_a_model_falls_asleep_with_all_its_versions_or_not_at_all():
    one = resident("m", 10, 1, last_used=0.0, sleep_s=10.0)
    two = resident("m", 10, 2, last_used=5.0, sleep_s=10.0)
    assert told(one, two, now=12.0) == ([], 15.0) and told(one, two, now=15.0)[0] == [one, two]
    without = resident("m", 10, 3, last_used=0.0)
    assert told(one, without, now=100.0) == ([], None)
    assert told(one, two, now=100.0, may_sleep=lambda gen: gen is one) == ([], None)


def test_who_is_in_use_or_pinned_stays_awake():
    busy = resident("m", 10, sleep_s=1.0)
    with busy.lease():
        assert told(busy, now=100.0) == ([], None)
    assert told(resident("m", 10, sleep_s=1.0, pin=True), now=100.0) == ([], None)


def test_nobody_is_drowsy_who_is_not_awake():
    gen = resident("m", 10, sleep_s=1.0)
    gen.retire("test")
    assert told(gen, now=100.0) == ([], None) == told(now=0.0)
