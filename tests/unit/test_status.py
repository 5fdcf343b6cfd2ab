"""What people are told: the five public words, whether it reloads, and the error that matters now."""

import itertools

import pytest

from repository.errors import CheckFailedError, FilesChangedError, SupersededError
from repository.lifecycle.refusals import of_generation
from repository.lifecycle.states import State
from repository.lifecycle.status import PUBLIC, Public, describe, has_failed
from repository.snapshot import Problem
from tests.fakes.heart import brought, folder, newborn, spec


def gen(state, serial=1, version=1, error=None):
    return brought(newborn(spec(version=version), serial), state, error)


def told(*gens, wanted=True, of=None):
    return describe("m", gens, of, wanted=wanted)


@pytest.mark.parametrize(("state", "public"), PUBLIC.items())
def test_each_state_has_its_public_word(state, public):
    assert told(gen(state)).state == public


def test_every_state_is_covered():
    assert set(PUBLIC) == set(State)


@pytest.mark.parametrize(
    ("states", "public"),
    [
        ([State.READY, State.LOADING, State.DRAINING, State.FAILED], Public.LOADED),
        ([State.LOADING, State.DRAINING, State.FAILED], Public.LOADING),
        ([State.DRAINING, State.FAILED], Public.UNLOADING),
        ([State.FAILED], Public.FAILED),
        ([], Public.UNLOADED),
    ],
)
def test_the_most_useful_word_wins(states, public):
    assert told(*[gen(s, n) for n, s in enumerate(states, 1)]).state == public


def test_it_reloads_while_one_serves_and_another_rises():
    assert told(gen(State.READY), gen(State.WARMING, 2)).reloading
    assert not told(gen(State.READY), gen(State.DRAINING, 2)).reloading
    assert not told(gen(State.LOADING)).reloading


def test_the_serving_version_is_the_highest_that_is_ready():
    status = told(gen(State.READY, 1, 1), gen(State.READY, 2, 3), gen(State.LOADING, 3, 9))
    assert status.serving_version == 3


def test_a_failure_stays_the_last_error_until_that_version_serves_again():
    failed = gen(State.FAILED, 2, error=CheckFailedError("label differs"))
    error = told(gen(State.READY, 1), failed).last_error
    assert (error.code, error.message, error.version) == ("check_failed", "label differs", 1)
    assert told(failed, gen(State.READY, 3)).last_error is None


def test_success_of_another_version_does_not_hide_a_failure():
    failed = gen(State.FAILED, 1, version=2, error=OSError("bad magic"))
    error = told(failed, gen(State.READY, 2, version=1)).last_error
    assert error.version == 2 and error.message == "OSError: bad magic"


def test_what_is_wrong_in_the_folder_comes_first_and_warnings_do_not_count():
    warning = Problem("m/config.pbtxt:2", "config", "not honoured", warning=True)
    problem = Problem("m/config.yaml:3", "config", "unknown key 'x'", "remove it")
    assert told(gen(State.READY), of=folder(name="m", problems=(warning,))).last_error is None
    status = told(gen(State.READY), of=folder(name="m", problems=(warning, problem)))
    assert status.state == "loaded"
    assert status.last_error.code == "folder_config"
    assert status.last_error.message == "m/config.yaml:3: unknown key 'x' (remove it)"


def test_a_broken_folder_fails_a_wanted_model_and_leaves_an_unwanted_one_unloaded():
    broken = folder(name="m", problems=(Problem("m", "layout", "no versions"),))
    assert told(of=broken).state == "failed"
    assert told(of=broken, wanted=False).state == "unloaded"


@pytest.mark.parametrize("states", list(itertools.product(State, repeat=2)))
@pytest.mark.parametrize("problems", [(), (Problem("m", "layout", "no versions"),)])
def test_what_probes_ask_is_what_people_are_told(states, problems):
    gens = [gen(state, n) for n, state in enumerate(states, 1)]
    of = folder(name="m", problems=problems)
    assert has_failed(gens, of) == (told(*gens, of=of).state is Public.FAILED)
    assert has_failed([], of) == (told(of=of).state is Public.FAILED)


@pytest.mark.parametrize("of", [None, folder(name="m")])
@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("state", State)
def test_a_model_with_one_generation_is_told_as_one_with_several_is(state, wanted, of):
    """Such a model is described by a shorter way; one that has gone besides says nothing."""
    one, gone = gen(state, 2), gen(State.GONE)
    short, long = told(one, wanted=wanted, of=of), told(gone, one, wanted=wanted, of=of)
    assert short == long._replace(generations=(one,), changed_at=one.story[-1].at)


@pytest.mark.parametrize("wanted", [True, False])
def test_a_model_of_which_nothing_runs_is_told_as_one_that_has_gone(wanted):
    nothing, gone = told(wanted=wanted), told(gen(State.GONE), wanted=wanted)
    assert nothing == gone._replace(generations=(), changed_at=None)


async def test_a_load_whose_files_change_under_it_was_overtaken_not_wrong():
    gen = newborn()
    found = of_generation(gen, FilesChangedError("the files of m version 1 changed"))
    assert isinstance(found, SupersededError) and "changed" in str(found)


def test_what_sleeps_is_unloaded_and_said_to_sleep():
    status = told(gen(State.ASLEEP), gen(State.FAILED, 2), wanted=False)
    assert status.asleep and status.state == "failed"
    assert told(gen(State.ASLEEP), wanted=False).asleep and not told(gen(State.READY)).asleep


def test_one_that_came_back_hides_nothing_of_what_it_came_back_for():
    failed = gen(State.FAILED, 2, error=CheckFailedError("label differs"))
    back = gen(State.READY, 3)
    back.rolled_back = True
    status = told(failed, back)
    assert status.state == "loaded" and status.last_error.message == "label differs"
    gone = gen(State.FAILED, 3, error=OSError("overwritten"))
    gone.rolled_back = True
    assert told(failed, gone).last_error.message == "label differs"
    assert told(gone).last_error.message == "OSError: overwritten"
