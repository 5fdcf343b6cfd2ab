"""Ensembles and the models that they need: loaded with them, gone with them, back with them."""

import asyncio

import pytest

from repository.config import Ensemble, EnsembleStep
from repository.dry_run import foresee
from repository.errors import ComposingModelError, LoadFailedError, NoRoomError
from repository.hosts.ensemble import EnsembleHost
from repository.lifecycle.generation import Trigger
from repository.lifecycle.refusals import of_generation
from repository.lifecycle.states import State
from repository.lifecycle.status import describe
from repository.lifecycle.wishes import Word
from repository.messages import Loaded, TensorSpec
from tests.fakes.caller import FakeCaller
from tests.fakes.heart import folder, load, reconciler, spec, unload
from tests.fakes.host import FakeHost

pytestmark = pytest.mark.looptime


def of(*names, model="e", print_="f1", **config):
    """An ensemble of these, one behind the other."""
    tensors = ["x", *map(str, range(1, len(names))), "y"]
    steps = [
        EnsembleStep(model=name, inputs={"x": tensors[i]}, outputs={"y": tensors[i + 1]})
        for i, name in enumerate(names)
    ]
    return spec(model, 1, print_, 0, ensemble=Ensemble(steps=tuple(steps)), **config)


class Stage:
    """`hosts`: name -> the knobs of its host."""

    def __init__(self, *specs, capacity=100, hosts=None, **rest):
        self.knobs = {name: dict(knobs) for name, knobs in (hosts or {}).items()}
        self.made = []
        self.models = reconciler(self.make_host, capacity, **rest)
        self.specs = {s.model: s for s in specs}

    def make_host(self, what):
        if what.config.ensemble is not None:
            return EnsembleHost(FakeCaller(lambda: self.models))
        host = FakeHost(**self.knobs.get(what.model, {}))
        self.made.append((what.model, host))
        return host

    def look(self, *changed, gone=()):
        self.specs |= {s.model: s for s in changed}
        for name in gone:
            del self.specs[name]
        self.models.observe({name: folder(s) for name, s in self.specs.items()})

    def states(self, *names):
        return [self.state(name) for name in names]

    def state(self, name):
        gens = self.models.register.of(name)
        wants = self.models.wishes.wants(name)
        return describe(name, gens, self.models.folders.get(name), wanted=wants).state

    def error(self, name):
        gens = self.models.register.of(name)
        status = describe(name, gens, self.models.folders.get(name), wanted=True)
        return status.last_error.message if status.last_error else ""

    def of(self, name):
        return self.models.register.of(name)[-1]


async def soon(seconds=0.5):
    await asyncio.sleep(seconds)


async def test_loading_an_ensemble_loads_what_it_needs_and_that_needs():
    stage = Stage(spec("a"), spec("b"), of("a", "b"), of("e", "a", model="f"))
    async with stage.models.running():
        stage.look()
        assert stage.states("a", "b", "e", "f") == ["unloaded"] * 4
        assert (await load(stage.models, "f")).state is State.READY
        assert stage.states("a", "b", "e", "f") == ["loaded"] * 4


async def test_it_is_ready_once_its_models_are(looptime):
    stage = Stage(spec("a"), spec("b"), of("a", "b"), hosts={"a": {"load_s": 7}})
    async with stage.models.running():
        stage.look()
        loading = asyncio.create_task(load(stage.models, "e"))
        await soon(6)
        assert stage.states("a", "b", "e") == ["loading", "loaded", "loading"]
        await loading
        assert 7 <= looptime < 7.1


async def test_waiting_for_its_models_it_takes_no_load_slot_and_no_memory():
    many = [of("a", model=f"e{n}") for n in range(9)]
    stage = Stage(spec("a", n_bytes=100), *many, load_slots=1, hosts={"a": {"load_s": 5}})
    async with stage.models.running():
        stage.look()
        await asyncio.gather(*(load(stage.models, gen.model) for gen in many))
        assert stage.models.ledgers["cpu"].held == 100


async def test_that_it_needs_a_model_is_nobodys_wish():
    told = []
    stage = Stage(spec("a"), of("a"))
    stage.models.wishes._note = lambda model, word: told.append((model, word))
    async with stage.models.running():
        stage.look()
        await load(stage.models, "e")
        assert told == [("e", Word.LOAD)]
        assert stage.models.wishes.word("a") is Word.NEEDED


async def test_unloading_it_leaves_its_models():
    stage = Stage(spec("a"), of("a"))
    async with stage.models.running():
        stage.look()
        await load(stage.models, "e")
        await unload(stage.models, "e")
        assert stage.states("a", "e") == ["loaded", "unloaded"]


async def test_with_its_dependents_only_that_leaves_which_nobody_else_wants():
    stage = Stage(*(spec(name) for name in "abcd"), of("a", "b", "c", "d"), of("b", model="other"))
    async with stage.models.running():
        stage.look()
        await load(stage.models, "c")  # somebody said so
        await load(stage.models, "other")
        await load(stage.models, "e")
        await unload(stage.models, "e")
        going = stage.models.spare_parts("e")
        for gen in [gen for gens in going.values() for gen in gens]:
            await gen.ended.wait()
        assert set(going) == {"a", "d"}
        assert stage.states(*"abcd") == ["unloaded", "loaded", "loaded", "unloaded"]


async def test_unloading_a_model_takes_it_out_of_service_and_loading_brings_it_back():
    stage = Stage(spec("a"), spec("b"), of("a", "b"), of("e", model="f"))
    async with stage.models.running():
        stage.look()
        await load(stage.models, "f")
        await unload(stage.models, "a")
        await soon()
        assert stage.states("a", "b", "e", "f") == ["unloaded", "loaded", "unloaded", "unloaded"]
        assert stage.models.away("e") == "its model 'a' was unloaded"
        await load(stage.models, "a")
        await soon()
        assert stage.states("a", "e", "f") == ["loaded"] * 3


async def test_loading_it_again_loads_the_model_that_was_unloaded():
    stage = Stage(spec("a"), of("a"), everything=True)
    async with stage.models.running():
        stage.look()
        await soon()
        await unload(stage.models, "a")
        assert stage.models.wishes.said("a") is Word.UNLOAD
        await load(stage.models, "e")
        assert stage.states("a", "e") == ["loaded"] * 2
        assert stage.models.wishes.said("a") is None


async def test_a_model_that_is_reloaded_needs_no_reload_of_it():
    stage = Stage(spec("a"), of("a"), hosts={"a": {"load_s": 3}})
    async with stage.models.running():
        stage.look()
        gen = await load(stage.models, "e")
        stage.look(spec("a", print_="f2"))
        await soon(10)
        assert stage.of("a").spec.fingerprint == "f2"
        assert stage.of("e") is gen and gen.state is State.READY


def gives(*shape):
    return Loaded(outputs=(TensorSpec("y", "FP32", shape),))


def takes(*shape):
    return Loaded(inputs=(TensorSpec("x", "FP32", shape),))


async def test_a_model_that_comes_back_with_other_shapes_takes_it_out_until_they_fit():
    hosts = {"a": {"loaded": gives(-1, 4)}, "b": {"loaded": takes(-1, 4)}}
    stage = Stage(spec("a"), spec("b"), of("a", "b"), hosts=hosts)
    async with stage.models.running():
        stage.look()
        await load(stage.models, "e")
        stage.knobs["a"]["loaded"] = gives(-1, 5)
        stage.look(spec("a", print_="f2"))
        await soon()
        assert stage.state("e") == "failed"
        assert stage.error("e") == (
            "in ensemble 'e', the tensor '1' does not fit: output 'y' of step 'a' is FP32 [-1,5], and "
            "input 'x' of step 'b' is FP32 [-1,4]"
        )
        stage.knobs["b"]["loaded"] = takes(-1, 5)
        stage.look(spec("b", print_="f2"))
        await soon()
        assert stage.states("a", "b", "e") == ["loaded"] * 3


async def test_a_broken_model_fails_it_with_the_reason_and_it_heals_when_that_is_mended():
    hosts = {"a": {"load_error": OSError("bad weights")}}
    stage = Stage(spec("a"), of("a"), everything=True, hosts=hosts)
    async with stage.models.running():
        stage.look()
        await soon()
        assert stage.states("a", "e") == ["failed", "failed"]
        assert stage.error("e") == "in ensemble 'e', step 'a': OSError: bad weights"
        stage.knobs = {}
        stage.look(spec("a", print_="f2"))
        await soon()
        assert stage.states("a", "e") == ["loaded", "loaded"]


async def test_a_missing_model_fails_it_and_it_heals_when_that_comes():
    stage = Stage(of("a"))
    async with stage.models.running():
        stage.look()
        gen = await load(stage.models, "e")
        assert isinstance(gen.error, ComposingModelError)
        assert "step 'a': there is no such model in the repository" in str(gen.error)
        stage.look(spec("a"))
        await soon()
        assert stage.states("a", "e") == ["loaded", "loaded"]
        stage.look(gone=["a"])
        await soon()
        assert stage.states("e") == ["failed"]


async def test_ensembles_that_need_each_other_in_a_circle_fail():
    stage = Stage(of("f"), of("e", model="f"), of("f", model="g"), everything=True)
    async with stage.models.running():
        stage.look()
        await soon()
        assert stage.states("e", "f", "g") == ["failed"] * 3
        assert "in a circle" in stage.error("e")
        stage.look(spec("f", print_="f2"))
        await soon()
        assert stage.states("e", "f", "g") == ["loaded"] * 3


async def test_a_worker_that_dies_takes_it_out_of_service_until_another_serves():
    stage = Stage(spec("a"), of("a"), hosts={"a": {"load_s": 2}})
    async with stage.models.running():
        stage.look()
        first = await load(stage.models, "e")
        stage.made[-1][1].kill()
        await soon()
        assert stage.states("a", "e") == ["loading", "loading"]
        await soon(3)
        assert stage.states("a", "e") == ["loaded", "loaded"] and stage.of("e") is not first


async def test_memory_that_is_short_for_one_of_its_models_is_what_its_load_fails_with():
    stage = Stage(spec("a", n_bytes=60), spec("b", n_bytes=60), of("a", "b"), room_wait_s=2.0)
    async with stage.models.running():
        stage.look()
        gen = await load(stage.models, "e")
        error = of_generation(gen, gen.error)
        assert isinstance(error, NoRoomError) and error.needed == 60
        assert str(error).startswith("in ensemble 'e', step '")
        await soon()
        assert not stage.models.wishes.wants("e")


async def test_what_it_needs_is_not_driven_out_while_it_is_used():
    stage = Stage(spec("a", n_bytes=60), spec("big", n_bytes=60), of("a"), room_wait_s=1.0)
    async with stage.models.running():
        stage.look()
        gen = await load(stage.models, "e")
        with gen.lease():
            assert isinstance((await load(stage.models, "big")).error, NoRoomError)
        await soon(5)
        assert (await load(stage.models, "big")).state is State.READY
        await soon()
        assert stage.states("a", "e", "big") == ["unloaded", "unloaded", "loaded"]
        assert stage.models.away("e") == "its model 'a' was evicted"
        await unload(stage.models, "big")
        await load(stage.models, "a")
        await soon()
        assert stage.state("e") == "loaded"


async def test_what_a_pinned_one_needs_is_pinned_too():
    stage = Stage(spec("a", n_bytes=60), spec("big", n_bytes=60), of("a", pin=True))
    async with stage.models.running():
        stage.look()
        await load(stage.models, "e")
        await soon(5)
        assert stage.of("a").pinned
        assert isinstance((await load(stage.models, "big")).error, NoRoomError)
        stage.models.pin("e", False)
        assert not stage.of("a").pinned


async def test_a_request_that_waits_for_it_has_all_its_models_loaded():
    stage = Stage(
        spec("a", n_bytes=60), spec("b", n_bytes=40), spec("big", n_bytes=90), of("a", "b")
    )
    async with stage.models.running():
        stage.look()
        await load(stage.models, "big")
        await soon(10)
        leases = []
        await stage.models.wait_for("e", None, leases.append)
        assert stage.states("a", "b", "e", "big") == ["loaded"] * 3 + ["unloaded"]
        leases[0].end()


async def test_a_request_is_told_at_once_what_will_never_come():
    hosts = {"a": {"load_error": OSError("bad weights")}}
    stage = Stage(spec("a"), of("a"), hosts=hosts)
    async with stage.models.running():
        stage.look()
        waiter = stage.models.wait_for("e", None, lambda lease: None)
        with pytest.raises(Exception, match="in ensemble 'e'"):
            await waiter


async def test_its_models_sleep_and_wake_and_it_goes_and_comes_with_them():
    sleeper = Loaded(abilities=("sleep",))
    stage = Stage(spec("a"), of("a"), tier=100, hosts={"a": {"loaded": sleeper}})
    async with stage.models.running():
        stage.look()
        await load(stage.models, "e")
        for gen in stage.models.put_to_sleep("a"):
            await gen.rested.wait()
        await soon()
        assert stage.models.away("e") == "its model 'a' was put to sleep"
        assert stage.state("e") == "unloaded"
        await load(stage.models, "a")
        await soon()
        assert stage.states("a", "e") == ["loaded"] * 2


async def test_in_explicit_mode_one_that_is_named_brings_its_models():
    stage = Stage(spec("a"), spec("b"), of("a"))
    stage.models.wishes.named = frozenset({"e"})
    async with stage.models.running():
        stage.look()
        await soon()
        assert stage.states("a", "b", "e") == ["loaded", "unloaded", "loaded"]


async def test_a_config_that_cannot_work_fails_in_words():
    broken = EnsembleStep(model="a", inputs={"x": "in"}, outputs={})
    what = spec("e", 1, "f1", 0, ensemble=Ensemble(steps=(broken,)))
    stage = Stage(spec("a"), what)
    async with stage.models.running():
        stage.look()
        gen = await load(stage.models, "e")
        assert isinstance(gen.error, LoadFailedError)
        assert "step 'a' has no outputs" in str(gen.error)


async def test_a_forced_load_makes_a_new_one_of_it_alone():
    stage = Stage(spec("a"), of("a"))
    async with stage.models.running():
        stage.look()
        first = await load(stage.models, "e")
        a = stage.of("a")
        second = await load(stage.models, "e", force=True)
        assert second is not first and stage.of("a") is a
        assert second.trigger is Trigger.API


async def test_a_dry_run_tells_what_its_models_would_need():
    stage = Stage(spec("a", n_bytes=30), spec("b", n_bytes=40), of("a", "b"))
    async with stage.models.running():
        stage.look()
        await load(stage.models, "a")
        found = foresee(stage.models, stage.models.folders["e"])
        assert (found.would_load, found.bytes_needed, found.model) == (True, 40, "e")
        await load(stage.models, "e")
        assert not foresee(stage.models, stage.models.folders["e"]).would_load
