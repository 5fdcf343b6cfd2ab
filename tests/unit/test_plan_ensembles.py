"""What is planned of an ensemble follows from what it stands on; and the words behind it."""

from repository.errors import ComposingModelError, NoRoomError, WorkerDiedError
from repository.lifecycle.plan import FIRM, Footing, fault_of, plan
from repository.lifecycle.residency import Moment, give_way, in_use, turn_ends, victims
from repository.lifecycle.states import State
from repository.lifecycle.wishes import Wanted, Wishes, Word
from tests.fakes.heart import brought, newborn, resident, spec

WANT = Wanted(spec("e"))
COMING = Footing(coming=True)
GONE = Footing(why="its model is gone")


def planned(gens, footing, wanted=WANT):
    return plan({1: wanted}, gens, now=10.0, footing=lambda what: footing)


def ensemble(state, error=None, serial=1):
    return brought(newborn(spec("e"), serial), state, error)


def test_it_is_started_whatever_it_stands_on_for_then_it_can_say_what_it_lacks():
    for footing in (FIRM, COMING, GONE):
        assert [s.wanted for s in planned([], footing).start] == [WANT]


def test_queued_it_waits():
    found = planned([ensemble(State.QUEUED)], COMING)
    assert not found.retire and not found.start


def test_what_has_begun_is_retired_when_nothing_carries_it_any_more():
    for state in (State.LOADING, State.WARMING, State.READY):
        (order,) = planned([ensemble(state)], GONE).retire
        assert order.why == "its model is gone"
        assert planned([ensemble(state)], COMING).retire
        assert not planned([ensemble(state)], FIRM).retire


def test_it_is_retired_even_where_nothing_newer_serves():
    newer = Wanted(spec("e", print_="f2"))
    assert planned([ensemble(State.READY)], GONE, newer).retire


def test_what_failed_for_its_models_is_tried_again_when_they_are_back_or_on_their_way():
    failed = ensemble(State.FAILED, ComposingModelError("no"))
    assert not planned([failed], GONE).start
    assert planned([failed], COMING).start and planned([failed], FIRM).start


def test_a_fault_counts_as_long_as_nothing_will_be_tried():
    def fault(gens, fits=True, footing=FIRM):
        return fault_of(
            WANT, gens, crash_limit=3, fits=lambda what: fits, footing=lambda what: footing
        )

    assert fault([]) is None
    broken = ensemble(State.FAILED, OSError("broken"))
    assert fault([broken]) is broken.error
    short = ensemble(State.FAILED, NoRoomError("short"))
    assert fault([short]) is None and fault([short], fits=False) is short.error
    died = ensemble(State.FAILING, WorkerDiedError("died"))
    assert fault([died]) is None
    carried = ensemble(State.FAILED, ComposingModelError("no"))
    assert fault([carried]) is None and fault([carried], footing=GONE) is carried.error


# who may leave --------------------------------------------------------------------------------------


def used(n_bytes=10, user_state=State.READY, **config):
    """A model, and an ensemble that needs it."""
    model = resident("a", n_bytes, 1)
    user = brought(newborn(spec("e", n_bytes=0, **config), 2), user_state)
    model.users = (user,)
    return model, user


def test_what_an_ensemble_needs_is_in_use_while_that_is():
    model, user = used()
    assert in_use([model]) == set()
    with user.lease():
        assert in_use([model]) == {"a"}
        assert victims({"cpu": 5}, [model], Moment(100.0)) is None
    assert victims({"cpu": 5}, [model], Moment(100.0)) == [model]


def test_requests_of_others_drive_out_what_a_busy_one_needs_but_not_what_one_waits_for():
    model, user = used()
    with user.lease():
        assert give_way({"cpu": 5}, [model], Moment(100.0)) == [model]
    model, _ = used(user_state=State.QUEUED)
    assert give_way({"cpu": 5}, [model], Moment(100.0)) is None


def test_it_leaves_no_sooner_than_what_needs_it():
    model, user = used()
    user.ready_at = user.last_used = 50.0
    assert turn_ends(model, Moment(50.0, 2.0)) > 50.0


def test_it_is_as_dear_as_what_needs_it():
    dear, _ = used(priority=5)
    cheap = resident("b", 10, 3, last_used=99.0)
    assert victims({"cpu": 5}, [dear, cheap], Moment(200.0)) == [cheap]


# words ----------------------------------------------------------------------------------------------


def words(**rest):
    told = []
    return Wishes(note=lambda model, word: told.append((model, word)), **rest), told


def test_what_is_needed_is_wanted_and_nobody_said_so():
    wishes, told = words(everything=False)
    assert wishes.need("a") and wishes.wants("a") and not wishes.need("a")
    assert wishes.said("a") is None and told == []


def test_a_need_alone_does_not_overrule_what_was_said_of_the_model():
    wishes, told = words(everything=True)
    wishes.unload("a")
    assert not wishes.need("a") and not wishes.wants("a")
    assert wishes.need("a", asked=True) and wishes.said("a") is Word.UNLOAD
    wishes.unload("a")
    assert wishes.need("a", asked=True, said=True)
    assert wishes.said("a") is None and told[-1] == ("a", None)


def test_that_somebody_wanted_it_loaded_is_not_forgotten_for_a_need():
    wishes, _ = words(everything=False)
    wishes.load("a")
    wishes.evict("a")
    assert wishes.need("a", asked=True, said=True) and wishes.said("a") is Word.LOAD


def test_only_what_was_needed_and_nothing_else_is_spared():
    wishes, _ = words(everything=False)
    wishes.need("a")
    wishes.load("b")
    assert wishes.spare("a") and not wishes.wants("a")
    assert not wishes.spare("b") and wishes.wants("b")


def test_spared_in_a_mode_that_wants_everything_it_stays_away_all_the_same():
    wishes, _ = words(everything=True)
    wishes.evict("a")
    wishes.need("a", asked=True)
    assert wishes.spare("a") and not wishes.wants("a")


def test_a_need_that_came_to_nothing_is_taken_back():
    wishes, _ = words(everything=False)
    wishes.need("a")
    wishes.withdraw("a")
    assert wishes.word("a") is None
