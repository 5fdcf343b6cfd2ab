"""Adapters from the book to the hosts: before READY, while it serves, by call. In virtual time."""

import asyncio

import pytest

from repository.adapters.book import AdapterBook
from repository.adapters.orders import AdapterReport
from repository.adapting.counts import Counts
from repository.adapting.fitting import Fitting
from repository.errors import (
    AdapterNotFoundError,
    AdapterRefusedError,
    ConflictError,
    InvalidNameError,
    ModelNotFoundError,
    NoAdapterSlotError,
)
from repository.events import EventBus
from repository.lifecycle.states import State
from repository.messages import Loaded
from tests.adapters import source
from tests.fakes.adapting import AdaptingHost, Calls
from tests.fakes.heart import load
from tests.fakes.host import FakeHost

pytestmark = pytest.mark.looptime


def told(calls):
    """What was said on the bus of adapters."""
    return [
        (e.kind.removeprefix("adapter."), e.data["adapter"])
        for e in calls.shelf.events._kept
        if e.kind.startswith("adapter.")
    ]


async def test_what_lies_there_is_applied_before_the_model_is_ready(tmp_path):
    calls = Calls(tmp_path)
    calls.make = lambda: AdaptingHost(load_s=1, adapt_s=5)
    async with calls.models.running():
        calls.drop(source("a"), source("b"))
        await asyncio.sleep(4)
        assert calls.states() == {"a": "loading", "b": "loading"}
        await asyncio.sleep(3)
        assert calls.serving().state is State.READY
        assert calls.hosts[0].has == {"a": "f1", "b": "f1"}
        assert calls.states() == {"a": "loaded", "b": "loaded"}
        assert told(calls) == [("registered", "a"), ("registered", "b")]


async def test_what_changes_in_the_folder_is_swapped_added_and_removed_while_it_serves(tmp_path):
    calls = Calls(tmp_path)
    async with calls.models.running():
        calls.drop(source("a"), source("b"))
        await asyncio.sleep(1)
        gen, (host,) = calls.serving(), calls.hosts
        calls.drop(source("b", "f2"), source("c"))
        await asyncio.sleep(1)
        assert host.has == {"b": "f2", "c": "f1"} and calls.serving() is gen
        assert [o.name for o in host.orders] == ["a", "b", "a", "b", "c"]
        assert told(calls)[2:] == [("unregistered", "a"), ("updated", "b"), ("registered", "c")]


async def test_one_that_the_host_refuses_is_failed_with_the_reason_and_hurts_nobody(tmp_path):
    calls = Calls(tmp_path)
    calls.make = lambda: AdaptingHost(refuses=["bad"])
    async with calls.models.running():
        calls.drop(source("a"), source("b", "bad"))
        await asyncio.sleep(1)
        assert calls.states() == {"a": "loaded", "b": "failed"}
        view = calls.adapters("m")[1]
        assert view.error == "no tensor matches a layer" and view.failures == 1
        assert ("failed", "b") in told(calls)
        with pytest.raises(AdapterRefusedError, match="no tensor matches"):
            calls.serving().fitting.check("b")
        calls.drop(source("a", "bad"), source("b", "bad"))
        await asyncio.sleep(1)
        assert calls.states() == {"a": "loaded", "b": "failed"}
        assert calls.hosts[0].has == {"a": "f1"} and len(calls.hosts[0].orders) == 3
        assert calls.adapters("m")[0].error == "no tensor matches a layer"
        calls.drop(source("a", "f1"), source("b", "f9"))
        await asyncio.sleep(1)
        assert [v.error for v in calls.adapters("m")] == ["", ""]


async def test_a_new_generation_has_all_of_them_before_it_is_ready(tmp_path):
    calls = Calls(tmp_path)
    async with calls.models.running():
        calls.drop(source("a"))
        await asyncio.sleep(1)
        await calls.register_adapter("m", "b", "elsewhere", pin=True)
        calls.make = lambda: AdaptingHost(load_s=1, adapt_s=1)
        calls.drop(source("a"), print_="f2")
        await asyncio.sleep(1.5)
        await calls.register_adapter("m", "c", "late")
        await asyncio.sleep(5)
        assert calls.hosts[1].has == {"a": "f1", "b": "elsewhere", "c": "late"}
        assert calls.hosts[1].applied["b"].pin and calls.serving().spec.fingerprint == "f2"


async def test_register_returns_once_every_ready_generation_has_it(tmp_path, looptime):
    calls = Calls(tmp_path)
    calls.make = lambda: AdaptingHost(adapt_s=2)
    async with calls.models.running():
        calls.drop()
        await asyncio.sleep(1)
        view = await calls.register_adapter("m", "a", "x", options={"k": "v"})
        assert calls.hosts[0].has == {"a": "x"}
        assert (view.state, view.origin, view.src, view.preload) == ("loaded", "call", "x", True)
        assert view.options == {"k": "v"} and (view.rank, view.bytes) == (4, 256)
        calls.serving().fitting.check("a")
        now = (await calls.adapters_now("m"))[0]
        assert now.residence == "host"  # the host takes 2 s to say where it is: too long
        await calls.unregister_adapter("m", "a")
        assert calls.hosts[0].has == {} and calls.adapters("m") == []


async def test_where_nothing_runs_a_registration_waits_for_the_next_generation(tmp_path):
    calls = Calls(tmp_path)
    async with calls.models.running():
        calls.drop()
        calls.models.unwant("m")
        await asyncio.sleep(1)
        assert (await calls.register_adapter("m", "a", "x")).state == "registered"
        with pytest.raises(AdapterRefusedError, match="its header lies"):
            await calls.register_adapter("m", "b", "bad")
        with pytest.raises(ModelNotFoundError):
            await calls.register_adapter("nobody", "b", "x")
        with pytest.raises(InvalidNameError):
            await calls.register_adapter("m", "a/b", "x")
        await load(calls.models, "m")
        assert calls.hosts[-1].has == {"a": "x"}


async def test_after_any_error_nothing_has_changed(tmp_path):
    calls = Calls(tmp_path)
    calls.make = lambda: AdaptingHost(refuses=["misfit"])
    async with calls.models.running():
        calls.drop(source("a"))
        await asyncio.sleep(1)
        (host,) = calls.hosts
        before = calls.adapters("m")
        for error, call in (
            (ConflictError, calls.register_adapter("m", "a", "x")),
            (AdapterRefusedError, calls.register_adapter("m", "b", "misfit")),
            (AdapterRefusedError, calls.register_adapter("m", "b", "bad")),
            (AdapterRefusedError, calls.register_adapter("m", "b", "x", preload=False, pin=True)),
            (AdapterRefusedError, calls.update_adapter("m", "a", src="misfit")),
            (AdapterNotFoundError, calls.update_adapter("m", "b", pin=True)),
            (AdapterNotFoundError, calls.unregister_adapter("m", "b")),
        ):
            with pytest.raises(error):
                await call
            assert host.has == {"a": "f1"}
            assert calls.adapters("m")[0].error == ""
        assert [v.name for v in before] == [v.name for v in calls.adapters("m")]
        await calls.update_adapter("m", "a", src="good", pin=True)
        assert host.has == {"a": "good"} and host.applied["a"].pin


async def test_two_versions_serve_and_one_that_refuses_costs_the_other_nothing(tmp_path):
    calls = Calls(tmp_path)
    async with calls.models.running():
        refused = iter([[], ["x"]])
        calls.make = lambda: AdaptingHost(refuses=next(refused))
        calls.drop(source("b"), versions=(1, 2))
        await asyncio.sleep(1)
        with pytest.raises(AdapterRefusedError, match="no tensor"):
            await calls.register_adapter("m", "a", "x")
        with pytest.raises(AdapterRefusedError, match="no tensor"):
            await calls.update_adapter("m", "b", src="x")
        assert [h.has for h in calls.hosts] == [{"b": "f1"}, {"b": "f1"}]
        assert calls.hosts[0].applied["b"].path == str(source("b").path)
        await calls.register_adapter("m", "a", "y")
        assert [h.has for h in calls.hosts] == [{"b": "f1", "a": "y"}, {"b": "f1", "a": "y"}]


async def test_two_admins_take_turns_and_one_hears_of_the_other(tmp_path):
    calls = Calls(tmp_path)
    calls.make = lambda: AdaptingHost(adapt_s=1)
    async with calls.models.running():
        calls.drop()
        await asyncio.sleep(1)
        ends = await asyncio.gather(
            *[calls.register_adapter("m", "a", src) for src in ("x", "y")], return_exceptions=True
        )
        assert ends[0].src == "x" and isinstance(ends[1], ConflictError)
        assert calls.hosts[0].has == {"a": "x"}
        leaving = asyncio.create_task(calls.register_adapter("m", "b", "z"))
        await asyncio.sleep(0.5)
        leaving.cancel()
        await asyncio.sleep(5)
        assert calls.hosts[0].has == {"a": "x", "b": "z"} and set(calls.states()) == {"a", "b"}


async def test_a_host_that_dies_meanwhile_ends_nothing_but_itself(tmp_path):
    calls = Calls(tmp_path)
    calls.make = lambda: AdaptingHost(adapt_s=10)
    async with calls.models.running():
        calls.drop()
        await asyncio.sleep(1)
        registering = asyncio.create_task(calls.register_adapter("m", "a", "x"))
        await asyncio.sleep(1)
        calls.hosts[0].kill()
        assert (await registering).state in ("registered", "loading")
        await asyncio.sleep(60)
        assert calls.hosts[1].has == {"a": "x"} and calls.states() == {"a": "loaded"}


async def test_a_host_that_takes_for_ever_is_given_up_on(tmp_path):
    calls = Calls(tmp_path, load_timeout_s=30)
    async with calls.models.running():
        calls.drop()
        await asyncio.sleep(1)
        calls.hosts[0].adapt_s = 10_000
        with pytest.raises(AdapterRefusedError, match="had not taken it after 30 s"):
            await calls.register_adapter("m", "a", "x")
        assert calls.adapters("m") == [] and calls.serving().state is State.READY


async def test_a_model_that_takes_none_says_so(tmp_path):
    calls = Calls(tmp_path)
    calls.make = lambda: AdaptingHost(loaded=Loaded())
    async with calls.models.running():
        calls.drop(source("a"))
        await asyncio.sleep(1)
        assert calls.states() == {"a": "failed"} and calls.serving().fitting is None
        assert "takes no adapters (backend 'fake')" in calls.adapters("m")[0].error
        with pytest.raises(AdapterRefusedError, match="takes no adapters"):
            await calls.register_adapter("m", "b", "x")


async def test_every_pin_needs_a_slot(tmp_path):
    calls = Calls(tmp_path)
    async with calls.models.running():
        calls.drop()
        await asyncio.sleep(1)
        for i in range(8):
            await calls.register_adapter("m", f"a{i}", "x", pin=True)
        with pytest.raises(NoAdapterSlotError, match="all 8 adapter slots of 'm' are pinned"):
            await calls.register_adapter("m", "b", "x", pin=True)
        await calls.update_adapter("m", "a0", pin=False)
        await calls.register_adapter("m", "b", "x", pin=True)


async def test_names_of_models_and_adapters_resolve(tmp_path):
    calls = Calls(tmp_path)
    async with calls.models.running():
        calls.drop(source("a"), source("m"), source("both"))
        calls.drop(source("both"), model="n")
        assert calls.resolve("m") == ("m", "") and calls.resolve("a") == ("m", "a")
        assert calls.resolve("m:b") == ("m", "b")
        with pytest.raises(ModelNotFoundError, match=r"2 models .* \(m:both, n:both\)"):
            calls.resolve("both")
        for unknown in ("z", "z:a", ":a", "", "n:"):
            with pytest.raises(ModelNotFoundError):
                calls.resolve(unknown)


async def test_a_model_that_is_gone_takes_its_book_along(tmp_path):
    calls = Calls(tmp_path)
    async with calls.models.running():
        calls.drop(source("a"))
        await asyncio.sleep(1)
        calls.specs.clear()
        calls.look()
        await asyncio.sleep(60)
        assert not calls.shelf._books and not calls.shelf._fittings and not calls.shelf._counts


async def test_an_adapter_that_went_back_to_the_disk_is_shown_there():
    book = AdapterBook("m")
    book.follow({"a": source("a"), "b": source("b")})
    host = FakeHost()
    fitting = Fitting(host, book, Counts(), EventBus(), label="m", limit_s=10)
    await fitting.sync()
    assert {r.residence for r in fitting.where.values()} == {"host"}

    async def adapt(orders):  # a worker names those that are in some memory
        return [AdapterReport("a", residence="device")]

    host.adapt = adapt
    await fitting.look(1)
    assert {n: r.residence for n, r in fitting.where.items()} == {"a": "device", "b": "registered"}
