"""Which adapters a model has: the folder's, those by call, and who wins."""

from __future__ import annotations

import pytest

from repository.adapters.book import AdapterBook
from repository.adapters.sources import AdapterSource
from repository.errors import AdapterNotFoundError, AdapterRefusedError, ConflictError
from tests.adapters import source


def book(*sources: AdapterSource) -> AdapterBook:
    made = AdapterBook("m")
    made.follow({s.name: s for s in sources})
    return made


def elsewhere(name: str, print_: str = "call") -> AdapterSource:
    found = source(name, print_)
    return AdapterSource(
        name, found.path.parents[2] / "shared" / name, print_, found.files, found.facts
    )


def shown(of: AdapterBook) -> dict[str, tuple[str, str]]:
    return {n: (e.origin, e.source.fingerprint) for n, e in of.entries.items()}


def test_what_lies_in_the_folder_is_registered_followed_and_leaves_with_it() -> None:
    made = book(source("a"), source("b"))
    assert shown(made) == {"a": ("folder", "f1"), "b": ("folder", "f1")}
    assert not made.entries["a"].preload and made.entries["a"].src == "adapters/a"
    revision = made.revision
    same = {n: e.source for n, e in made.entries.items()}
    assert made.follow(same) == [] and made.revision == revision
    news = made.follow({"b": source("b", "f2"), "c": source("c")})
    assert {(n.what, n.name) for n in news} == {
        ("unregistered", "a"), ("updated", "b"), ("registered", "c"),
    }  # fmt: skip
    assert made.revision == revision + 1


def test_one_that_settles_is_not_registered() -> None:
    made = book(source("a", settling=True, facts=None), source("b"))
    assert list(made.entries) == ["b"] and made.settling == ("a",)


def test_a_name_that_is_taken_is_a_conflict_and_changes_nothing() -> None:
    made = book(source("a"))
    with pytest.raises(ConflictError, match="The adapter a already exists"):
        made.new(elsewhere("a"), "../shared/a")
    assert shown(made) == {"a": ("folder", "f1")}


def test_a_call_stays_when_the_folder_brings_the_same_name() -> None:
    made = book()
    made.put(made.new(elsewhere("a"), "../shared/a", pin=True, options={"x": "1"}))
    made.follow({"a": source("a")})
    assert shown(made) == {"a": ("call", "call")}
    made.follow({})
    assert shown(made) == {"a": ("call", "call")}
    with pytest.raises(AdapterNotFoundError, match="The adapter b has not been registered"):
        made.remove("b")
    made.remove("a")
    assert shown(made) == {}


def test_what_a_call_says_of_a_folders_adapter_outlives_its_files() -> None:
    made = book(source("a"))
    made.put(made.changed("a", pin=True, options={"x": "1"}))
    made.put(made.changed("a", options={"y": "2"}))
    made.follow({"a": source("a", "f2")})
    entry = made.entries["a"]
    assert (entry.pin, entry.preload, dict(entry.options)) == (True, True, {"x": "1", "y": "2"})
    assert (entry.origin, entry.source.fingerprint) == ("folder", "f2")
    made.put(made.changed("a", pin=False))
    assert not made.entries["a"].pin
    made.follow({})
    made.follow({"a": source("a")})
    assert not made.entries["a"].preload and made.entries["a"].options == {}


def test_a_call_can_swap_a_folders_adapter_for_another_and_back() -> None:
    made = book(source("a"))
    made.put(made.changed("a", source=elsewhere("a"), src="../shared/a"))
    assert shown(made) == {"a": ("call", "call")}
    made.follow({"a": source("a", "f2")})
    assert shown(made) == {"a": ("call", "call")}
    made.put(made.changed("a", source=source("a", "f2"), src="adapters/a"))
    assert shown(made) == {"a": ("folder", "f2")}
    made.follow({"a": source("a", "f3")})
    assert shown(made) == {"a": ("folder", "f3")}


def test_what_was_unregistered_stays_so_until_somebody_asks_or_its_folder_comes_anew() -> None:
    made = book(source("a"), source("b"))
    made.remove("a")
    made.remove("b")
    made.follow({"a": source("a", "f2"), "b": source("b")})
    assert shown(made) == {}
    made.put(made.new(source("a", "f2"), "adapters/a"))
    assert shown(made) == {"a": ("folder", "f2")}
    made.follow({"a": source("a", "f2")})
    made.follow({"a": source("a", "f2"), "b": source("b")})
    assert set(shown(made)) == {"a", "b"}


def test_a_pin_needs_a_preload() -> None:
    made = book(source("a"))
    for refused in (
        lambda: made.new(elsewhere("b"), "b", preload=False, pin=True),
        lambda: made.changed("a", preload=False, pin=True),
    ):
        with pytest.raises(AdapterRefusedError, match="preload to false and pin to true"):
            refused()
