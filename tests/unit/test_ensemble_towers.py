"""Ensembles of ensembles: however many ways lead to a model, it is looked at once."""

import pytest

from repository.composing import Composing
from repository.lifecycle.states import State
from tests.fakes.heart import load, spec
from tests.unit.test_ensembles import Stage, of

pytestmark = pytest.mark.looptime


def counted(monkeypatch):
    """How often it was asked on what an ensemble stands."""
    asked = []
    real = Composing._stands

    def stands(self, spec, ensemble):
        asked.append(spec.model)
        return real(self, spec, ensemble)

    monkeypatch.setattr(Composing, "_stands", stands)
    return asked


async def test_one_that_is_needed_on_many_ways_is_looked_at_once(monkeypatch):
    tower = [of(f"e{n - 1}", f"e{n - 1}", model=f"e{n}") for n in range(1, 17)]
    stage = Stage(*tower)
    async with stage.models.running():
        stage.look()
        asked = counted(monkeypatch)
        assert (await load(stage.models, "e16")).state is State.FAILED
        assert len(asked) < 1500  # and not two to the sixteenth


async def test_a_request_for_a_tower_of_them_looks_at_each_once(monkeypatch):
    tower = [of(f"e{n - 1}", model=f"e{n}") for n in range(1, 17)]
    stage = Stage(spec("e0"), *tower)
    async with stage.models.running():
        stage.look()
        asked = counted(monkeypatch)
        leases = []
        waiter = stage.models.wait_for("e16", None, leases.append)
        assert len(asked) < 1500
        await waiter
        leases[0].end()


async def test_one_that_needs_too_many_models_fails_in_words():
    names = [f"m{n}" for n in range(101)]
    stage = Stage(*map(spec, names), of(*names))
    async with stage.models.running():
        stage.look()
        assert (await load(stage.models, "e")).state is State.FAILED
        assert "it needs 101 models, with those that these need; at most 100" in stage.error("e")
