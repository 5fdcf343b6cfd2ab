"""What DJL's addresses, parameters and page tokens mean, whatever is sent."""

from __future__ import annotations

import random
from urllib.parse import quote, urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repository.errors import (
    AdapterNotFoundError,
    AdapterRefusedError,
    ConflictError,
    InvalidNameError,
    InvalidRequestError,
    ModelNotFoundError,
    NoAdapterSlotError,
    UnsupportedSourceError,
)
from repository.names import check_adapter_name
from repository.reports import AdapterView
from server import errors
from server.codecs import djl_calls as calls
from server.codecs.djl_adapters import last_of, page, token_of
from server.codecs.djl_errors import body_djl
from server.codecs.djl_paths import folded, unfolded

names = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.+@=-]{0,20}", fullmatch=True).filter(
    lambda name: name != "adapters"
)
models = st.lists(st.sampled_from(["a", "adapters", "update", "x.y", "a%2Fb", "é"]), min_size=1)

# path -> the model that it names, and what follows it
PATHS = {
    "/models/m/adapters": ("m", "/adapters"),
    "/models/m/adapters/a1": ("m", "/adapters/a1"),
    "/models/m/adapters/a1/update": ("m", "/adapters/a1/update"),
    "/models/m/adapters/update": ("m", "/adapters/update"),
    "/models/m/adapters/update/update": ("m", "/adapters/update/update"),
    "/models/org/name/adapters/a1": ("org/name", "/adapters/a1"),
    "/models/adapters/adapters": ("adapters", "/adapters"),
    "/models/a/adapters/adapters": ("a/adapters", "/adapters"),
    "/models/a/adapters/adapters/update": ("a/adapters", "/adapters/update"),
    "/models/a/adapters/b/adapters/c/update": ("a/adapters/b", "/adapters/c/update"),
    "/models/a%2Fb/adapters": ("a%2Fb", "/adapters"),
    "/models/a\nb/adapters": ("a\nb", "/adapters"),
    "/models/\ud800/adapters": ("\ud800", "/adapters"),
}
OTHERS = ["/", "/models", "/models/m", "/models/adapters", "/models/m/adapters/a/b", "/adapters/a1",
          "/models/m/adapters/a1/update/now", "/v2/models/m/adapters", "/models//adapters"]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_a_models_name_ends_at_the_last_adapters(path: str) -> None:
    model, rest = PATHS[path]
    found = folded(path)
    assert found.endswith(rest)
    segment = found.removeprefix("/models/").removesuffix(rest)
    assert "/" not in segment and unfolded(segment) == model


@pytest.mark.parametrize("path", OTHERS)
def test_other_paths_are_left_as_they_are(path: str) -> None:
    assert folded(path) == path


@given(models, names, st.sampled_from(["", "/{}", "/{}/update"]))
def test_no_name_is_read_in_two_ways(segments: list[str], name: str, tail: str) -> None:
    model, rest = "/".join(segments), "/adapters" + tail.format(name)
    found = folded(f"/models/{model}{rest}")
    assert found == f"/models/{quote(model, safe='')}{rest}"
    assert unfolded(found.removeprefix("/models/").removesuffix(rest)) == model


def test_no_adapter_can_be_called_as_the_addresses_are() -> None:
    with pytest.raises(InvalidNameError, match="own addresses"):
        check_adapter_name("adapters")
    assert check_adapter_name("update") == "update"


# parameters ---------------------------------------------------------------------------------------


def test_the_query_wins_over_the_body_and_all_become_texts() -> None:
    body = {"name": "b", "src": "s", "pin": True, "alpha": 1.5, "n": 3, "none": None, "x": ""}
    found = calls.said(b"name=a+1&pin=FALSE&y=%C3%A9", body)
    assert found == {
        "name": "a 1", "src": "s", "pin": "FALSE", "alpha": "1.5", "n": "3", "x": "", "y": "é"
    }  # fmt: skip
    assert calls.options(found) == {"alpha": "1.5", "n": "3", "x": "", "y": "é"}
    assert calls.truth(found, "pin") is False and calls.truth(found, "preload") is None


@pytest.mark.parametrize(
    ("query", "body", "why"),
    [
        (b"a=1&a=1", {}, "'a' is there twice"),
        (b"name=1&src=2&name=", {}, "'name' is there twice"),
        (b"", {"name": 5}, "'name' must be a text"),
        (b"", {"src": True}, "'src' must be a text"),
        (b"", {"pin": []}, "'pin' must be a text, a number or true or false"),
        (b"", {"x": {}}, "'x' must be"),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(query: bytes, body: object, why: str) -> None:
    with pytest.raises(InvalidRequestError, match=why):
        calls.said(query, body)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["", "yes", "1", "truee", "\u0130"])
def test_a_boolean_is_true_or_false(value: str) -> None:
    with pytest.raises(InvalidRequestError, match="'pin' must be true or false, not"):
        calls.truth({"pin": value}, "pin")
    assert [calls.truth({"pin": w}, "pin") for w in ("True", "fAlse")] == [True, False]


@pytest.mark.parametrize("value", ["abc", "1.5", "--1", "-", "\u0663", "1e3", "9" * 30, " 1"])
def test_a_number_is_a_whole_number(value: str) -> None:
    with pytest.raises(InvalidRequestError, match="'limit' must be a whole number"):
        calls.number({"limit": value}, "limit")
    assert [calls.number(f, "limit") for f in ({"limit": "-7"}, {"limit": ""}, {})] == [
        -7,
        None,
        None,
    ]


@given(st.dictionaries(st.text(), st.text()))
def test_every_text_that_a_query_can_say_is_read(said: dict[str, str]) -> None:
    assert calls.said(urlencode(said).encode()) == said


@given(st.binary())
def test_no_query_is_more_than_refused(query: bytes) -> None:
    try:
        found = calls.said(query)
        calls.number(found, "limit")
        page([], None, found.get("next_page_token", ""))
    except InvalidRequestError:
        pass


# pages --------------------------------------------------------------------------------------------


def views(of: set[str]) -> list[AdapterView]:
    return [AdapterView(name, f"adapters/{name}", "loaded") for name in sorted(of)]


@pytest.mark.parametrize(
    ("limit", "size"),
    [(None, 100), (0, 100), (-1, 100), (101, 100), (10**17, 100), (1, 1), (100, 100)],
)
def test_a_page_has_between_one_and_a_hundred(limit: int | None, size: int) -> None:
    many = views({f"a{i}" for i in range(150)})
    found = page(many, limit, "0")
    assert (
        len(found.adapters) == size and last_of(str(found.next_page_token)) == many[size - 1].name
    )
    assert not page(many[:size], limit, "").next_page_token


@given(names)
def test_a_token_is_the_name_of_whoever_was_last(name: str) -> None:
    token = token_of(name)
    assert last_of(token) == name and token.replace("-", "").replace("_", "").isalnum()


@given(st.text() | st.from_regex(r"[A-Za-z0-9_-]{1,40}", fullmatch=True))
def test_a_token_that_no_list_gave_is_refused(token: str) -> None:
    with pytest.raises(InvalidRequestError, match="begin again"):
        last_of(token)


@pytest.mark.parametrize("change", ["=", "A", "\n", " "])
def test_a_token_is_taken_in_one_spelling_only(change: str) -> None:
    with pytest.raises(InvalidRequestError):
        last_of(token_of("a1") + change)


@given(st.integers(), st.integers(1, 7))
def test_whoever_stays_is_on_one_page_whatever_comes_and_goes(seed: int, limit: int) -> None:
    chance = random.Random(seed)
    pool = [f"n{i:02}" for i in range(40)]
    there = set(chance.sample(pool, 25))
    stayed, seen, token = set(there), list[str](), ""
    while True:
        found = page(views(there), limit, token)
        seen += [entry.name for entry in found.adapters]
        if not found.next_page_token:
            break
        token = str(found.next_page_token)
        there ^= set(chance.sample(pool, chance.randrange(6)))
        stayed &= there
    assert seen == sorted(set(seen)) and stayed <= set(seen)


# errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (ModelNotFoundError("m"), 404, "NotFoundException"),
        (InvalidRequestError("r"), 400, "BadRequestException"),
        (InvalidNameError("n"), 400, "BadRequestException"),
        (errors.UnauthorizedError("k"), 401, "UnauthorizedException"),
        (errors.ForbiddenError("k"), 403, "ForbiddenException"),
        (errors.WrongVerbError("GET"), 405, "MethodNotAllowedException"),
        (ConflictError("c"), 409, "ConflictException"),
        (UnsupportedSourceError("u"), 409, "ConflictException"),
        (errors.PayloadTooLargeError("p"), 413, "BadRequestException"),
        (AdapterNotFoundError("a"), 424, "FailedDependencyException"),
        (AdapterRefusedError("a"), 424, "FailedDependencyException"),
        (NoAdapterSlotError("s"), 507, "InsufficientCapacityException"),
        (ZeroDivisionError("x"), 500, "InternalServerException"),
    ],
)
def test_an_error_has_its_number_twice_and_its_type(
    error: Exception, status: int, kind: str
) -> None:
    message = errors.text_of(error)
    assert body_djl(error) == (status, {"code": status, "type": kind, "message": message})
