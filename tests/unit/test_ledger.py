"""What a ledger gives out, and what it keeps for others."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repository.lifecycle.ledger import LEAST_MARGIN, MemoryLedger, margin_of

GIB = 1 << 30


def test_it_gives_out_its_budget_where_nobody_knows_the_device():
    ledger = MemoryLedger("cuda:0", 100)
    ledger.foreign = 70
    assert (ledger.free, ledger.usable, ledger.ceiling) == (100, 100, 100)


def test_what_others_use_and_the_margin_are_not_given_out():
    ledger = MemoryLedger("cuda:0", 90, total=100, margin=5)
    assert (ledger.free, ledger.ceiling) == (90, 90)
    ledger.foreign = 30
    assert (ledger.free, ledger.usable, ledger.ceiling) == (65, 65, 90)
    ledger.take(60)
    assert ledger.free == 5


def test_what_is_free_is_never_below_nothing():
    ledger = MemoryLedger("cuda:0", 90, total=100, margin=5)
    ledger.take(60)
    ledger.foreign = 80
    assert (ledger.free, ledger.usable, ledger.held) == (0, 15, 60)
    with pytest.raises(AssertionError):
        ledger.take(1)
    ledger.give(60)
    assert ledger.free == 15


def test_a_budget_larger_than_the_device_gives_out_no_more_than_the_device():
    ledger = MemoryLedger("cuda:0", 1000, total=100, margin=5)
    assert ledger.free == ledger.ceiling == ledger.most(None) == 95


def test_a_share_is_one_of_the_budget():
    ledger = MemoryLedger("cuda:0", 80, total=100, margin=5)
    assert ledger.most(0.5) == 40 and ledger.most(None) == 80


@pytest.mark.parametrize(
    ("device", "total", "margin"),
    [
        ("cuda:0", 100 * GIB, 2 * GIB),
        ("cuda:0", GIB, LEAST_MARGIN),
        ("cuda:0", 1, 1),
        ("cuda:0", None, 0),
        ("cpu", 100 * GIB, 0),
        ("host", GIB, 0),
    ],
)
def test_only_a_gpu_has_a_margin(device, total, margin):
    assert margin_of(device, total) == margin


@given(st.lists(st.tuples(st.sampled_from(["take", "give", "foreign"]), st.integers(0, 150))))
def test_what_is_held_never_exceeds_the_budget(steps):
    ledger = MemoryLedger("cuda:0", 100, total=120, margin=10)
    for what, n_bytes in steps:
        match what:
            case "take" if n_bytes <= ledger.free:
                ledger.take(n_bytes)
            case "give" if n_bytes <= ledger.held:
                ledger.give(n_bytes)
            case "foreign":
                ledger.foreign = n_bytes
        assert 0 <= ledger.held <= ledger.capacity
        assert 0 <= ledger.free <= ledger.capacity - ledger.held
