"""What was said of adapters by call outlives the server, or has not been said."""

from __future__ import annotations

import asyncio

import pytest

from repository.adapters.book import AWAY, AdapterBook
from repository.adapting import keeping
from repository.adapting.shelf import Shelf
from repository.errors import NotKeptError
from repository.reports import Options
from tests.adapters import source, write_adapter
from tests.fakes.adapting import AdaptingHost, Calls
from tests.fakes.journal import opened


def noted(*sources):
    notes = []
    book = AdapterBook("m", lambda name, said: notes.append((name, said)))
    book.follow({s.name: s for s in sources})
    return book, notes


def test_only_what_is_said_by_call_is_noted():
    book, notes = noted(source("a"), source("b"))
    book.follow({"a": source("a", "f2"), "c": source("c")})
    assert notes == []
    pinned = book.changed("a", pin=True)
    book.put(pinned)
    book.remove("c")
    far = book.new(source("d"), "elsewhere")
    book.put(far)
    book.remove("d")
    assert notes == [("a", pinned), ("c", AWAY), ("d", far), ("d", None)]


def test_what_was_said_of_one_in_the_folder_goes_with_it_and_is_noted_so():
    book, notes = noted(source("a"), source("b"))
    book.put(book.changed("a", pin=True))
    book.remove("b")
    del notes[:]
    book.follow({})
    assert sorted(notes) == [("a", None), ("b", None)]


def test_what_is_recalled_waits_for_the_folder_and_is_not_noted_again():
    first, said = noted(source("a"), source("b"), source("c"))
    pinned = first.changed("a", pin=True, options={"k": "v"})
    far = first.new(source("d"), "elsewhere")
    book, notes = noted()
    for name, what in (("a", pinned), ("b", AWAY), ("d", far)):
        book.recall(name, what)
    assert list(book.entries) == ["d"]
    book.follow({s.name: s for s in (source("a", "f9"), source("b"), source("c"))})
    assert sorted(book.entries) == ["a", "c", "d"]
    assert book.entries["a"].pin and book.entries["a"].options == {"k": "v"}
    assert book.entries["a"].source.fingerprint == "f9"
    assert notes == [] and said == []


def test_what_was_recalled_of_the_folder_and_is_gone_from_it_counts_no_more():
    first, _ = noted(source("a"))
    book, notes = noted()
    book.recall("a", first.changed("a", pin=True))
    book.recall("b", AWAY)
    book.follow({"c": source("c")})
    assert sorted(notes) == [("a", None), ("b", None)]
    book.follow({s.name: s for s in (source("a"), source("b"))})
    assert sorted(book.entries) == ["a", "b"] and not book.entries["a"].pin


def test_a_model_that_is_gone_takes_all_that_was_said_with_it():
    notes = []
    shelf = Shelf(note=lambda *note: notes.append(note))
    shelf.follow("m", {s.name: s for s in (source("a"), source("b"))})
    book = shelf.book("m")
    book.put(book.changed("a", pin=True))
    book.remove("b")
    book.put(book.new(source("c"), "elsewhere"))
    del notes[:]
    shelf.forget("m")
    assert sorted(notes) == [("m", "a", None), ("m", "b", None), ("m", "c", None)]


@pytest.mark.looptime
async def test_a_registration_that_cannot_be_kept_is_taken_back(tmp_path):
    calls = Calls(tmp_path)
    calls.make = lambda: AdaptingHost(adapt_s=0.5)
    notes = []
    calls.shelf._note = lambda *note: notes.append(note)
    full = False

    async def kept():
        await asyncio.sleep(1)
        if full:
            raise NotKeptError("the disk is full")

    calls._desk._kept = kept
    async with calls.models.running():
        calls.drop(source("a"), source("z"))
        await asyncio.sleep(5)
        (host,) = calls.hosts
        await calls.unregister_adapter("m", "z")
        full = True
        with pytest.raises(NotKeptError, match="'b' was not registered: the disk is full"):
            await calls.register_adapter("m", "b", "x")
        with pytest.raises(NotKeptError, match="'z' was not registered"):
            await calls.register_adapter("m", "z", "x")
        with pytest.raises(NotKeptError, match="'a' was not changed"):
            await calls.update_adapter("m", "a", src="other", pin=True)
        assert host.has == {"a": "f1"} and calls.states() == {"a": "loaded"}
        assert [(n, s) for _, n, s in notes[-6:] if s in (AWAY, None)] == [
            ("b", None), ("z", AWAY), ("a", None),
        ]  # fmt: skip
        with pytest.raises(NotKeptError, match="'a' is unregistered, but may be there again"):
            await calls.unregister_adapter("m", "a")
        assert host.has == {} and calls.states() == {}
        full = False
        await calls.register_adapter("m", "b", "x")
        assert host.has == {"b": "x"}


@pytest.mark.looptime
async def test_nothing_is_kept_of_a_turn_that_is_over(tmp_path):
    calls = Calls(tmp_path)
    async with calls.models.running():
        calls.drop()
        await asyncio.sleep(1)
        await asyncio.gather(*(calls.register_adapter("m", f"a{n}", "x") for n in range(5)))
        assert len(calls.adapters("m")) == 5 and len(calls._desk._turns) == 0


async def test_what_comes_back_is_looked_at_under_the_rules_of_now(tmp_path):
    """In its place, in an allowed root, gone, no longer allowed, broken: each is there."""
    root, allowed, state = tmp_path / "models", tmp_path / "allowed", tmp_path / "state"
    (root / "m" / "adapters").mkdir(parents=True)
    for place in (root / "m/adapters/own", root / "shared/one", allowed / "far", allowed / "gone"):
        write_adapter(place)

    async with opened(state) as journal:
        options = Options(root, allowed_roots=(allowed,))
        shelf = Shelf(note=lambda *note: keeping.note(journal, *note))
        book = shelf.book("m")
        for name, path, src in (
            ("own", root / "m/adapters/own", "adapters/own"),
            ("one", root / "shared/one", "../shared/one"),
            ("far", allowed / "far", "allowed/far"),
            ("gone", allowed / "gone", "allowed/gone"),
        ):
            kept = book.new(source(name, path=path), src, pin=name == "far", options={"n": name})
            book.put(kept)
        await journal.kept()

    def names(shelf):
        return {n: e.source.problem for n, e in shelf.entries("m").items()}

    async def recalled(root, options):
        shelf = Shelf()
        async with opened(state) as journal:
            for one in keeping.recalled(journal.adapters, lambda model: root / model, options):
                shelf.recall(*one)
        return shelf

    for file in (allowed / "gone").iterdir():
        file.unlink()
    (allowed / "gone").rmdir()
    shelf = await recalled(root, options)
    assert names(shelf) == {
        "own": "", "one": "", "far": "", "gone": "there is no folder 'allowed/gone'",
    }  # fmt: skip
    far = shelf.entries("m")["far"]
    assert far.pin and far.preload and far.options == {"n": "far"} and far.src == "allowed/far"
    assert far.usable and not shelf.entries("m")["gone"].usable

    shelf = await recalled(root, Options(root))  # the root is not allowed any more
    assert "lies outside of the model's folder" in names(shelf)["far"]
    assert str(tmp_path) not in str(names(shelf))

    moved = root.rename(tmp_path / "moved")
    shelf = await recalled(moved, Options(moved, allowed_roots=(allowed,)))
    assert [names(shelf)[name] for name in ("own", "one", "far")] == ["", "", ""]
