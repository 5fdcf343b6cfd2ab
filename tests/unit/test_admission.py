"""Who may load, who leaves for them, who is refused. Sizes in bytes of a device of 100."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repository.admission import Admit, Evict, Refuse, decide
from repository.lifecycle.generation import Trigger
from repository.lifecycle.ledger import MemoryLedger
from repository.lifecycle.states import State
from tests.fakes.heart import at, brought, newborn, resident, spec


def asked(model, n_bytes, serial=99, trigger=Trigger.API, **config):
    return newborn(spec(model, n_bytes=n_bytes, print_="new", **config), serial, trigger=trigger)


def decided(queue, residents=(), capacity=100, slots=4, now=0.0):
    ledger = MemoryLedger("cpu", capacity)
    ledger.take(sum(g.reserved for g in residents))
    found = decide(queue, residents, {"cpu": ledger}, load_slots=slots, room_wait_s=10, now=now)
    short = [(type(d).__name__, d.gen.spec.model) for d in found.todo]
    return short, found


def test_what_fits_is_admitted_in_order_until_memory_or_slots_end():
    queue = [asked("a", 40, 1), asked("b", 40, 2), asked("c", 40, 3, Trigger.STARTUP)]
    assert decided(queue)[0] == [("Admit", "a"), ("Admit", "b"), ("Refuse", "c")]
    assert decided(queue, slots=1)[0] == [("Admit", "a")]


def test_loading_ones_use_up_slots():
    busy = brought(newborn(spec("x")), State.LOADING)
    assert decided([asked("a", 10)], [busy], slots=1)[0] == []


def test_a_big_one_at_the_head_is_not_overtaken():
    leaving = resident("x", 90)
    leaving.retire("unload")
    queue = [asked("big", 100, 1), asked("small", 5, 2)]
    assert decided(queue, [leaving])[0] == []


def test_idle_ones_make_room():
    assert decided([asked("a", 60)], [resident("x", 50), resident("y", 50, last_used=9)])[0] == [
        ("Evict", "x"),
        ("Evict", "y"),
    ]
    assert decided([asked("a", 50)], [resident("x", 50), resident("y", 50, last_used=9)])[0] == [
        ("Evict", "x")
    ]


def test_memory_on_its_way_back_is_waited_for_and_nobody_else_leaves():
    gone = resident("x", 50)
    gone.retire("unload")
    assert decided([asked("a", 50)], [gone, resident("y", 50)])[0] == []


@pytest.mark.parametrize("trigger", [Trigger.STARTUP, Trigger.RESTART])
def test_nobody_leaves_for_a_start_that_nobody_asked_for(trigger):
    short, found = decided([asked("a", 60, trigger=trigger)], [resident("x", 50)])
    assert short == [("Refuse", "a")]
    assert found.todo[0].error.needed == 60


def test_what_can_never_fit_is_refused_at_once_with_numbers():
    short, found = decided([asked("a", 101)], [resident("x", 50, pin=True)])
    error = found.todo[0].error
    assert short == [("Refuse", "a")]
    assert (error.needed, error.free, error.pinned) == (101, 50, ["x:1#1"])
    assert error.residents == {"x:1#1": 50}
    assert "--memory-budget" in str(error)


def test_what_needs_more_than_its_share_of_the_device_is_refused_though_there_is_room():
    short, found = decided([asked("a", 60, device_share=0.5), asked("b", 50, 2, device_share=0.5)])
    assert short == [("Refuse", "a"), ("Admit", "b")]
    assert "needs 60B on cpu; its device_share of 0.5 is 50B of 100B" in str(found.todo[0].error)


def test_busy_ones_are_waited_for_and_then_it_is_refused():
    busy = resident("x", 80)
    with busy.lease():
        short, found = decided([asked("a", 60)], [busy], now=0)
        assert short == [] and found.again_at == 10
        assert decided([asked("a", 60)], [busy], now=10)[0] == [("Refuse", "a")]


def test_pinned_ones_are_not_waited_for():
    assert decided([asked("a", 60)], [resident("x", 80, pin=True)])[0] == [("Refuse", "a")]


def test_a_refused_one_does_not_hold_up_those_behind_it():
    queue = [asked("a", 101, 1), asked("b", 10, 2)]
    assert decided(queue)[0] == [("Refuse", "a"), ("Admit", "b")]


def test_a_reload_takes_others_first_and_then_its_own_older_generation():
    own = resident("a", 60)
    assert decided([asked("a", 60)], [own, resident("x", 30)])[0] == [("Evict", "a")]
    short, found = decided([asked("a", 60)], [own])
    assert short == [("Evict", "a")] and found.todo[0].replaced


def test_a_reload_evicts_others_when_that_is_enough():
    assert decided([asked("a", 40)], [resident("a", 40), resident("x", 40)])[0] == [("Evict", "x")]


def test_reload_overlap_never_takes_its_own_and_is_refused():
    own = resident("a", 60)
    assert decided([asked("a", 60, reload="overlap")], [own])[0] == [("Refuse", "a")]


def test_reload_replace_takes_its_own_before_others():
    gens = [resident("a", 40), resident("x", 40)]
    assert decided([asked("a", 40, reload="replace")], gens)[0] == [("Evict", "a")]


def test_a_reload_may_replace_its_own_even_while_it_is_leased():
    own = resident("a", 60)
    with own.lease():
        assert decided([asked("a", 60)], [own])[0] == [("Evict", "a")]


@given(
    queue=st.lists(st.tuples(st.integers(1, 120), st.sampled_from(list(Trigger))), max_size=6),
    here=st.lists(st.tuples(st.integers(1, 40), st.booleans(), st.booleans()), max_size=5),
    slots=st.integers(0, 4),
)
def test_nothing_is_promised_twice_and_nobody_busy_or_pinned_leaves(queue, here, slots):
    gens = [resident(f"r{i}", n, i, pin=pin) for i, (n, pin, _) in enumerate(here)]
    held = sum(g.reserved for g in gens)
    for gen, (_, _, leased) in zip(gens, here, strict=True):
        if leased:
            gen.lease().begin()
    waiting = [asked(f"q{i}", n, 100 + i, t) for i, (n, t) in enumerate(queue)]
    _, found = decided(waiting, gens, capacity=max(100, held), slots=slots)
    admitted = [d.gen for d in found.todo if isinstance(d, Admit)]
    assert sum(g.spec.bytes_needed for g in admitted) <= max(100, held) - held
    assert len(admitted) <= slots
    leaving = [d.gen for d in found.todo if isinstance(d, Evict)]
    assert all(not g.leases and not g.spec.config.pin for g in leaving)
    if leaving:
        room_for = next(d.room_for for d in found.todo if isinstance(d, Evict))
        free = max(100, held) - held - sum(g.spec.bytes_needed for g in admitted)
        assert free + sum(g.reserved for g in leaving) >= room_for.spec.bytes_needed
    refused = [d.gen for d in found.todo if isinstance(d, Refuse)]
    assert len({id(g) for g in admitted + refused}) == len(admitted) + len(refused)


def test_nobody_leaves_for_one_that_could_not_load_yet():
    busy = brought(newborn(spec("x", n_bytes=10)), State.LOADING)
    gens = [busy, resident("y", 80, 2)]
    assert decided([asked("a", 60)], gens, slots=1)[0] == []
    assert decided([asked("a", 60)], gens, slots=2)[0] == [("Evict", "y")]


def test_a_version_that_is_on_its_way_out_makes_room_for_its_successor():
    old = resident("a", 60)
    new = newborn(spec("a", 2, n_bytes=60), 2, trigger=Trigger.RESTART)
    ledger = MemoryLedger("cpu", 100)
    ledger.take(60)
    rest = {"load_slots": 4, "room_wait_s": 10, "now": 0.0}
    (stays,) = decide([new], [old], {"cpu": ledger}, **rest).todo
    assert isinstance(stays, Refuse)
    (found,) = decide([new], [old], {"cpu": ledger}, outgoing=lambda g: g is old, **rest).todo
    assert isinstance(found, Evict) and found.replaced


def test_a_refusal_names_the_largest_and_counts_the_others():
    gens = [resident(f"m{i}", 1 + i // 10, i) for i in range(40)]
    error = decided([asked("a", 101)], gens)[1].todo[0].error
    assert len(error.residents) == 40 and "m30:1#30 4B" in str(error)
    assert "and 32 more" in str(error) and "m9:" not in str(error)


def test_each_device_has_a_queue_of_its_own():
    ledgers = {"cuda:0": MemoryLedger("cuda:0", 100), "cpu": MemoryLedger("cpu", 100)}
    full = resident("x", 100)
    at("cuda:0", full)
    ledgers["cuda:0"].take(100)
    full.lease().begin()
    first, second = asked("a", 50, 2), asked("b", 50, 3)
    at("cuda:0", first)
    found = decide([first, second], [full], ledgers, load_slots=4, room_wait_s=10, now=0.0)
    assert [(type(d).__name__, d.gen.spec.model) for d in found.todo] == [("Admit", "b")]
