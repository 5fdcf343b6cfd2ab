"""What a caller is told who cannot have a model: may it come back by itself, or not."""

import pytest

from repository.errors import ModelNotReadyError, NoDiskError, VersionNotFoundError, WorkerDiedError
from repository.lifecycle.refusals import not_serving
from repository.lifecycle.states import Event, State
from repository.lifecycle.status import describe
from tests.fakes.heart import brought, folder, newborn, spec


def told(*gens, wanted=True, version=None):
    status = describe("m", gens, folder(spec()), wanted=wanted)
    return not_serving("m", version, status)


def crashed(*, served):
    gen = brought(newborn(), State.READY if served else State.LOADING)
    gen.fault(WorkerDiedError("killed by signal 9"))
    gen.step(Event.STOPPED)
    return gen


@pytest.mark.parametrize("state", [State.QUEUED, State.LOADING, State.WARMING])
def test_who_is_on_its_way_is_worth_asking_again(state):
    error = told(brought(newborn(), state))
    assert isinstance(error, ModelNotReadyError) and error.retry_after_s == 1.0


@pytest.mark.parametrize("state", [State.DRAINING, State.UNLOADING])
@pytest.mark.parametrize("version", [None, 1])
def test_who_is_leaving_is_not_called_unknown_before_it_has_gone(state, version):
    error = told(brought(newborn(), state), wanted=False, version=version)
    assert isinstance(error, ModelNotReadyError) and error.retry_after_s == 1.0
    assert "unloaded" in str(error)


def test_who_found_no_room_on_the_disk_is_worth_asking_again():
    gen = brought(newborn(), State.LOADING)
    gen.fault(NoDiskError("the state folder has no room"))
    gen.step(Event.STOPPED)
    error = told(gen)
    assert isinstance(error, ModelNotReadyError) and error.retry_after_s == 2.0
    assert "no room" in str(error)


def test_nobody_is_told_to_ask_again_for_a_model_that_dies_while_it_loads():
    gen = brought(newborn(), State.LOADING)
    gen.fault(WorkerDiedError("the worker of 'm' died: killed by signal 9; ask again"))
    gen.step(Event.STOPPED)
    assert str(told(gen)).endswith("killed by signal 9; mend the model, or load it by hand")


def test_a_worker_that_died_in_service_is_worth_asking_again():
    error = told(crashed(served=True))
    assert isinstance(error, ModelNotReadyError) and error.retry_after_s == 1.0


def test_a_worker_that_dies_while_loading_is_not():
    error = told(crashed(served=False))
    assert isinstance(error, VersionNotFoundError) and "signal 9" in str(error)


def test_nor_is_one_that_nobody_wants_any_more():
    assert isinstance(told(crashed(served=True), wanted=False), VersionNotFoundError)


def test_a_version_that_is_not_there_is_told_apart_from_one_that_does_not_serve():
    assert "version 9 is not found" in str(told(version=9))
    assert "version 1 is not at ready state" in str(told(version=1))
    assert "has no available versions" in str(told())


def test_who_sleeps_is_told_to_be_woken_without_a_promise():
    error = told(brought(newborn(), State.ASLEEP), wanted=False)
    assert isinstance(error, ModelNotReadyError) and error.retry_after_s is None
    assert "sleeps; wake it, or load it" in str(error)
