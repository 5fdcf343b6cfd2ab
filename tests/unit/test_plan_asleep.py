"""What the planner says of those who sleep, and of those who come back for a newer one that failed."""

import pytest

from repository.errors import CheckFailedError, NoDiskError, NoRoomError, WorkerDiedError
from repository.lifecycle.plan import REFUSED_S, Fallback, asleep_for, plan
from repository.lifecycle.states import Event, State
from repository.lifecycle.wishes import Wanted
from tests.fakes.heart import brought, newborn, spec

BROKEN = CheckFailedError("differs")


def want(print_, version=1, epoch=0, *, back=False):
    return Wanted(spec(version=version, print_=print_), epoch, back)


def gen(print_, serial, state, version=1, *, epoch=0, error=None, rolled_back=False):
    one = newborn(
        spec(version=version, print_=print_), serial, epoch=epoch, rolled_back=rolled_back
    )
    return brought(one, state, error)


def asleep(print_, serial=1, version=1, *, epoch=0):
    return gen(print_, serial, State.ASLEEP, version, epoch=epoch)


def retired(*gens, wanted=None, resting=None, fallback=None):
    found = plan(wanted or {}, gens, now=0, resting=resting or {}, fallback=fallback or {})
    return [order.serial for order in found.retire]


def started(*gens, wanted, fallback, fits=True):
    found = plan(wanted, gens, now=REFUSED_S, fallback=fallback, fits=lambda spec: fits)
    return [(s.wanted.spec.fingerprint, s.wanted.back) for s in found.start]


# asleep -------------------------------------------------------------------------------------------


def test_what_may_rest_is_left_alone_and_what_may_not_ends():
    assert retired(asleep("f"), resting={1: want("f")}) == []
    assert retired(asleep("f"), resting={1: want("other")}) == [1]
    assert retired(asleep("f"), resting={1: want("f", epoch=1)}) == [1]
    assert retired(asleep("f")) == [1]


def test_one_that_is_on_its_way_to_sleep_is_judged_as_one_that_sleeps():
    falling = gen("f", 1, State.DRAINING)
    falling.sleeps = True
    assert retired(falling) == [1] and retired(falling, resting={1: want("f")}) == []
    falling.retire("unloaded")
    assert retired(falling) == []


def test_it_sleeps_on_until_another_of_the_same_files_serves():
    rest = {1: want("f")}
    rising = gen("f", 2, State.LOADING)
    assert retired(asleep("f"), rising, wanted=rest, resting=rest) == []
    assert retired(asleep("f"), gen("f", 2, State.READY), wanted=rest, resting=rest) == [1]


def test_of_several_asleep_for_the_same_files_the_newest_stays_and_is_woken():
    sleepers = [asleep("f", 1), asleep("f", 2), asleep("other", 3)]
    assert asleep_for(want("f"), sleepers) is sleepers[1]
    assert asleep_for(want("f", epoch=1), sleepers) is None
    assert retired(*sleepers[:2], resting={1: want("f")}) == [1]


def test_what_sleeps_is_no_reason_not_to_start():
    found = plan({1: want("f")}, [asleep("f")], now=0, resting={1: want("f")})
    assert [s.wanted for s in found.start] == [want("f")]


# coming back --------------------------------------------------------------------------------------

WANTED = {1: want("new")}
BACK = {1: Fallback(want("old", back=True), heir=1)}


def failed(error=BROKEN, serial=2, version=1):
    return gen("new", serial, State.FAILED, version, error=error)


def test_the_old_one_comes_back_when_the_new_one_has_failed_in_itself_and_not_before():
    assert started(asleep("old"), failed(), wanted=WANTED, fallback=BACK) == [("old", True)]
    assert started(asleep("old"), wanted=WANTED, fallback=BACK) == [("new", False)]
    loading = gen("new", 2, State.LOADING)
    assert started(asleep("old"), loading, wanted=WANTED, fallback=BACK) == []
    assert retired(asleep("old"), loading, wanted=WANTED, fallback=BACK) == []


def test_it_is_queued_while_the_new_one_still_stops():
    stopping = gen("new", 2, State.FAILING, error=BROKEN)
    assert started(asleep("old"), stopping, wanted=WANTED, fallback=BACK) == [("old", True)]


@pytest.mark.parametrize(
    ("errors", "fits", "back"),
    [
        ([WorkerDiedError("x")], True, False),  # it may pass: the new one is tried again
        ([WorkerDiedError("x")] * 3, True, True),
        ([NoDiskError("full")], True, True),
        ([NoRoomError("small")], False, True),
        ([NoRoomError("small")], True, False),
    ],
)
def test_what_may_pass_is_tried_again_first(errors, fits, back):
    gens = [failed(error, serial) for serial, error in enumerate(errors, 2)]
    found = started(asleep("old"), *gens, wanted=WANTED, fallback=BACK, fits=fits)
    assert found == ([("old", True)] if back else [("new", False)])


@pytest.mark.parametrize("state", [State.LOADING, State.READY])
@pytest.mark.parametrize("error", [BROKEN, NoRoomError("small"), NoDiskError("full")])
def test_back_in_place_it_is_not_disturbed_for_another_try(state, error):
    back = gen("old", 3, state, rolled_back=True)
    assert started(failed(error), back, wanted=WANTED, fallback=BACK) == []
    assert retired(failed(error), back, wanted=WANTED, fallback=BACK) == []


def test_one_that_came_back_leaves_for_a_newer_one_that_serves():
    back = gen("old", 3, State.READY, rolled_back=True)
    newer = {1: want("newer")}
    assert started(back, wanted=newer, fallback=BACK) == [("newer", False)]
    assert retired(back, gen("newer", 4, State.READY), wanted=newer, fallback=BACK) == [3]


def test_one_that_cannot_come_back_leaves_the_new_one_as_it_would_be_without_it():
    dead = gen("old", 3, State.FAILED, error=BROKEN, rolled_back=True)
    assert started(failed(), dead, wanted=WANTED, fallback=BACK) == []
    full = failed(NoDiskError("full"))
    found = plan(WANTED, [full, dead], now=100, fallback=BACK)
    assert [s.wanted.spec.fingerprint for s in found.start] == ["new"]


def test_one_that_came_back_and_died_comes_back_again():
    dead = gen("old", 3, State.READY, rolled_back=True)
    dead.fault(WorkerDiedError("killed"))
    dead.step(Event.STOPPED)
    assert started(failed(), dead, wanted=WANTED, fallback=BACK) == [("old", True)]


def test_a_version_that_left_for_another_comes_back_though_it_is_not_wanted():
    wanted, back = {2: want("new", 2)}, {1: Fallback(want("old", back=True), heir=2)}
    broken = failed(version=2)
    assert started(asleep("old"), broken, wanted=wanted, fallback=back) == [("old", True)]
    rising = gen("old", 3, State.LOADING, rolled_back=True)
    assert started(broken, rising, wanted=wanted, fallback=back) == []
    assert retired(broken, rising, wanted=wanted, fallback=back) == []
    serves = gen("new", 4, State.READY, 2)
    assert retired(gen("old", 3, State.READY), serves, wanted=wanted, fallback=back) == [3]


def test_a_forced_reload_of_the_same_files_is_told_from_the_one_that_comes_back():
    wanted = {1: want("f", epoch=1)}
    back = {1: Fallback(want("f", epoch=0, back=True), heir=1)}
    broken = gen("f", 2, State.FAILED, epoch=1, error=BROKEN)
    assert started(asleep("f"), broken, wanted=wanted, fallback=back) == [("f", True)]
    assert asleep_for(back[1].wanted, [asleep("f", epoch=1), asleep("f", 2, epoch=0)]).serial == 2


def test_planning_twice_proposes_nothing_new():
    queued = gen("old", 3, State.QUEUED, rolled_back=True)
    found = plan(WANTED, [asleep("old"), failed(), queued], now=0, fallback=BACK)
    assert (found.retire, found.start) == ((), ())
