"""The planner under random histories (hypothesis finds the shortest one that breaks a promise)."""

import math

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from repository.errors import CheckFailedError, FilesChangedError, NoRoomError, WorkerDiedError
from repository.lifecycle.plan import (
    BACKOFF_S,
    LONGEST_ROW,
    REFUSED_S,
    REST_S,
    STABLE_S,
    counting,
    plan,
)
from repository.lifecycle.states import RISING, TERMINAL, Event, State
from repository.lifecycle.wishes import Wanted
from tests.fakes.heart import brought, newborn, spec

VERSIONS = (1, 2)
MOVES = {
    State.QUEUED: [Event.ADMIT, Event.FAULT],
    State.LOADING: [Event.LOADED, Event.FAULT],
    State.WARMING: [Event.WARMED, Event.FAULT],
    State.READY: [Event.FAULT],
    State.DRAINING: [Event.DRAINED],
    State.UNLOADING: [Event.STOPPED],
    State.FAILING: [Event.STOPPED],
}


class Histories(RuleBasedStateMachine):
    """Files change, loads succeed or fail, workers die; lives are played by hand, a step a rule."""

    def __init__(self):
        super().__init__()
        self.wanted, self.gens, self.serial, self.prints, self.now = {}, [], 0, 0, 0.0

    def ready(self):
        return [g for g in self.gens if g.state is State.READY]

    def act(self):
        """Carries plans out until they are empty."""
        for _ in range(20):
            found = plan(self.wanted, self.gens, now=self.now)
            if not found.retire and not found.start:
                return
            for order in found.retire:
                gen = next(g for g in self.gens if g.serial == order.serial)
                serving = bool(self.ready())
                gen.retire(order.why)
                gen.step(Event.RETIRE)
                if self.wanted and serving:
                    assert self.ready(), "the last READY one was retired while the model is wanted"
            for start in found.start:
                self.serial += 1
                gen = newborn(start.wanted.spec, self.serial, clock=lambda: self.now)
                gen.epoch = start.wanted.epoch
                self.gens.append(gen)
        raise AssertionError("the planner never comes to rest")

    @rule(versions=st.sets(st.sampled_from(VERSIONS), min_size=1))
    def files_change(self, versions):
        self.prints += 1
        self.wanted = {v: Wanted(spec(version=v, print_=str(self.prints))) for v in versions}
        self.act()

    @rule(version=st.sampled_from(VERSIONS))
    def one_version_comes_or_goes(self, version):
        self.prints += 1
        if version in self.wanted:
            self.wanted = {v: w for v, w in self.wanted.items() if v != version}
        else:
            self.wanted = {**self.wanted, version: Wanted(spec(version=version, print_="x"))}
        self.act()

    @precondition(lambda self: self.wanted)
    @rule()
    def somebody_forces_a_reload(self):
        self.wanted = {v: Wanted(w.spec, w.epoch + 1) for v, w in self.wanted.items()}
        self.act()

    @rule()
    def unload(self):
        self.wanted = {}
        self.act()

    @rule(passed=st.sampled_from([0.1, 1.0, 100.0]))
    def time_passes(self, passed):
        self.now += passed
        self.act()

    @precondition(lambda self: any(g.state not in TERMINAL for g in self.gens))
    @rule(data=st.data(), error=st.sampled_from([OSError, WorkerDiedError, FilesChangedError]))
    def something_happens(self, data, error):
        gen = data.draw(st.sampled_from([g for g in self.gens if g.state not in TERMINAL]))
        event = data.draw(st.sampled_from(MOVES[gen.state]))
        if event is Event.FAULT:
            gen.fault(error("x"))
        else:
            gen.step(event)
        self.act()

    @invariant()
    def at_most_one_rises_and_one_serves_for_each_version(self):
        for version in VERSIONS:
            live = [
                g for g in self.gens if g.spec.version == version and not g.retire_asked.is_set()
            ]
            assert sum(g.state in RISING for g in live) <= 1
            assert sum(g.state is State.READY for g in live) <= 1

    @invariant()
    def planning_twice_proposes_nothing_new(self):
        found = plan(self.wanted, self.gens, now=self.now)
        assert not found.retire and not found.start

    @invariant()
    def nothing_serves_or_rises_for_a_model_that_nobody_wants(self):
        if not self.wanted:
            assert all(
                g.retire_asked.is_set() for g in self.gens if g.state in RISING | {State.READY}
            )


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def want(*versions, print_="f1", epoch=0):
    return {v: Wanted(spec(version=v, print_=print_), epoch) for v in versions}


def crashed(serial, *, at, served=None):
    """A generation whose worker died at `at`, after `served` seconds of service (None: in loading)."""
    gen = newborn(spec(), serial, clock=lambda: at)
    brought(gen, State.READY if served is not None else State.LOADING)
    if served is not None:
        gen.ready_at = at - served
    gen.fault(WorkerDiedError("killed by signal 9"))
    gen.step(Event.STOPPED)
    return gen


def test_an_older_version_serves_until_the_new_one_does():
    old = brought(newborn(spec(version=1)), State.READY)
    new = newborn(spec(version=2), 2)
    assert plan(want(2), [old], now=0).retire == ()
    assert plan(want(2), [old, new], now=0).retire == ()
    brought(new, State.READY)
    assert [r.serial for r in plan(want(2), [old, new], now=0).retire] == [1]


def test_a_broken_new_version_leaves_the_old_one_serving():
    old = brought(newborn(spec(version=1)), State.READY)
    new = brought(newborn(spec(version=2), 2), State.FAILED, CheckFailedError("differs"))
    found = plan(want(2), [old, new], now=1e9)
    assert found.retire == found.start == ()


def test_a_dead_worker_is_replaced_at_once_and_then_ever_later():
    first = plan(want(1), [crashed(1, at=10, served=5)], now=10)
    assert len(first.start) == 1
    two = [crashed(1, at=10, served=5), crashed(2, at=11, served=0.1)]
    assert plan(want(1), two, now=11).start == ()
    assert plan(want(1), two, now=11).again_at == 11 + BACKOFF_S
    assert len(plan(want(1), two, now=11 + BACKOFF_S).start) == 1
    three = [*two, crashed(3, at=12, served=0.1)]
    assert plan(want(1), three, now=12).again_at == 12 + 2 * BACKOFF_S


def test_a_worker_that_served_long_starts_the_count_again():
    gens = [crashed(1, at=10, served=0.1), crashed(2, at=100, served=STABLE_S)]
    assert len(plan(want(1), gens, now=100).start) == 1


def test_dying_while_loading_ends_after_the_limit():
    gens = [crashed(n, at=float(n)) for n in (1, 2)]
    assert plan(want(1), gens, now=2, crash_limit=3).again_at is not None
    gens.append(crashed(3, at=3))
    found = plan(want(1), gens, now=math.inf, crash_limit=3)
    assert found.start == () and found.again_at is None


def test_what_found_no_room_is_tried_again_when_it_fits():
    gens = [brought(newborn(), State.FAILED, NoRoomError("full"))]
    assert plan(want(1), gens, now=0, fits=lambda s: False).start == ()
    found = plan(want(1), gens, now=0, fits=lambda s: True)
    assert found.start == () and found.again_at == REFUSED_S  # nothing goes round without a pause
    assert len(plan(want(1), gens, now=REFUSED_S, fits=lambda s: True).start) == 1


def test_a_forced_reload_starts_beside_what_serves_the_same_files():
    old = brought(newborn(), State.READY)
    found = plan(want(1, epoch=1), [old], now=0)
    assert len(found.start) == 1 and found.retire == ()


def test_files_that_change_back_keep_the_generation_that_serves_them():
    serving = brought(newborn(), State.READY)
    rising = brought(newborn(spec(print_="f2"), 2), State.LOADING)
    found = plan(want(1, print_="f1"), [serving, rising], now=0)
    assert [r.serial for r in found.retire] == [2] and found.start == ()


def test_a_load_under_which_the_files_changed_is_tried_again_after_a_rest_and_not_for_ever():
    def changed(serial, at):
        gen = brought(newborn(spec(), serial, clock=lambda: at), State.LOADING)
        gen.fault(FilesChangedError("changed"))
        gen.step(Event.STOPPED)
        return gen

    gens = [changed(1, 10.0)]
    assert plan(want(1), gens, now=10).start == ()
    assert plan(want(1), gens, now=10).again_at == 10 + REST_S
    assert len(plan(want(1), gens, now=10 + REST_S).start) == 1
    gens += [changed(2, 20.0), changed(3, 30.0)]
    assert plan(want(1), gens, now=math.inf, crash_limit=3).start == ()


def test_a_fault_that_was_forgiven_counts_for_nothing():
    failed = brought(newborn(), State.FAILED, CheckFailedError("differs"))
    assert plan(want(1), [failed], now=0).start == ()
    failed.forgiven = True
    assert len(plan(want(1), [failed], now=0).start) == 1


def test_a_fault_while_draining_is_no_fault_of_the_next_try():
    gen = brought(newborn(), State.DRAINING)
    gen.fault(OSError("x"))
    gen.step(Event.STOPPED)
    assert gen.state is State.GONE and len(plan(want(1), [gen], now=0).start) == 1


def test_only_the_faults_that_decide_are_counted():
    gens = [crashed(n, at=float(n)) for n in range(1, 50)]
    row = counting(gens, want(1)[1], crash_limit=3)
    assert row == gens[-LONGEST_ROW:]
    last = brought(newborn(serial=99), State.FAILED, CheckFailedError("differs"))
    assert counting([*gens, last], want(1)[1], crash_limit=3) == [last]
