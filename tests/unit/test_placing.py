"""Where models go: over several devices, all or nothing, tightest first, first come first served.

Every GPU has 1 GiB, a model needs 300 MiB unless it says otherwise.
"""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repository.admission import Admit, Evict, Refuse, Waiting, decide, never
from repository.lifecycle.generation import Trigger
from repository.lifecycle.ledger import MemoryLedger
from repository.lifecycle.placement import HOST, Placement
from repository.lifecycle.spreading import MOST_CHOICES, shared, spreads
from repository.lifecycle.states import Event, State
from repository.messages import Loaded
from tests.fakes.heart import at, brought, newborn, reconciler, resident, spec
from tests.fakes.host import FakeHost

MIB, GIB = 1 << 20, 1 << 30
GPUS = ("cuda:0", "cuda:1")
ANY = (*GPUS, "cpu")


def machine(*gens, devices=ANY, capacity=GIB):
    ledgers = {device: MemoryLedger(device, capacity) for device in devices}
    for gen in gens:
        for device, n_bytes in gen.held.items():
            ledgers[device].take(n_bytes)
    return ledgers


def placed(*wheres):
    """Options: each "cuda:0=300 cuda:1=300", in MiB."""
    found = []
    for where in wheres:
        needs = dict(part.split("=") for part in where.split())
        sizes = {device: int(n) * MIB for device, n in needs.items()}
        found.append(Placement(tuple(sizes), sizes))
    return tuple(found)


def asked(model, *wheres, serial=99, trigger=Trigger.API, **config):
    options = placed(*(wheres or ("cuda:0=300", "cuda:1=300")))
    return newborn(spec(model, **config), serial, trigger=trigger, options=options)


def there(model, where, serial=1, **config):
    """READY, on these devices."""
    (placement,) = placed(where)
    gen = resident(model, sum(placement.needs.values()), serial, **config)
    gen.options, gen.placement, gen.held = (placement,), placement, dict(placement.needs)
    return gen


def decided(queue, gens=(), *, ledgers=None, now=10.0, **rest):
    ledgers = ledgers or machine(*gens)
    return decide(queue, gens, ledgers, load_slots=9, room_wait_s=10, now=now, **rest)


def short(found):
    told = []
    for one in found.todo:
        where = "+".join(one.placement.needs) if isinstance(one, Admit) else ""
        told.append(f"{type(one).__name__} {one.gen.spec.model} {where}".strip())
    return told


# where there is room ------------------------------------------------------------------------------


def test_the_gpu_with_the_least_left_afterwards_is_taken():
    gens = [there("x", "cuda:1=600")]
    assert short(decided([asked("a")], gens)) == ["Admit a cuda:1"]
    assert short(decided([asked("a", "cuda:0=500", "cuda:1=500")], gens)) == ["Admit a cuda:0"]


def test_two_that_come_together_are_not_promised_the_same_bytes():
    big = ("cuda:0=600", "cuda:1=600")
    found = short(decided([asked("a", *big, serial=1), asked("b", *big, serial=2)]))
    assert found == ["Admit a cuda:0", "Admit b cuda:1"]


def test_what_it_needs_of_several_devices_it_gets_together_or_not_at_all():
    gens = [there("x", "cuda:1=900", pin=True)]
    both = asked("a", "cuda:0=300 cuda:1=300")
    (refused,) = decided([both], gens).todo
    assert isinstance(refused, Refuse)
    error = refused.error
    assert (error.device, error.needed, error.free) == ("cuda:1", 300 * MIB, 124 * MIB)
    assert "300MiB on cuda:0 and 300MiB on cuda:1" in str(error) and error.pinned == ["x:1#1"]


def test_instances_go_together_only_where_they_do_not_fit_apart():
    options = ("cuda:0=300 cuda:1=300", "cuda:0=600", "cuda:1=600")
    assert short(decided([asked("a", *options)])) == ["Admit a cuda:0+cuda:1"]
    gens = [there("x", "cuda:0=900")]
    assert short(decided([asked("a", *options)], gens)) == ["Admit a cuda:1"]


def test_the_refusal_names_what_is_free_elsewhere_and_what_strangers_use():
    ledgers = {d: MemoryLedger(d, GIB, total=GIB, margin=64 * MIB) for d in GPUS}
    for ledger in ledgers.values():
        ledger.foreign = 800 * MIB
    (refused,) = decided([asked("a", trigger=Trigger.STARTUP)], ledgers=ledgers).todo
    assert refused.error.foreign == 800 * MIB
    assert "used by others than this server: 800MiB" in str(refused.error)
    assert "nor is there room elsewhere: 160MiB free on cuda:1" in str(refused.error)


def test_what_strangers_use_is_waited_for_as_long_as_busy_models_are():
    ledgers = {"cuda:0": MemoryLedger("cuda:0", GIB, total=GIB)}
    ledgers["cuda:0"].foreign = 800 * MIB
    found = decided([asked("a", "cuda:0=300")], ledgers=ledgers, now=0.0)
    assert short(found) == [] and found.again_at == 10.0
    assert short(decided([asked("a", "cuda:0=300")], ledgers=ledgers, now=10.0)) == ["Refuse a"]


# first come, first served -------------------------------------------------------------------------


def test_one_that_waits_for_a_gpu_is_not_overtaken_there_and_holds_up_nobody_elsewhere():
    busy = there("x", "cuda:0=900")
    busy.lease().begin()
    queue = [
        asked("big", "cuda:0=600", serial=2),
        asked("small", "cuda:0=50", serial=3),
        asked("other", "cuda:1=300", serial=4),
        asked("either", "cuda:0=50", "cuda:1=50", serial=5),
    ]
    found = decided(queue, [busy], now=0.0)
    assert short(found) == ["Admit other cuda:1", "Admit either cuda:1"]


def test_room_that_others_left_for_one_is_not_taken_by_one_before_it():
    leaving = [there("x", "cuda:0=900", 1), there("y", "cuda:1=900", 2)]
    first, second = asked("a", "cuda:0=600", "cuda:1=600", serial=3), asked("b", serial=4)
    queue = [first, second]
    found = decided(queue, leaving)
    assert short(found) == ["Evict x", "Evict y"]
    for one in found.todo:
        one.room_for.aim = one.placement
        one.gen.retire("evicted")
    gone = leaving.pop(1)  # the second's is there before the first's
    assert short(decided(queue, leaving)) == ["Admit b cuda:1"]
    assert gone.spec.model == "y"


def test_of_two_who_aim_at_one_device_the_first_in_the_queue_goes():
    """Both can, once a stranger who was in the way has left: they do not wait for each other."""
    queue = [asked("a", "cuda:0=600", serial=1), asked("b", "cuda:0=700", serial=2)]
    for gen in queue:
        gen.aim = gen.options[0]
    assert short(decided(queue)) == ["Admit a cuda:0"]


def test_an_aim_of_which_nothing_can_come_keeps_nobody_away():
    pinned = there("x", "cuda:1=900", pin=True)
    first, second = asked("a", serial=3), asked("b", "cuda:1=300", serial=4)
    second.aim = second.options[0]
    assert short(decided([first, second], [pinned])) == ["Admit a cuda:0", "Refuse b"]


# who leaves ---------------------------------------------------------------------------------------


def test_room_is_made_where_it_costs_least():
    slow, fast = there("slow", "cuda:0=900", 1), there("fast", "cuda:1=900", 2)
    slow.admitted_at, fast.admitted_at = -60.0, -5.0
    assert short(decided([asked("a")], [slow, fast], now=100.0)) == ["Evict fast"]
    slow.last_used = fast.last_used = 0.0
    fast.spec = replace(fast.spec, config=spec("fast", priority=1).config)
    assert short(decided([asked("a")], [slow, fast], now=100.0)) == ["Evict slow"]


def test_a_model_on_two_gpus_leaves_once_for_both():
    wide = there("wide", "cuda:0=900 cuda:1=900")
    queue = [asked("a", "cuda:0=300", serial=2), asked("b", "cuda:1=300", serial=3)]
    assert short(decided(queue, [wide])) == ["Evict wide"]


def test_only_those_leave_who_free_something_that_is_short():
    gens = [there("x", "cuda:1=900", 1), there("y", "cuda:0=900", 2, priority=9)]
    assert short(decided([asked("a", "cuda:0=300")], gens)) == ["Evict y"]


def test_nobody_leaves_before_its_turn_is_over_and_somebody_looks_again_then():
    new = there("x", "cuda:0=900")
    new.admitted_at, new.ready_at, new.last_used = 5.0, 9.0, 9.0
    waits, turns = asked("a", "cuda:0=300"), Waiting(("a",), 0.0)
    waits.asked_at = 9.5
    found = decided([waits], [new], now=10.0, waiting=turns)
    assert short(found) == [] and found.again_at == 13.0
    assert short(decided([waits], [new], now=13.0, waiting=turns)) == ["Evict x"]


def test_a_load_by_call_waits_for_the_least_residency_and_not_until_loads_are_paid_back():
    new = there("x", "cuda:0=900")
    new.admitted_at, new.ready_at, new.last_used = -600.0, 9.0, 9.98
    waits, least = asked("a", "cuda:0=300"), Waiting((), 8.0)
    waits.asked_at = 9.5
    found = decided([waits], [new], now=10.0, waiting=least)
    assert short(found) == [] and found.again_at == pytest.approx(10.08)
    assert short(decided([waits], [new], now=10.1, waiting=least)) == ["Evict x"]
    waits.asked_at = -20.0  # its patience is over, but the turn is known to end
    assert decided([waits], [new], now=10.0, waiting=least).again_at == pytest.approx(10.08)
    waits.asked_at = 9.5
    new.lease().begin()
    assert decided([waits], [new], now=10.0, waiting=least).again_at == 17.0


def test_what_idles_longer_than_its_ttl_is_not_protected_by_its_turn():
    new = there("x", "cuda:0=900", ttl_s=0.5)
    new.admitted_at, new.ready_at, new.last_used = 5.0, 9.0, 9.0
    assert short(decided([asked("a", "cuda:0=300")], [new], now=10.0)) == ["Evict x"]


# sleepers -----------------------------------------------------------------------------------------


def asleep(model, where, serial=1, context=20, **config):
    gen = there(model, where, serial, **config)
    gen.loaded = Loaded(abilities=frozenset({"sleep"}))
    gen.step(Event.RETIRE)
    gen.step(Event.SLEPT)
    gen.held = dict.fromkeys(gen.placement.needs, context * MIB) | {HOST: gen.reserved}
    return gen


def home(*gens):
    return machine(*gens, devices=(*ANY, HOST))


def test_a_waker_needs_only_what_its_sleeper_does_not_hold_and_goes_where_it_sleeps():
    sleeper, other = asleep("a", "cuda:1=300"), there("x", "cuda:1=720", 2, pin=True)
    ledgers = home(sleeper, other)
    waker = asked("a")
    waker.wakes = sleeper
    found = decided([waker], [sleeper, other], ledgers=ledgers)
    assert short(found) == ["Admit a cuda:1"]
    assert ledgers["cuda:1"].free == 284 * MIB < 300 * MIB


def test_a_waker_whose_gpu_is_pinned_full_loads_elsewhere():
    sleeper, other = asleep("a", "cuda:1=300"), there("x", "cuda:1=900", 2, pin=True)
    waker = asked("a")
    waker.wakes = sleeper
    found = decided([waker], [sleeper, other], ledgers=home(sleeper, other))
    assert short(found) == ["Admit a cuda:0"]


def test_a_waker_whose_gpu_is_busy_loads_elsewhere_and_waits_only_for_turns():
    sleeper, other = asleep("a", "cuda:1=300"), there("x", "cuda:1=900", 2)
    for trigger in (Trigger.API, Trigger.RESTART):
        waker = asked("a", trigger=trigger)
        waker.wakes = sleeper
        with other.lease():
            found = decided([waker], [sleeper, other], ledgers=home(sleeper, other))
        assert short(found) == ["Admit a cuda:0"]
    other.ready_at, turn = 8.0, Waiting((), 60.0)
    other.last_used = 10.0
    waker = asked("a")
    waker.wakes = sleeper
    found = decided([waker], [sleeper, other], ledgers=home(sleeper, other), waiting=turn)
    assert short(found) == [] and found.again_at is not None


def test_sleepers_leave_before_anybody_who_serves_and_not_before_those_who_wake_them():
    sleeper, idle = asleep("s", "cuda:0=300", context=200), there("x", "cuda:0=800", 2)
    waker = asked("s", "cuda:0=300", serial=3)
    waker.wakes = sleeper
    ledgers = home(sleeper, idle)
    first = asked("a", "cuda:0=200", serial=4)
    assert short(decided([first], [sleeper, idle], ledgers=ledgers)) == ["Evict s"]
    assert short(decided([waker, first], [sleeper, idle], ledgers=ledgers)) == ["Evict x"]
    assert short(decided([first, waker], [sleeper, idle], ledgers=ledgers))[0] == "Evict s"


# what may be chosen of ----------------------------------------------------------------------------


def options(what, **rest):
    models = reconciler(FakeHost, GIB, devices=ANY, **rest)
    return [(p.devices, dict(p.needs), p.source) for p in models.options(what)]


def sized(n_bytes, devices=ANY, **config):
    return replace(spec("a", n_bytes=n_bytes, **config), devices=devices)


def test_auto_is_any_gpu_and_the_cpu_only_where_no_gpu_could_hold_it():
    assert [o[0] for o in options(sized(300 * MIB))] == [("cuda:0",), ("cuda:1",)]
    assert options(sized(2 * GIB))[-1] == (("cpu",), {"cpu": 2 * GIB}, "estimate")
    assert options(sized(700 * MIB, device_share=0.5))[-1][0] == ("cpu",)
    assert options(sized(300 * MIB, ("cuda:1",))) == [
        (("cuda:1",), {"cuda:1": 300 * MIB}, "estimate")
    ]


def test_instances_are_spread_one_to_each_gpu():
    found = options(sized(600 * MIB, instances=2))
    assert found[0] == (GPUS, dict.fromkeys(GPUS, 300 * MIB), "estimate")
    assert found[1:] == [
        ((d, d), {d: 600 * MIB}, "estimate") for d in GPUS
    ]  # where they do not fit apart


def test_what_they_need_may_differ_by_device_and_be_known_in_different_ways():
    def needs(what, device):
        return (500 * MIB, "measured") if device == "cuda:1" else (300 * MIB, "estimate")

    assert options(sized(300 * MIB), needs=needs) == [
        (("cuda:0",), {"cuda:0": 300 * MIB}, "estimate"),
        (("cuda:1",), {"cuda:1": 500 * MIB}, "measured"),
    ]
    assert options(sized(400 * MIB, memory=400 * MIB))[0][2] == "config"


def test_what_once_grew_beyond_its_device_can_come_back_to_it_and_takes_all_of_it():
    def grew(what, device):
        return 3 * GIB, "measured"

    assert options(sized(300 * MIB), needs=grew) == [
        ((gpu,), {gpu: GIB}, "measured") for gpu in ("cuda:0", "cuda:1")
    ]
    assert options(sized(300 * MIB, ("cuda:0",), device_share=0.5), needs=grew)[0][1] == {
        "cuda:0": GIB // 2
    }
    both = options(sized(600 * MIB, instances=2), needs=grew)
    assert both[0] == (GPUS, dict.fromkeys(GPUS, GIB), "measured")
    too_large = options(sized(2 * GIB), needs=grew)  # by its files alone
    assert too_large[0] == (("cuda:0",), {"cuda:0": 3 * GIB}, "measured")
    assert too_large[-1][0] == ("cpu",)


@given(instances=st.integers(1, 9), n_devices=st.integers(1, 12))
def test_spreads_are_even_whole_and_not_too_many(instances, n_devices):
    devices = [f"cuda:{n}" for n in range(n_devices)]
    found = list(spreads(instances, devices))
    assert len(found) == len(set(found))
    assert len(found) <= min(instances, n_devices) * (MOST_CHOICES + n_devices * instances)
    widths = [len(set(where)) for where in found]
    assert widths == sorted(widths, reverse=True) and widths[-1] == 1
    assert widths[0] == min(instances, n_devices)
    for where in found:
        counts = Counter(where).values()
        assert len(where) == instances and max(counts) - min(counts) <= 1
        assert 0 <= sum(shared(1000, where).values()) - 1000 <= n_devices


def test_what_fits_beside_no_pinned_one_is_refused_to_requests_at_once():
    gens = [there("x", "cuda:0=900", 1, pin=True), there("y", "cuda:1=900", 2)]
    gone, none = placed("cuda:0=300", "cuda:1=300"), {"outgoing": lambda gen: False}
    assert never(spec("a"), gone, gens, machine(*gens), **none) is None
    gens[1].pinned = True
    assert "needs 300MiB on cuda:0" in str(never(spec("a"), gone, gens, machine(*gens), **none))


@given(
    queue=st.lists(
        st.tuples(
            st.lists(st.tuples(*[st.integers(0, 120)] * 2), min_size=1, max_size=3), st.booleans()
        ),
        max_size=5,
    ),
    here=st.lists(
        st.tuples(st.integers(0, 40), st.integers(0, 40), st.booleans(), st.booleans()), max_size=6
    ),
    foreign=st.integers(0, 60),
)
def test_nothing_is_promised_twice_on_any_device_and_nobody_busy_or_pinned_leaves(
    queue, here, foreign
):
    gens = []
    for i, (first, second, pin, leased) in enumerate(here):
        gens.append(there(f"r{i}", f"cuda:0={first} cuda:1={second}", i, pin=pin))
        if leased:
            gens[-1].lease().begin()
    wanted = [
        asked(
            f"q{i}",
            *[f"cuda:0={a} cuda:1={b}" for a, b in wheres],
            serial=100 + i,
            trigger=Trigger.API if keen else Trigger.STARTUP,
        )
        for i, (wheres, keen) in enumerate(queue)
    ]
    ledgers = {d: MemoryLedger(d, 240 * MIB, total=260 * MIB) for d in GPUS}
    for device, ledger in ledgers.items():
        ledger.take(sum(g.held[device] for g in gens))
        ledger.foreign = foreign * MIB
    free = {device: ledger.free for device, ledger in ledgers.items()}
    found = decided(wanted, gens, ledgers=ledgers)
    admitted = [d for d in found.todo if isinstance(d, Admit)]
    leaving = [d for d in found.todo if isinstance(d, Evict)]
    for device in GPUS:
        assert sum(d.placement.needs[device] for d in admitted) <= free[device]
    assert not any(d.gen.leases or d.gen.pinned for d in leaving)
    assert len({id(d.gen) for d in leaving}) == len(leaving)
    for room_for in {d.room_for for d in leaving}:
        mine = [d for d in leaving if d.room_for is room_for]
        for device, needed in mine[0].placement.needs.items():
            ledger = ledgers[device]
            taken = sum(d.placement.needs[device] for d in admitted)
            came = sum(d.gen.held[device] for d in leaving)
            assert needed <= ledger.usable - ledger.held - taken + came


@pytest.mark.parametrize("state", [State.LOADING, State.WARMING])
def test_what_is_loading_is_waited_for_and_then_named(state):
    gen = brought(at("cuda:0", newborn(spec("x", n_bytes=900 * MIB))), state)
    found = decided([asked("a", "cuda:0=300")], [gen], now=0.0)
    assert short(found) == [] and found.again_at == 10.0
    (refused,) = decided([asked("a", "cuda:0=300")], [gen], now=10.0).todo
    assert isinstance(refused, Refuse) and "loading: x:1#1" in str(refused.error)
