"""The last word about a model wins; what was unloaded by hand stays unloaded."""

import pytest

from repository.lifecycle.ledger import MemoryLedger
from repository.lifecycle.routes import Routes
from repository.lifecycle.states import Event, State
from repository.lifecycle.wishes import Wishes, Word
from tests.fakes.heart import brought, folder, newborn, spec


def test_policy_speaks_where_nobody_has():
    assert Wishes(everything=True).wants("a") and not Wishes(everything=False).wants("a")


@pytest.mark.parametrize("everything", [True, False])
def test_the_last_word_wins(everything):
    wishes = Wishes(everything=everything)
    wishes.load("a")
    assert wishes.wants("a")
    wishes.unload("a")
    assert not wishes.wants("a")
    wishes.load("a")
    wishes.evict("a")
    assert not wishes.wants("a")


def test_a_folder_that_went_away_takes_the_unload_with_it():
    wishes = Wishes(everything=True)
    wishes.unload("a")
    wishes.forget("a")
    assert wishes.wants("a")


def test_a_wish_to_load_by_name_outlives_the_folder():
    wishes = Wishes(everything=False)
    wishes.load("a")
    wishes.forget("a")
    assert wishes.wants("a")


def test_a_forced_load_raises_the_epoch_of_every_version():
    wishes = Wishes(everything=True)
    here = folder(spec("a", 1), spec("a", 2))
    assert {w.epoch for w in wishes.wanted(here).values()} == {0}
    wishes.load("a", force=True)
    assert {v: w.epoch for v, w in wishes.wanted(here).items()} == {1: 1, 2: 1}


def test_nothing_is_wanted_of_a_folder_that_is_not_there():
    assert Wishes(everything=True).wanted(None) == {}


def test_a_route_leads_to_the_highest_version_and_its_newest_generation():
    routes = Routes()
    old = brought(newborn(spec("a", 2), 1), State.READY)
    new = brought(newborn(spec("a", 2), 3), State.READY)
    low = brought(newborn(spec("a", 1), 4), State.READY)
    rising = brought(newborn(spec("a", 9), 5), State.WARMING)
    routes.update("a", [old, new, low, rising])
    assert routes.find("a") is new and routes.find("a", 2) is new
    assert routes.find("a", 1) is low and routes.find("a", 9) is None
    new.step(Event.RETIRE)
    routes.update("a", [old, new, low, rising])
    assert routes.find("a") is old
    routes.update("a", [])
    assert routes.find("a") is None and routes.find("a", 1) is None


def test_a_model_wins_over_an_alias_of_the_same_name():
    routes = Routes()
    one = brought(newborn(spec("a")), State.READY)
    two = brought(newborn(spec("b")), State.READY)
    routes.rename({"b": "a", "other": "a"})
    routes.update("a", [one])
    assert routes.find("b") is one and routes.find("other", 1) is one
    routes.update("b", [two])
    assert routes.find("b") is two


def test_the_ledger_never_hands_out_more_than_it_has_nor_takes_back_more_than_it_gave():
    ledger = MemoryLedger("cpu", 10)
    ledger.take(7)
    with pytest.raises(AssertionError, match="take 4 of 3"):
        ledger.take(4)
    with pytest.raises(AssertionError, match="give 8 of 7"):
        ledger.give(8)
    assert (ledger.held, ledger.free) == (7, 3)


@pytest.mark.parametrize("everything", [True, False])
def test_a_load_that_is_withdrawn_leaves_what_was_said_before(everything):
    wishes = Wishes(everything=everything)
    wishes.load("a")
    wishes.load("a", force=True)
    wishes.withdraw("a")
    assert wishes.word("a") is None
    wishes.unload("a")
    wishes.load("a")
    wishes.withdraw("a")
    assert wishes.word("a") is Word.UNLOAD


def test_a_load_that_was_granted_cannot_be_withdrawn():
    wishes = Wishes(everything=False)
    here = folder(spec("a"))
    wishes.load("a")
    wishes.granted("a")
    wishes.load("a", force=True)
    wishes.withdraw("a")
    assert wishes.wants("a") and wishes.wanted(here)[1].epoch == 0


def test_what_is_named_at_the_start_is_wanted_until_somebody_says_otherwise():
    wishes = Wishes(everything=False, named=["a"])
    assert wishes.wants("a") and not wishes.wants("b")
    wishes.unload("a")
    assert not wishes.wants("a")


def noted(**how):
    """Wishes, and what was noted of them: the last of each model, and how often."""
    notes = []
    wishes = Wishes(note=lambda model, said: notes.append((model, said)), **how)
    return wishes, notes


def test_what_people_say_is_noted_once_for_each_change():
    wishes, notes = noted(everything=True)
    wishes.load("a")
    wishes.load("a", force=True)
    wishes.unload("a")
    wishes.unload("a")
    assert notes == [("a", Word.LOAD), ("a", Word.UNLOAD)]


def test_requests_that_wait_and_evictions_are_nobodys_words():
    wishes, notes = noted(everything=False)
    wishes.demand("a")
    wishes.granted("a")
    wishes.evict("a")
    assert notes == [] and wishes.said("a") is None
    wishes.unload("a")
    wishes.demand("a")
    wishes.granted("a")
    assert wishes.wants("a") and wishes.said("a") is Word.UNLOAD
    wishes.load("b")
    wishes.granted("b")
    wishes.evict("b")
    assert not wishes.wants("b") and wishes.said("b") is Word.LOAD
    assert notes == [("a", Word.UNLOAD), ("b", Word.LOAD)]


def test_a_wish_that_is_withdrawn_is_withdrawn_from_the_notes():
    wishes, notes = noted(everything=True)
    wishes.load("a")
    wishes.withdraw("a")
    wishes.unload("a")
    wishes.load("a")
    wishes.withdraw("a")
    assert [said for _, said in notes] == [
        Word.LOAD, None, Word.UNLOAD, Word.LOAD, Word.UNLOAD,
    ]  # fmt: skip


def test_a_load_by_call_makes_a_wish_of_what_was_only_demanded():
    wishes, notes = noted(everything=False)
    wishes.unload("a")
    wishes.demand("a")
    wishes.load("a")
    assert wishes.word("a") is Word.LOAD and notes[-1] == ("a", Word.LOAD)
    wishes.withdraw("a")  # it could not be had: what was said before the request holds again
    assert wishes.word("a") is Word.UNLOAD and notes[-1] == ("a", Word.UNLOAD)


def test_a_folder_that_goes_takes_the_unload_from_the_notes_and_leaves_the_load():
    wishes, notes = noted(everything=False)
    wishes.unload("a")
    wishes.forget("a")
    wishes.load("b")
    wishes.granted("b")
    wishes.evict("b")
    wishes.forget("b")
    assert notes == [("a", Word.UNLOAD), ("a", None), ("b", Word.LOAD)]
    assert wishes.wants("b")


@pytest.mark.parametrize("everything", [True, False])
def test_what_was_said_before_the_start_wins_over_the_mode_and_is_not_noted_again(everything):
    wishes, notes = noted(everything=everything, named=["b"])
    wishes.recall({"a": "load", "b": "unload"})
    assert wishes.wants("a") and not wishes.wants("b")
    assert wishes.wants("c") is everything
    assert notes == []


@pytest.mark.parametrize("said", [None, Word.LOAD, Word.UNLOAD])
def test_a_load_that_is_taken_back_leaves_what_held_before_though_some_of_it_serves(said):
    wishes, notes = noted(everything=False)
    if said is not None:
        wishes.recall({"a": said})
    before = wishes.now("a")
    wishes.load("a", force=True)
    wishes.granted("a")
    wishes.take_back("a", before)
    assert (wishes.word("a"), wishes.said("a"), wishes.now("a").epoch) == (said, said, 0)
    assert not notes or notes[-1] == ("a", said)


def test_a_load_is_not_taken_back_over_what_was_said_since():
    wishes, notes = noted(everything=False)
    for speak, word in ((wishes.unload, Word.UNLOAD), (wishes.load, Word.LOAD)):
        before = wishes.now("a")
        wishes.load("a")
        speak("a")
        wishes.take_back("a", before)
        assert wishes.word("a") is word and notes[-1] == ("a", word)


def test_a_load_that_is_taken_back_does_not_bring_back_what_was_evicted_since():
    wishes, _ = noted(everything=True)
    before = wishes.now("a")
    wishes.load("a")
    wishes.evict("a")
    wishes.take_back("a", before)
    assert wishes.word("a") is Word.EVICTED and wishes.said("a") is None


def test_what_was_put_to_sleep_is_not_wanted_until_somebody_asks_and_may_rest():
    noted = []
    wishes = Wishes(everything=True, note=lambda model, said: noted.append((model, said)))
    files = folder(spec("a"))
    wishes.sleep("a")
    assert not wishes.wants("a") and wishes.said("a") is Word.SLEEP and not wishes.wanted(files)
    assert set(wishes.resting(files)) == {1} and noted == [("a", Word.SLEEP)]
    wishes.demand("a")
    assert wishes.wants("a") and wishes.said("a") is Word.SLEEP
    wishes.withdraw("a")
    assert wishes.word("a") is Word.SLEEP
    wishes.load("a")
    assert wishes.wants("a") and noted[-1] == ("a", Word.LOAD)


def test_nothing_rests_of_what_was_unloaded_or_has_no_folder():
    wishes = Wishes(everything=True)
    wishes.evict("a")
    assert wishes.resting(folder(spec("a")))
    wishes.unload("a")
    assert not wishes.resting(folder(spec("a"))) and not wishes.resting(None)


def test_what_was_put_to_sleep_is_recalled_and_forgotten_with_its_folder():
    wishes = Wishes(everything=True)
    wishes.recall({"a": "sleep"})
    assert not wishes.wants("a")
    wishes.forget("a")
    assert wishes.wants("a") and wishes.said("a") is None
