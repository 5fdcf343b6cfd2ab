"""gzip and deflate: what is inflated is bounded, whatever the stream says of itself."""

from __future__ import annotations

import gzip
import random
import time
import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repository.errors import InvalidRequestError
from server.codecs.squeeze import LONGEST_WISH, STEP, deflated, inflated, refuse_packed, wish_of
from server.errors import PayloadTooLargeError

MIB = 1 << 20


@given(st.lists(st.binary(max_size=200), max_size=5), st.sampled_from(["gzip", "deflate"]))
def test_what_was_deflated_is_inflated_again(parts: list[bytes], coding: str) -> None:
    whole = b"".join(parts)
    packed = deflated(parts, coding)
    assert inflated(packed, len(whole)) == whole
    assert (gzip if coding == "gzip" else zlib).decompress(packed) == whole


@pytest.mark.parametrize("size", [STEP - 1, STEP, STEP + 1, 3 * STEP + 7])
def test_steps_make_no_difference(size: int) -> None:
    for data in (bytes(size), random.Random(size).randbytes(size)):
        for body in (gzip.compress(data, 1), memoryview(zlib.compress(data, 1))):
            assert inflated(body, size) == data
            with pytest.raises(PayloadTooLargeError):
                inflated(body, size - 1)


def test_a_bomb_takes_neither_memory_nor_time() -> None:
    deflater = zlib.compressobj(9)
    block = bytes(MIB)
    bomb = b"".join([deflater.compress(block) for _ in range(64)]) + deflater.flush()
    assert len(bomb) < MIB
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(PayloadTooLargeError, match="--http-max-input-size"):
        inflated(bomb, 4 * MIB)
    took, (_, most) = time.process_time() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 12 * MIB and took < 1.0


@given(st.binary(max_size=300), st.integers(0, 60))
def test_no_damage_is_answered_with_more_than_a_refusal(noise: bytes, at: int) -> None:
    good = bytearray(gzip.compress(bytes(200)))
    for body in (noise, bytes(good[:at]), bytes(good) + noise, bytes(good[:at]) + noise):
        try:
            inflated(body, 10_000)
        except (InvalidRequestError, PayloadTooLargeError):
            continue


def test_members_behind_the_first_are_not_read() -> None:
    with pytest.raises(InvalidRequestError, match="follow the end"):
        inflated(gzip.compress(b"a") + gzip.compress(b"b"), 100)


def test_who_says_more_than_anybody_needs_gets_plain_bytes() -> None:
    assert wish_of(b"gzip") is not None
    assert wish_of(b"gzip" + b", x" * LONGEST_WISH) is None


@pytest.mark.parametrize(
    "accept",
    ["gzip;q=2", "gzip;q=-1", "gzip;q=nan", "gzip;q=inf", "gzip;q=x", "gzip;q=", ";;,,;q=1"],
)
def test_a_weight_that_is_none_is_a_no(accept: str) -> None:
    assert wish_of(accept.encode()) is None


def test_other_routes_say_that_their_bodies_are_plain() -> None:
    refuse_packed([(b"content-encoding", b"identity"), (b"a", b"b")])
    with pytest.raises(InvalidRequestError, match="infer alone"):
        refuse_packed([(b"content-encoding", b"gzip")])
