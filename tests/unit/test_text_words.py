"""Text as it is written: whole characters, nothing of a stop string, however it is cut."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repository.backends.text.words import FARTHEST, UNKNOWN, Letters, Stops

TEXTS = st.text(alphabet="abc\n🦊é", max_size=30)
STOPS = st.lists(st.text(alphabet="abc\n🦊é", min_size=1, max_size=4), max_size=4)


def of_bytes(tokens: Sequence[int]) -> str:
    """A tokenizer whose tokens are bytes."""
    return bytes(tokens).decode(errors="replace")


def of_words(tokens: Sequence[int]) -> str:
    """One that gives its first word no space, as sentencepiece's do; 0 is special, and not shown."""
    return " ".join(f"w{token}" for token in tokens if token)


def of_runs(tokens: Sequence[int]) -> str:
    """One that makes nothing of a whole run of bytes if any of them is wrong (byte fallback)."""
    try:
        return bytes(tokens).decode()
    except UnicodeDecodeError:
        return UNKNOWN * len(tokens)


def pieces(text: str, cuts: list[int]) -> list[str]:
    at = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in itertools.pairwise(at)]


def first_end(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Letter by letter: the answer ends when it ends with a stop string."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(TEXTS, STOPS, st.lists(st.integers(0, 99), max_size=8))
def test_a_stop_string_ends_the_text_before_it_however_the_text_is_cut(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    watch = Stops(stops)
    shown = "".join(watch.push(piece) for piece in pieces(text, cuts)) + watch.rest()
    assert (shown, watch.found) == first_end(text, stops)


@given(TEXTS, STOPS, st.lists(st.integers(0, 99), max_size=8))
def test_what_was_shown_is_never_taken_back(text: str, stops: list[str], cuts: list[int]) -> None:
    watch, shown = Stops(stops), ""
    wanted, _ = first_end(text, stops)
    for piece in pieces(text, cuts):
        shown += watch.push(piece)
        assert wanted.startswith(shown)


def test_what_may_become_a_stop_string_is_held_back_and_comes_when_it_does_not() -> None:
    watch = Stops(["END"])
    assert [watch.push(piece) for piece in ("a E", "N", "d E")] == ["a ", "", "ENd "]
    assert watch.rest() == "E"


@given(st.binary(max_size=60))
def test_any_bytes_come_out_as_the_decoder_writes_them_all(data: bytes) -> None:
    letters = Letters(of_bytes)
    said = "".join(letters.push(byte) for byte in data) + letters.rest()
    assert said == of_bytes(data)


@given(st.text(max_size=30))
def test_only_whole_characters_are_shown(text: str) -> None:
    for decode in (of_bytes, of_runs):
        letters, said = Letters(decode), ""
        for byte in text.encode():
            said += letters.push(byte)
            assert text.startswith(said)
        assert said + letters.rest() == text


def test_the_bytes_of_an_emoji_are_held_back_until_it_is_whole() -> None:
    letters = Letters(of_bytes)
    assert [letters.push(byte) for byte in "a🦊b".encode()] == ["a", "", "", "", "🦊", "b"]


def test_bytes_that_are_no_character_come_out_late_rather_than_never() -> None:
    letters = Letters(of_bytes)
    said = "".join(letters.push(0xFF) for _ in range(20))
    assert len(said) >= 15 and said + letters.rest() == UNKNOWN * 20


@given(st.lists(st.integers(0, 2), max_size=20))
def test_spaces_between_words_are_kept(tokens: list[int]) -> None:
    letters = Letters(of_words)
    assert "".join(map(letters.push, tokens)) + letters.rest() == of_words(tokens)


def test_only_a_few_tokens_are_decoded_again() -> None:
    seen = []

    def decode(tokens: Sequence[int]) -> str:
        seen.append(len(tokens))
        return of_words(tokens)

    letters = Letters(decode)
    for token in range(1, 200):
        letters.push(token)
    assert max(seen) <= 3


@pytest.mark.parametrize(
    ("decode", "tokens"),
    [
        (of_bytes, [*b"a", *[0xFF] * 700, *"é🦊b".encode()]),
        (of_bytes, [*b"a", *[0xE4] * 700, *"東b".encode()]),
        (of_words, [*[0] * 700, 1, 2]),
        # Halves of two characters in each token: the text is never whole, and never wrong.
        (lambda pairs: b"".join(map(bytes, pairs)).decode(errors="replace"), None),
    ],
)
def test_tokens_that_never_make_a_whole_text_are_not_decoded_for_ever(
    decode: Any, tokens: Any
) -> None:
    if tokens is None:
        halves = "é" * 700
        data = b"a" + halves.encode() + b"b"
        tokens = [data[i : i + 2] for i in range(0, len(data), 2)]
    seen = []

    def counted(part: Sequence[Any]) -> str:
        seen.append(len(part))
        return str(decode(part))

    letters = Letters(counted)
    said = "".join(map(letters.push, tokens))
    assert max(seen) <= FARTHEST + 1
    assert said + letters.rest() == decode(tokens)
