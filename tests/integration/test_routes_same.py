"""Streams of requests as no list of cases would have them: the routes answer with the same bytes.

A stream has up to 20 requests, good and bad, for inference and for other things, in JSON, bytes or
chunks, and is cut into pieces anywhere. The servers live as long as the module, so what a connection
leaves behind would show in the next.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
import uvloop
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.fakes.manners import Manners
from tests.integration.test_routes_bodies import LENGTH, binary, chunked, cut, wide
from tests.routes import CLOSE, Depot, asking, both, infer, same, statuses, tensor
from tests.wire import head, post

MODELS = ("double", "next", "slow", "org/name", "double/versions/1", "large", "broken", "full", "gone",
          "none", "double/versions/9", "org%2Fname", "../double", "a+b", "named")  # fmt: skip
MAX_BODY = 200_000
ROOM_FROM = 65_536


class Twins:
    """Both servers, in a loop that runs while a script is played."""

    def __init__(self, runner: asyncio.Runner, depots: list[Depot]) -> None:
        self._runner, self.depots = runner, depots

    def play(self, pieces: list[bytes]) -> bytes:
        return self._runner.run(same(self.depots, pieces))

    def left(self) -> list[int]:
        """Leases and places that nobody has given back."""
        for depot in self.depots:
            self._runner.run(depot.quiet())
        return [d.models.leases + d.models.rooms for d in self.depots]

    def counts(self) -> list[dict[str, float]]:
        return [self._runner.run(depot.counts()) for depot in self.depots]


@pytest.fixture(scope="module")
def twins() -> Iterator[Twins]:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        stack = AsyncExitStack()
        make = both(lambda: Manners(room_from=ROOM_FROM), max_body=MAX_BODY)
        depots = runner.run(stack.enter_async_context(make))
        yield Twins(runner, depots)
        runner.run(stack.aclose())


# requests -----------------------------------------------------------------------------------------

values = st.sampled_from([(1, 2), (3, 4), (0, -1, 2.5, 7), tuple(range(16))])
names = st.sampled_from(MODELS)
spoilt = st.sampled_from([b"", b"{", b"[]", b"null", b"\xff", b'{"inputs":[]}',
                          json.dumps({"inputs": [tensor(name="z")]}).encode(),
                          json.dumps({"inputs": [tensor(datatype="INT8")]}).encode(),
                          json.dumps({"inputs": [tensor(1, 2, 3)]}).encode(),
                          json.dumps(asking(parameters={"timeout": -1})).encode(),
                          json.dumps(asking(outputs=[{"name": "q"}])).encode()])  # fmt: skip
lines = st.lists(
    st.sampled_from(["X-A: b", "x-b:", "X-Request-Id: mine", "Accept: */*", "Expect: 100-continue",
                     "Content-Type: text/plain", "User-Agent: a b c", "Accept-Encoding: gzip",
                     "Connection: keep-alive", "Origin: http://t", "Content-Encoding: identity",
                     "X-Amzn-SageMaker-Adapter-Identifier: a1", "Cookie: " + "c" * 900]),
    max_size=3,
)  # fmt: skip
rare_lines = st.sampled_from(["Origin: http://evil.example", "Content-Encoding: gzip", CLOSE, "X-A: \0",
                              "Transfer-Encoding: chunked", "Content-Length: 3", f"{LENGTH}: 7",
                              "Connection: Upgrade", "Connection: Upgrade\r\nUpgrade: h2c"])  # fmt: skip


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    if draw(st.integers(0, 5)) == 0:
        return draw(spoilt)
    change: dict[str, Any] = {}
    if draw(st.booleans()):
        change["id"] = draw(st.sampled_from(["7", "\u20ac", "a" * 60]))
    if draw(st.booleans()):
        change["parameters"] = {"binary_data_output": draw(st.booleans())}
    if draw(st.booleans()):
        change["adapters"] = draw(st.sampled_from(["a2", "", ["a2", ""], 7]))
    body = json.dumps(asking(*draw(values), **change)).encode()
    return b" " * draw(st.sampled_from([0, 0, 0, 1, 500, 5_000, 64_000, 66_000, 190_000])) + body


@st.composite
def infers(draw: st.DrawFn) -> bytes:
    if draw(st.integers(0, 9)) == 0:
        return wide(draw(st.sampled_from([60_000, 65_536, 70_000, 180_000])))
    said = draw(lines) + ([draw(rare_lines)] if draw(st.integers(0, 30)) == 0 else [])
    kind = draw(st.sampled_from(["json", "json", "bytes", "bytes", "chunks"]))
    if kind == "bytes":
        lies = [None] * 8 + [[], [f"{LENGTH}: 5"], [f"{LENGTH}: 99999"], [f"{LENGTH}: x"]]
        return binary(
            *draw(values), out=draw(st.booleans()), model=draw(names), more=said,
            said=draw(st.sampled_from(lies)),
        )  # fmt: skip
    if kind == "json":
        return infer(draw(names), draw(bodies()), *said)
    body = draw(bodies())
    pieces = cut(body, draw(st.sampled_from([1, 7, 1000])) if len(body) < 1000 else 40_000)
    extension = draw(st.sampled_from([b"", b";a=b", b';a="c;d"']))
    trailers = draw(st.sampled_from([b"", b"", b"X-T: u\r\n", b"%b: 1\r\n" % LENGTH.encode()]))
    raw = chunked(pieces, *said, extension=extension, trailers=trailers)
    return raw.replace(b"/double/", f"/{draw(names)}/".encode(), 1)


others = st.sampled_from(
    [head("GET", "/v2/health/live"), head("GET", "/v2/models/double"), head("GET", "/v2/models/none"),
     head("GET", "/v2/models/double/infer"), head("GET", "/v2"), head("GET", "/v2/health/ready"),
     post("/v1/models/load", {"model_name": "double"}), post("/v1/models/load", b"{"),
     head("POST", "/v2/models/double/infer"), head("PUT", "/v2/models/double/infer"),
     post("/v2/models//double/infer", asking()), post("/v2/models/double/infer/", asking()),
     post("http://t/v2/models/double/infer", asking()), post("/v2/models/double/infer?a=/b", asking()),
     post("/v2/models/named/infer?adapter=a3", asking()),
     post("/v2/models/named/infer?adapter", asking()),
     post("/v2/models/double/infer", b" " * (MAX_BODY + 1))]
)  # fmt: skip
ends = st.sampled_from(
    [infer("double", None, CLOSE), infer("double", None, CLOSE), infer("slow", None, CLOSE),
     infer().replace(b"HTTP/1.1", b"HTTP/1.0"), b"\x16\x03\x01 nonsense\r\n\r\n",
     head("GET", "/v2/health/live", CLOSE), infer("double", b"{", CLOSE) + infer(),
     head("POST", "/v2/models/double/infer", "Content-Length: x")]
)  # fmt: skip


@st.composite
def scripts(draw: st.DrawFn) -> list[bytes]:
    asked = draw(st.lists(st.one_of(infers(), infers(), infers(), others), max_size=19))
    again = draw(st.booleans())  # so that heads are known
    if asked and again:
        asked += [asked[draw(st.integers(0, len(asked) - 1))]] * draw(st.integers(1, 4))
    stream = b"".join([*asked, draw(ends)])
    how = draw(
        st.sampled_from(["whole", "requests", "known", "known", "anywhere", "anywhere", "fine"])
    )
    if how == "known" and asked:  # one, answered; and then the stream begins with the same
        return [asked[0], *split(draw, stream)]
    if how == "requests":
        return [*asked, stream[len(b"".join(asked)) :]]
    if how == "fine" and len(stream) < 4_000:
        return cut(stream, draw(st.sampled_from([1, 2, 3, 17])))
    return split(draw, stream) if how == "anywhere" else [stream]


def split(draw: st.DrawFn, stream: bytes) -> list[bytes]:
    places = sorted(draw(st.sets(st.integers(1, len(stream) - 1), max_size=12)))
    return [stream[a:b] for a, b in zip([0, *places], [*places, None], strict=True)]


@settings(max_examples=120, deadline=None, derandomize=True,
          suppress_health_check=list(HealthCheck))  # fmt: skip
@given(scripts())
@example([binary(1, 2) * 3, binary(1, 2)[:-3], binary(1, 2)[-3:] + infer("double", None, CLOSE)])
def test_any_stream_cut_anywhere_is_answered_with_the_same_bytes(
    twins: Twins, script: list[bytes]
) -> None:
    heard = twins.play(script)
    assert heard == b"" or statuses(heard)


def test_nothing_is_left_of_any_of_them_and_they_were_counted_alike(twins: Twins) -> None:
    twins.play([infer("double", None, CLOSE)])
    assert twins.left() == [0, 0]
    first, second = twins.counts()
    assert first == second and first
