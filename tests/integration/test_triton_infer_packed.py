"""gzip and deflate of infer's requests and answers, on both routes alike."""

from __future__ import annotations

import gzip
import json
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.letters import (
    LENGTH,
    SIXTEEN,
    Pair,
    asking,
    binary,
    paired,
    simple,
    sized,
    tensor,
    told,
)
from tests.routes import CLOSE
from tests.wire import post


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with paired() as pair:
        yield pair


PACKED: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "deflate": zlib.compress}
UNPACKED: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.decompress,
    "deflate": zlib.decompress,
}


@pytest.mark.parametrize("coding", PACKED)
def test_a_compressed_request_counts_the_bytes_of_its_json_as_they_were(
    pair: Pair, coding: str
) -> None:
    raw, count = binary(SIXTEEN, SIXTEEN)
    said = f"Content-Encoding: {coding}"
    plain = pair.ask("simple", raw, count)
    assert pair.ask("simple", PACKED[coding](raw), count, said).body == plain.body
    assert told(pair.ask("simple", PACKED[coding](simple()), said)) == told(plain)
    raw = struct.pack("<3f", 1, 2, 3)
    assert pair.ask("open", PACKED[coding](raw), f"{LENGTH}: 0", said).body.endswith(raw)


def test_either_wrapping_will_do_for_either_word(pair: Pair) -> None:
    for coding, other in (("gzip", "deflate"), ("deflate", "gzip")):
        answer = pair.ask("simple", PACKED[coding](simple()), f"Content-Encoding: {other}")
        assert answer.status == 200


def wide(rows: int, columns: int, **more: Any) -> tuple[bytes, str]:
    header = asking(tensor(shape=(rows, columns), **sized(rows * columns * 4)), **more)
    return header + bytes(rows * columns * 4), f"{LENGTH}: {len(header)}"


@pytest.mark.parametrize(
    ("accept", "coding"),
    [
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("GZIP;q=1.0", "gzip"),
        ("gzip;q=0.5, deflate;q=0.9", "deflate"),
        ("deflate;q=0.5, gzip;q=0.5", "deflate"),
        ("br;q=1, gzip;q=0.8, *;q=0.1", "gzip"),
        ("identity;q=0, *", "gzip"),
        ("gzip;q=0", None),
        ("identity, gzip;q=0.5", None),
        ("gzip;q=0, *", None),
        ("br", None),
        ("*", None),
        ("", None),
        ("gzip, deflate, br, zstd", None),  # nobody asked in person, and it is no text
    ],
)
def test_the_highest_weight_wins_and_of_equal_ones_the_first(
    pair: Pair, accept: str, coding: str | None
) -> None:
    raw, count = wide(8, 64, parameters={"binary_data_output": True})
    plain = pair.ask("floats", raw, count)
    answer = pair.ask("floats", raw, count, f"Accept-Encoding: {accept}")
    assert answer.headers.get("content-encoding") == coding
    if coding is None:
        assert answer == plain
        return
    assert UNPACKED[coding](answer.body) == plain.body
    assert answer.headers[LENGTH.lower()] == plain.headers[LENGTH.lower()]
    assert answer.headers["vary"] == "accept-encoding"
    assert answer.headers["content-type"] == "application/octet-stream"


def test_small_answers_and_errors_are_plain_unless_that_is_excluded(pair: Pair) -> None:
    for accept in ("gzip", "deflate;q=1"):
        assert (
            "content-encoding"
            not in pair.ask("simple", simple(), f"Accept-Encoding: {accept}").headers
        )
        bad = pair.ask("simple", b"{", f"Accept-Encoding: {accept}")
        assert bad.status == 400 and "content-encoding" not in bad.headers
    answer = pair.ask("simple", simple(), "Accept-Encoding: gzip, identity;q=0")
    assert json.loads(gzip.decompress(answer.body)) == told(pair.ask("simple", simple()))


def test_long_text_is_compressed_also_for_whoever_says_so_by_habit(pair: Pair) -> None:
    raw, count = wide(128, 128)
    plain = pair.ask("floats", raw, count)
    answer = pair.ask("floats", raw, count, "Accept-Encoding: gzip, deflate, br")
    assert answer.headers["content-encoding"] == "gzip"
    assert gzip.decompress(answer.body) == plain.body
    assert len(answer.body) < len(plain.body) / 50


def test_what_does_not_get_shorter_is_sent_as_it_is(pair: Pair) -> None:
    noise = random.Random(7).randbytes(2048)
    header = asking(tensor(shape=(8, 64), **sized(2048)), parameters={"binary_data_output": True})
    answer = pair.ask("floats", header + noise, f"{LENGTH}: {len(header)}", "Accept-Encoding: gzip")
    assert answer.status == 200 and "content-encoding" not in answer.headers
    assert answer.body.endswith(noise)


def test_a_known_head_of_a_compressed_request_stays_one(pair: Pair) -> None:
    """The protocol route remembers heads: the second request of a connection takes the short way."""
    raw = gzip.compress(simple())
    ask = post("/v2/models/simple/infer", raw, "Content-Encoding: gzip", "Accept-Encoding: gzip")
    last = post("/v2/models/simple/infer", simple(), CLOSE)
    first, *rest = [answer.body for answer in pair.connection([ask, ask, ask, last])]
    assert rest == [first] * 3
