"""The memory for answers: what is the same request, what is kept, and who leaves."""

from __future__ import annotations

import struct
from collections import OrderedDict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repository.cache import (
    FORMS,
    LARGEST,
    OF_ENTRY,
    OF_TENSOR,
    SHARE,
    ResponseCache,
    key_of,
    size_of,
)
from repository.forms import Form, form_of
from repository.messages import InferRequest, InferResponse
from repository.tensors import Tensor

X = Tensor("x", "FP32", (1, 2), struct.pack("<2f", 1, 2))
NAN = struct.pack("<f", float("nan"))


def asked(*inputs: Tensor, outputs: tuple[str, ...] = (), **parameters: Any) -> InferRequest:
    return InferRequest(list(inputs) or [X], outputs, parameters=parameters)


def answer(data: bytes = b"1234", **parameters: Any) -> InferResponse:
    return InferResponse([Tensor("y", "UINT8", (len(data),), data)], parameters, 0.5, 0.25, 4)


def size(data: int) -> int:
    """Of such an answer."""
    return OF_ENTRY + OF_TENSOR + data


def data_of(response: InferResponse | None) -> bytes | None:
    return None if response is None else bytes(response.outputs[0].data)


# what is the same ---------------------------------------------------------------------------------


OTHERS = {
    "bytes": asked(Tensor("x", "FP32", (1, 2), struct.pack("<2f", 1, 3))),
    "shape": asked(Tensor("x", "FP32", (2, 1), X.data)),
    "datatype": asked(Tensor("x", "INT32", (1, 2), X.data)),
    "name": asked(Tensor("z", "FP32", (1, 2), X.data)),
    "one more": asked(X, Tensor("z", "FP32", (0,), b"")),
    "outputs": asked(outputs=("y",)),
    "more outputs": asked(outputs=("y", "z")),
    "parameter": asked(top=1),
    "another value": asked(top=2),
    "another type": asked(top=True),
    "a float": asked(top=1.0),
    "a text": asked(top="1"),
    "another parameter": asked(pot=1),
    "nested": asked(top={"a": [1]}),
}


def test_requests_that_differ_in_what_a_model_sees_have_different_keys() -> None:
    keys = {what: key_of(request) for what, request in {"it": asked(), **OTHERS}.items()}
    assert len(set(keys.values())) == len(keys)


def test_what_a_model_does_not_see_changes_nothing() -> None:
    plain = key_of(asked())
    assert key_of(InferRequest([X], id="7", parameters={"priority": 2, "timeout": 9})) == plain
    assert key_of(asked(Tensor("x", "FP32", (1, 2), memoryview(bytearray(X.data))))) == plain
    assert key_of(asked(a=1, b=2)) == key_of(asked(b=2, a=1))


def test_a_form_that_is_known_makes_no_difference() -> None:
    request = asked(top=1)
    known = asked(top=1)
    known.form = form_of(known.inputs, known.outputs, known.parameters)
    assert key_of(known) == key_of(request) == key_of(known)


def test_bytes_do_not_wander_from_one_input_to_the_next() -> None:
    def two(first: bytes, second: bytes) -> bytes:
        parts = (("a", first), ("b", second))
        return key_of(asked(*[Tensor(n, "BYTES", (1,), d) for n, d in parts]))

    one, other = b"\1\0\0\0a", b"\2\0\0\0bc"
    assert len({two(one + other, b""), two(one, other), two(b"", one + other)}) == 3


def test_numbers_are_compared_as_bits() -> None:
    nan = asked(Tensor("x", "FP32", (1,), NAN))
    assert key_of(nan) == key_of(asked(Tensor("x", "FP32", (1,), bytes(NAN))))
    zeros = [asked(Tensor("x", "FP32", (1,), struct.pack("<f", zero))) for zero in (0.0, -0.0)]
    assert key_of(zeros[0]) != key_of(zeros[1])


def test_a_text_that_is_no_unicode_is_a_key_like_any_other() -> None:
    assert key_of(asked(top="\ud800")) != key_of(asked(top="\udfff"))


# what is kept -------------------------------------------------------------------------------------


def test_an_answer_comes_back_as_it_was_and_belongs_to_who_asked() -> None:
    shelf = ResponseCache(1 << 20).shelf()
    assert shelf.find(b"k") is None
    assert shelf.keep(b"k", answer(b"abc", tokens=3))
    first, second = shelf.find(b"k"), shelf.find(b"k")
    assert first is not None and second is not None
    assert (data_of(first), first.parameters) == (b"abc", {"tokens": 3})
    assert (first.queue_s, first.compute_s, first.batch_size) == (0, 0, 0)
    first.outputs[0].name, first.parameters["tokens"] = "changed", 4
    first.outputs.clear()
    assert second.outputs[0].name == "y" and second.parameters == {"tokens": 3}
    third = shelf.find(b"k")
    assert third is not None and third.outputs[0].name == "y"


def test_what_is_kept_is_a_copy() -> None:
    arena = bytearray(b"abcd")
    shelf = ResponseCache(1 << 20).shelf()
    shelf.keep(b"k", InferResponse([Tensor("y", "UINT8", (2,), memoryview(arena)[1:3])]))
    arena[:] = b"----"
    arena.extend(b"nobody has a view of it")
    assert data_of(shelf.find(b"k")) == b"bc"


def test_forms_that_answers_share_are_kept_and_those_that_each_has_for_itself_are_not() -> None:
    shelf = ResponseCache(1 << 20).shelf()

    def comes_back(form: Form, outputs: list[Tensor]) -> bool:
        shelf.keep(b"k", InferResponse(outputs, form=form))
        found = shelf.find(b"k")
        assert found is not None and found.form in (form, None)
        return found.form is form

    text = [Tensor("y", "BYTES", (1,), b"\0\0\0\0")]
    assert not comes_back(form_of(text), text)
    plain = [Tensor("y", "UINT8", (1,), b"\0")]
    first = form_of(plain)
    known = [comes_back(form, plain) for form in (first, *(form_of(plain) for _ in range(40)))]
    assert known == [True] * FORMS + [False] * (41 - FORMS)
    assert comes_back(first, plain)


def test_what_has_not_been_asked_for_the_longest_leaves_first() -> None:
    cache = ResponseCache(8 * size(10))
    shelf = cache.shelf()
    for n in range(8):
        assert shelf.keep(b"%d" % n, answer(b"." * 10))
    assert (len(cache), cache.size, cache.evictions) == (8, cache.limit, 0)
    shelf.find(b"0")
    shelf.keep(b"8", answer(b"." * 10))
    assert shelf.find(b"0") is not None and shelf.find(b"1") is None
    assert (len(cache), cache.size, cache.evictions) == (8, cache.limit, 1)


def test_one_answer_may_not_take_all_the_room() -> None:
    limit = SHARE * size(1000)
    shelf = ResponseCache(limit).shelf()
    assert shelf.keep(b"k", answer(b"." * 1000))
    assert not shelf.keep(b"l", answer(b"." * 1001))
    large = ResponseCache(1 << 40).shelf()
    assert not large.keep(b"k", answer(bytes(LARGEST)))
    assert large.keep(b"k", answer(bytes(LARGEST - size(0))))


def test_a_cache_of_no_bytes_keeps_nothing() -> None:
    for limit in (1, OF_ENTRY):
        cache = ResponseCache(limit)
        assert not cache.shelf().keep(b"k", answer())
        assert (len(cache), cache.size) == (0, 0)


def test_the_same_key_again_takes_the_place_of_the_first() -> None:
    cache = ResponseCache(1 << 20)
    shelf = cache.shelf()
    shelf.keep(b"k", answer(b"long before"))
    shelf.keep(b"k", answer(b"now"))
    assert data_of(shelf.find(b"k")) == b"now"
    assert (len(cache), cache.size, cache.evictions) == (1, size(3), 0)


def test_a_shelf_knows_nothing_of_another() -> None:
    cache = ResponseCache(1 << 20)
    old, new = cache.shelf(), cache.shelf()
    old.keep(b"k", answer(b"old"))
    assert new.find(b"k") is None
    new.keep(b"k", answer(b"new"))
    assert (data_of(old.find(b"k")), data_of(new.find(b"k"))) == (b"old", b"new")


def test_a_closed_shelf_finds_and_keeps_nothing_and_its_answers_leave_by_and_by() -> None:
    cache = ResponseCache(1 << 20)
    old, new = cache.shelf(), cache.shelf()
    new.keep(b"k", answer())
    for n in range(5):
        old.keep(b"%d" % n, answer())
    assert old.close() and not old.close()
    assert old.find(b"0") is None and not old.keep(b"9", answer())
    assert cache.sweep(3) and len(cache) == 3
    assert not cache.sweep(3) and (len(cache), cache.size) == (1, size(4))
    assert new.find(b"k") is not None and not cache.sweep()
    assert not cache.shelf().close()  # nothing lay there


def test_who_leaves_anyhow_makes_room_before_anybody_is_driven_out() -> None:
    cache = ResponseCache(8 * size(10))
    old, new = cache.shelf(), cache.shelf()
    new.keep(b"first", answer(b"." * 10))
    for n in range(7):
        old.keep(b"%d" % n, answer(b"." * 10))
    old.close()
    for n in range(7):
        new.keep(b"%d" % n, answer(b"." * 10))
    assert new.find(b"first") is not None and cache.evictions == 0 and not cache.sweep()


def test_it_says_how_full_it_is() -> None:
    cache = ResponseCache(2000 * SHARE)
    cache.shelf().keep(b"k", answer(b""))
    report = cache.report()
    assert (report.limit, report.entries, report.evictions) == (2000 * SHARE, 1, 0)
    assert report.size == size_of(answer(b"").outputs, {}) == size(0)


class Oracle:
    """The same by hand, without a thought for speed."""

    def __init__(self, limit: int) -> None:
        self.limit, self.kept = limit, OrderedDict[tuple[int, int], bytes]()

    def keep(self, at: tuple[int, int], data: bytes) -> None:
        if size(len(data)) > self.limit // SHARE:
            return
        self.kept.pop(at, None)
        self.kept[at] = data
        while sum(size(len(d)) for d in self.kept.values()) > self.limit:
            self.kept.popitem(last=False)

    def find(self, at: tuple[int, int]) -> bytes | None:
        if at in self.kept:
            self.kept.move_to_end(at)
        return self.kept.get(at)


_keys = st.tuples(st.integers(0, 2), st.integers(0, 7))
_steps = st.lists(
    st.one_of(
        st.tuples(st.just("find"), _keys, st.just(0)),
        st.tuples(st.just("keep"), _keys, st.integers(0, 3000)),
        st.tuples(st.just("close"), _keys, st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(_steps, st.integers(SHARE * size(0), 12_000))
@pytest.mark.timeout(60)
def test_it_does_what_the_simplest_cache_does(steps: list[Any], limit: int) -> None:
    cache, oracle = ResponseCache(limit), Oracle(limit)
    shelves = [cache.shelf() for _ in range(3)]
    for what, (which, key), length in steps:
        if what == "find":
            assert data_of(shelves[which].find(b"%d" % key)) == oracle.find((which, key))
        elif what == "keep":
            shelves[which].keep(b"%d" % key, answer(bytes([key]) * length))
            oracle.keep((which, key), bytes([key]) * length)
        else:
            shelves[which].close()
            shelves[which] = cache.shelf()
            while cache.sweep(2):
                pass
            for at in [at for at in oracle.kept if at[0] == which]:
                del oracle.kept[at]
        assert cache.size == sum(size(len(d)) for d in oracle.kept.values()) <= limit
        assert len(cache) == len(oracle.kept) == sum(len(s.entries) for s in shelves)
