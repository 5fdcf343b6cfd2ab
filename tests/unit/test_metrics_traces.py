"""Of what a client says about its trace, only what is checked may be shown."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.metrics.buckets import Exemplar
from server.metrics.traces import LONGEST_ID, Trace, trace_of

ID = b"0af7651916cd43dd8448eb211c80319c"
SPAN = b"b7ad6b7169203331"
PARENT = b"00-" + ID + b"-" + SPAN + b"-01"
FOUND = Trace("trace_id", ID.decode(), SPAN.decode())
MOST = 128  # characters of an exemplar's labels, names and values (OpenMetrics)


def test_the_trace_id_of_a_sampled_request_is_shown() -> None:
    assert trace_of([(b"host", b"x"), (b"traceparent", PARENT)]) == FOUND
    assert trace_of([(b"x-request-id", b"mine"), (b"traceparent", PARENT)]) == FOUND


@pytest.mark.parametrize(
    "parent",
    [
        PARENT[:-2] + b"00",  # not sampled
        PARENT[:-2] + b"02",
        PARENT + b"-more",  # version 00 has four parts
        PARENT.upper(),
        b"ff" + PARENT[2:],
        PARENT.replace(ID, b"0" * 32),
        PARENT.replace(b"b7ad6b7169203331", b"0" * 16),
        b"",
        b'"} 1 # {',
    ],
)
def test_a_trace_that_is_not_kept_or_not_well_formed_is_not_shown(parent: bytes) -> None:
    assert trace_of([(b"traceparent", parent)]) is None
    assert trace_of([(b"x-request-id", b"mine"), (b"traceparent", parent)]) is None


def test_a_later_version_may_say_more() -> None:
    assert trace_of([(b"traceparent", b"01" + PARENT[2:] + b"-what-is-to-come")]) == FOUND


def test_a_request_id_that_is_short_and_clean_stands_in() -> None:
    assert trace_of([(b"x-request-id", b"req-1.a_B")]) == Trace("request_id", "req-1.a_B")
    for value in (b"", b"a b", b'a"b', b"a\nb", "ü".encode(), b"x" * (LONGEST_ID + 1), b"a\\"):
        assert trace_of([(b"x-request-id", value)]) is None


def test_nothing_said_is_nothing_shown() -> None:
    assert trace_of([]) is None
    assert trace_of([(b"content-length", b"3")]) is None


@given(st.lists(st.tuples(st.sampled_from([b"traceparent", b"x-request-id"]), st.binary())))
def test_whatever_is_sent_what_is_shown_is_plain_and_within_the_limit(
    headers: list[tuple[bytes, bytes]],
) -> None:
    found = trace_of(headers)
    if found is not None:
        assert re.fullmatch(r"[A-Za-z0-9._-]+", found.value)
        assert len(found.label) + len(found.value) <= MOST
        text = Exemplar(found.label, found.value, amount=0.5, at=1.0).text
        assert text == f' # {{{found.label}="{found.value}"}} 0.5 1.000'
