"""Pins: by config, by call, and how far they are honoured. A device has 1 GiB, a model 300 MiB."""

import pytest

from repository.lifecycle.generation import Trigger
from repository.lifecycle.ledger import MemoryLedger
from repository.lifecycle.pins import Pins
from repository.lifecycle.states import State
from tests.fakes.heart import at, folder, folders, load, reconciler, resident, settled, spec
from tests.fakes.host import FakeHost

MIB, GIB = 1 << 20, 1 << 30


def honoured(pins, gens):
    refused = pins.honour(gens, {d: MemoryLedger(d, GIB) for d in ("cpu", "cuda:0")})
    return [str(g) for g in gens if g.pinned], [str(g) for g in refused]


def test_the_config_pins_until_somebody_says_otherwise():
    notes = []
    pins = Pins(note=lambda *said: notes.append(said))
    a, b = resident("a", 300 * MIB, 1, pin=True), resident("b", 300 * MIB, 2)
    assert honoured(pins, [a, b]) == (["a:1#1"], [])
    pins.say("a", False)
    pins.say("b", True)
    assert honoured(pins, [a, b]) == (["b:1#2"], [])
    pins.forget("a")
    pins.forget("c")
    assert honoured(pins, [a, b]) == (["a:1#1", "b:1#2"], [])
    assert notes == [("a", False), ("b", True), ("a", None)]


def test_what_exceeds_the_cap_is_not_pinned_and_says_why():
    pins = Pins({"": 0.5})
    gens = [resident(name, 300 * MIB, n, pin=True) for n, name in enumerate("ab", 1)]
    assert honoured(pins, gens) == (["a:1#1"], ["b:1#2"])
    assert "512MiB of cpu (--pin-cap), 212MiB of it are left" in gens[1].pin_refused
    assert honoured(pins, gens)[1] == []  # it is said once


def test_the_next_is_pinned_when_the_first_leaves():
    pins = Pins({"": 0.5})
    gens = [resident(name, 300 * MIB, n, pin=True) for n, name in enumerate("ab", 1)]
    honoured(pins, gens)
    gens[0].retire("unload")
    assert honoured(pins, gens) == (["b:1#2"], []) and not gens[1].pin_refused


def test_each_device_has_a_cap_of_its_own():
    pins = Pins({"cuda:0": 0.0, "": 1.0})
    here, there = resident("a", 300 * MIB, 1, pin=True), resident("b", 300 * MIB, 2, pin=True)
    at("cuda:0", here)
    assert honoured(pins, [here, there]) == (["b:1#2"], ["a:1#1"])


def test_a_reload_takes_the_pin_over_without_counting_twice():
    pins = Pins({"": 0.5})
    old, new = resident("a", 300 * MIB, 1, pin=True), resident("a", 300 * MIB, 2, pin=True)
    assert honoured(pins, [old, new]) == (["a:1#2"], [])


def hosts(what):
    return FakeHost(load_s=1.0)


@pytest.mark.looptime
async def test_a_pin_by_call_protects_at_once_and_for_all_that_comes_of_the_model():
    models = reconciler(hosts, 1 * GIB, room_wait_s=5, devices=["cpu"])
    sized = [spec(name, n_bytes=700 * MIB) for name in "ab"]
    async with models.running():
        models.observe(folders(*sized))
        await load(models, "a")
        models.pin("a", True)
        assert (await load(models, "b")).state is State.FAILED
        models.observe(folders(spec("a", 1, "f2", 400 * MIB), sized[1]))
        again = await load(models, "a")
        assert again.pinned and again.spec.fingerprint == "f2"
        models.pin("a", False)
        assert not again.pinned
        await load(models, "b")
        assert models.routes.find("a") is None


@pytest.mark.looptime
async def test_a_pin_by_call_ends_with_its_folder():
    models = reconciler(hosts, GIB)
    async with models.running():
        models.observe(folders(spec("a")))
        models.pin("a", True)
        models.observe({})
        models.observe(folders(spec("a")))
        assert not (await load(models, "a")).pinned


@pytest.mark.looptime
async def test_one_beyond_the_cap_is_loaded_told_of_and_driven_out_like_any_other():
    models = reconciler(hosts, GIB, pins=Pins({"": 0.5}))
    names = "abc"
    with models.events.subscribe() as told:
        async with models.running():
            models.observe(folders(*[spec(n, n_bytes=300 * MIB, pin=True) for n in names]))
            for name in names:
                await settled(models.want(name, trigger=Trigger.API))
            assert [models.routes.find(n).pinned for n in names] == [True, False, False]
            models.observe({**models.folders, "d": folder(spec("d", n_bytes=300 * MIB))})
            await load(models, "d")
            assert models.routes.find("a") and not models.routes.find("b")
        models.events.close()
        kinds = [event.kind async for event in told]
    assert kinds.count("model.pin_refused") == 2
