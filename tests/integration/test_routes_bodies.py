"""Requests good and bad, in every spelling: the routes answer all of them with the same bytes."""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Callable, Iterable
from typing import Any

from server.intake import MAX_CHUNKS
from server.protocol import MOST_HEAD
from tests.fakes.manners import Manners
from tests.routes import (
    INFER,
    LAST,
    Depot,
    answers_in,
    asking,
    both,
    each_route,
    in_uvloop,
    infer,
    play,
    routed,
    same,
    statuses,
    tensor,
)
from tests.wire import JSON, head, post

LENGTH = "Inference-Header-Content-Length"
BODY = json.dumps(asking()).encode()
MAX_BODY = 100_000


def binary(
    *values: float,
    out: bool = True,
    model: str = "double",
    said: Any = None,
    more: Iterable[str] = (),
) -> bytes:
    """`said`: the lines of the header's length, where they are not the truth; `more` headers."""
    data = struct.pack(f"<{len(values)}f", *values)
    x = tensor(*values, parameters={"binary_data_size": len(data)})
    del x["data"]
    header = json.dumps({"inputs": [x], "parameters": {"binary_data_output": out}}).encode()
    lines = [f"{LENGTH}: {len(header)}"] if said is None else said
    return post(f"/v2/models/{model}/infer", header + data, *lines, *more)


def wide(size: int, model: str = "wide") -> bytes:
    """A request with `size` bytes of numbers."""
    return binary(*range(size // 4), model=model)


def chunked(
    pieces: Iterable[bytes], *headers: str, extension: bytes = b"", trailers: bytes = b""
) -> bytes:
    top = head("POST", INFER, "Transfer-Encoding: chunked", JSON, *headers)
    said = b"".join(b"%x%s\r\n%s\r\n" % (len(p), extension, p) for p in pieces if p)
    return top + said + b"0\r\n" + trailers + b"\r\n"


def cut(raw: bytes, size: int) -> list[bytes]:
    return [raw[at : at + size] for at in range(0, len(raw), size)]


def padded(size: int) -> bytes:
    return b" " * (size - len(BODY)) + BODY


def at(path: str) -> bytes:
    return post(path, asking())


def mixed(case: Callable[[bytes], bytes]) -> bytes:
    top, _, body = infer().partition(b"\r\n\r\n")
    return case(top).replace(case(b"POST /v2/models/double/infer HTTP/1.1"),
                             b"POST /v2/models/double/infer HTTP/1.1") + b"\r\n\r\n" + body  # fmt: skip


CHUNKED = head("POST", INFER, "Transfer-Encoding: chunked")
CHUNKS = cut(BODY, 7)
HEADER_ALONE = [f"{LENGTH}: {len(BODY)}"]

# label -> what is said, and the status of the answer; the connection goes on after it
KEPT: dict[str, tuple[bytes, int]] = {
    "JSON": (infer(), 200),
    "another version": (infer("double/versions/1"), 200),
    "no such version": (infer("double/versions/7"), 404),
    "no such model": (infer("none"), 404),
    "a name with a slash": (infer("org/name"), 200),
    "a name with an escaped slash": (infer("org%2Fname"), 200),
    "a name with an escaped slash in small letters": (infer("org%2fname"), 200),
    "a name with a blank": (infer("a%20b"), 400),
    "a name with a plus": (infer("a+b"), 200),
    "a name with an escaped plus": (infer("a%2Bb"), 200),
    "an escaped name": (infer("%64%6f%75ble"), 200),
    "an escaped verb": (at("/v2/models/double/%69nfer"), 200),
    "an escaped percent": (infer("double%25"), 400),
    "half an escape": (infer("double%2"), 400),
    "an escaped NUL": (infer("%00"), 400),
    "no UTF-8": (infer("%ff%fe"), 400),
    "dots": (infer("../double"), 400),
    "escaped dots": (infer("%2e%2e/double"), 400),
    "dots above all": (infer("../../../../etc/passwd"), 400),
    "two slashes before": (at("//v2/models/double/infer"), 200),
    "two slashes inside": (at("/v2//models//double//infer"), 200),
    "two slashes in the name": (infer("org//name"), 200),
    "a slash behind": (at(INFER + "/"), 200),
    "slashes behind": (at(INFER + "///"), 200),
    "a query": (at(INFER + "?a=b&c=%2F"), 200),
    "an empty query": (at(INFER + "?"), 200),
    "a query with the verb": (at("/v2/models/none?x=/infer"), 405),
    "a fragment": (at(INFER + "#infer"), 200),
    "the whole address": (at("http://t" + INFER), 200),
    "the whole address of another port": (at("http://t:8000" + INFER + "?x"), 200),
    "the whole address in large letters": (at("HTTP://T" + INFER), 200),
    "another case of the path": (at("/V2/models/double/infer"), 404),
    "another case of the verb": (at("/v2/models/double/Infer"), 405),
    "only the verb": (at("/infer"), 404),
    "a verb that reads": (head("GET", INFER), 405),
    "a verb that asks": (head("OPTIONS", INFER), 405),
    "a verb that puts": (head("PUT", INFER, "Content-Length: 2") + b"{}", 405),
    "a verb of WebDAV": (head("PROPFIND", INFER), 405),
    "bytes": (binary(1, 2, 3, 4), 200),
    "bytes in, JSON out": (binary(1, 2, out=False), 200),
    "JSON in, bytes out": (infer("double", asking(parameters={"binary_data_output": True})), 200),
    "the raw body": (post(INFER, struct.pack("<2f", 1, 2), f"{LENGTH}: 0"), 200),
    "a length of the header beside JSON": (post(INFER, BODY, *HEADER_ALONE), 200),
    "no length of the header": (binary(1, 2, said=[]), 400),
    "a length too short": (binary(1, 2, said=[f"{LENGTH}: 10"]), 400),
    "a length too long": (binary(1, 2, said=[f"{LENGTH}: 10000"]), 400),
    "a length below zero": (binary(1, 2, said=[f"{LENGTH}: -1"]), 400),
    "a length with a sign": (binary(1, 2, said=[f"{LENGTH}: +10"]), 400),
    "a length in words": (binary(1, 2, said=[f"{LENGTH}: all"]), 400),
    "an empty length": (binary(1, 2, said=[f"{LENGTH}:"]), 400),
    "a length of 5,000 digits": (binary(1, 2, said=[f"{LENGTH}: {'9' * 5000}"]), 400),
    "the same length twice": (post(INFER, BODY, *HEADER_ALONE, *HEADER_ALONE), 200),
    "the length in small letters": (post(INFER, BODY, HEADER_ALONE[0].lower()), 200),
    "the length in large letters": (post(INFER, BODY, HEADER_ALONE[0].upper()), 200),
    "a blank around the length": (post(INFER, BODY, f"{LENGTH}:   {len(BODY)}  "), 200),
    "headers in large letters": (mixed(bytes.upper), 200),
    "headers in small letters": (mixed(bytes.lower), 200),
    "no content type": (head("POST", INFER, f"Content-Length: {len(BODY)}") + BODY, 200),
    "another content type": (post(INFER, BODY, "Content-Type: text/plain"), 200),
    "no packing": (post(INFER, BODY, "Content-Encoding: identity"), 200),
    "gzip that is none": (post(INFER, BODY, "Content-Encoding: gzip"), 400),
    "gzip": (post(INFER, gzip.compress(BODY), "Content-Encoding: gzip"), 200),
    "a wish for packing": (post(INFER, BODY, "Accept-Encoding: gzip, deflate"), 200),
    "a request id": (post(INFER, BODY, "X-Request-Id: mine"), 200),
    "many headers": (post(INFER, BODY, *[f"X-{n}: {n}" for n in range(500)]), 200),
    "an empty header": (post(INFER, BODY, "X-A:"), 200),
    "no ASCII in a header": (post(INFER, BODY, "X-A: \xe9\xff"), 200),
    "an Origin of its own": (post(INFER, BODY, "Origin: http://t"), 200),
    "an empty body": (post(INFER, b""), 400),
    "no body": (head("POST", INFER), 400),
    "half a JSON": (post(INFER, BODY[:-3]), 400),
    "another datatype": (infer("double", {"inputs": [tensor(datatype="INT32")]}), 400),
    "another shape": (infer("double", {"inputs": [tensor(1, 2, 3, shape=[1, 3])]}), 400),
    "another name": (infer("double", {"inputs": [tensor(name="z")]}), 400),
    "too many rows": (infer("double", asking(*range(18))), 400),
    "an id that JSON must escape": (infer("double", asking(id='"\\\n\u20ac')), 200),
    "not a number": (infer("double", BODY.replace(b"[1, 2]}", b"[NaN, Infinity]}")), 200),
    "a model that breaks": (infer("broken"), 500),
    "a model whose queue is full": (infer("full"), 503),
    "a model whose worker died": (infer("gone"), 500),
    "a model that surprises": (infer("stuck"), 500),
    "chunks": (chunked(CHUNKS), 200),
    "one chunk": (chunked([BODY]), 200),
    "chunks of a byte": (chunked(cut(BODY, 1)), 200),
    "no chunks": (chunked([]), 400),
    "chunks with extensions": (chunked(CHUNKS, extension=b';a="b;c";d'), 200),
    "chunks with a trailer": (chunked(CHUNKS, "Trailer: X-A", trailers=b"X-A: b\r\n"), 200),
    "a trailer that would be the header's": (
        chunked(CHUNKS, trailers=b"%b: 1\r\n" % LENGTH.encode()), 200),
    "bytes in chunks": (chunked(cut(binary(1, 2).partition(b"\r\n\r\n")[2], 9),
                                *[line for line in binary(1, 2).decode("latin-1").split("\r\n")
                                  if line.startswith(LENGTH)]), 200),
    "a chunk's size with zeros before it": (
        CHUNKED + b"000%X\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY), 200),
    "chunks in large letters": (chunked(CHUNKS).replace(b"chunked", b"CHUNKED"), 200),
    "chunks of what was packed": (chunked(CHUNKS).replace(b": chunked", b": gzip, chunked"), 200),
    "as large as may be": (post(INFER, padded(MAX_BODY)), 200),
    "as large as may be, in chunks": (chunked(cut(padded(MAX_BODY), 9999)), 200),
    "just below 64 KiB": (post(INFER, padded(65535)), 200),
    "64 KiB": (post(INFER, padded(65536)), 200),
    "just above 64 KiB": (post(INFER, padded(65537)), 200),
    "a wish for another protocol": (infer("double", None, "Connection: Upgrade", "Upgrade: h2c"), 200),
    "empty lines before": (b"\r\n\r\n" + infer(), 200),
    "old HTTP that stays": (infer("double", None, "Host: t"), 200),
}  # fmt: skip

TOO_LARGE = f"Content-Length: {MAX_BODY + 1}"
# label -> what is said, and the status of the answer, after which the connection ends
ENDED: dict[str, tuple[bytes, int]] = {
    "length and chunks": (head("POST", INFER, "Content-Length: 4", "Transfer-Encoding: chunked")
                          + b"0\r\n\r\n", 400),
    "chunks and length": (head("POST", INFER, "Transfer-Encoding: chunked", "Content-Length: 4")
                          + b"0\r\n\r\n", 400),
    "two lengths": (head("POST", INFER, "Content-Length: 4", "Content-Length: 5") + b"abcde", 400),
    "one length twice": (head("POST", INFER, *["Content-Length: 4"] * 2) + b"abcd", 400),
    "a list of lengths": (head("POST", INFER, "Content-Length: 4, 4") + b"abcd", 400),
    "a length below zero": (head("POST", INFER, "Content-Length: -1") + b"a", 400),
    "a length with a sign": (head("POST", INFER, "Content-Length: +1") + b"a", 400),
    "a length in hex": (head("POST", INFER, "Content-Length: 0x1") + b"a", 400),
    "an empty length": (head("POST", INFER, "Content-Length:") + b"a", 400),
    "a length of 19 digits": (head("POST", INFER, "Content-Length: 1" + "0" * 18) + b"a", 400),
    "a length beyond 64 bits": (head("POST", INFER, "Content-Length: " + "9" * 30), 400),
    "a length with a blank before its colon": (head("POST", INFER, "Content-Length : 1") + b"a", 400),
    "chunked not last": (head("POST", INFER, "Transfer-Encoding: chunked, gzip") + b"0\r\n\r\n", 400),
    "a trailer that would be a length": (chunked(CHUNKS, trailers=b"Content-Length: 3\r\n"), 400),
    "no model": (at("/v2/models//infer"), 404),
    "nothing but the ends": (at("/v2/models/infer"), 404),
    "a chunk without a size": (CHUNKED + b"zz\r\n", 400),
    "a chunk longer than it says": (CHUNKED + b"1\r\nabc\r\n", 400),
    "a chunk beyond 64 bits": (CHUNKED + b"f" * 17 + b"\r\n", 400),
    "brotli": (post(INFER, BODY, "Content-Encoding: br"), 501),
    "two packings": (post(INFER, BODY, "Content-Encoding: identity, gzip"), 501),
    "two lengths of the header": (post(INFER, BODY, f"{LENGTH}: 5", f"{LENGTH}: 6"), 400),
    "too large": (head("POST", INFER, TOO_LARGE) + b" " * 10, 400),
    "too large, all of it": (post(INFER, padded(MAX_BODY + 1)), 400),
    "too large for no model": (post("/v2/models/none/infer", padded(MAX_BODY + 1)), 400),
    "too large for another spelling": (post("/" + INFER, padded(MAX_BODY + 1)), 400),
    "too large in chunks": (chunked(cut(padded(MAX_BODY + 1), 9999)), 400),
    "too large in one chunk": (chunked([padded(MAX_BODY + 1)]), 400),
    "too many tiny chunks": (CHUNKED
                             + b"1\r\n \r\n" * (MAX_CHUNKS + 1), 400),
    "too large a head": (post(INFER, BODY, "X-A: " + "a" * MOST_HEAD), 431),
    "too large a head of many": (post(INFER, BODY, *["X-A: " + "a" * 100] * 1000), 431),
    "too long an address": (at(INFER + "?" + "a" * MOST_HEAD), 431),
    "a page of another site": (post(INFER, BODY, "Origin: http://evil.example"), 403),
    "a name of others": (infer().replace(b"Host: t", b"Host: evil.example"), 403),
    "a NUL in the head": (post(INFER, BODY, "X-A: \0"), 400),
    "a folded header": (post(INFER, BODY, "X-A: b\r\n c"), 400),
    "bare line feeds": (infer().replace(b"\r\n", b"\n"), 400),
    "another verb's body": (head("CONNECT", INFER), 400),
    "no version": (b"POST " + INFER.encode() + b"\r\n\r\n", 400),
    "HTTP/3": (infer().replace(b"HTTP/1.1", b"HTTP/3.0"), 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01", 400),
    "a host with a path": (at("http:" + INFER), 400),
}  # fmt: skip


async def wrong(
    depots: list[Depot], table: dict[str, tuple[bytes, int]], pieces: Any, behind: bytes
) -> str:
    """What was not answered as the table says. That the routes agree is `same`'s."""
    found = []
    for label, (raw, status) in table.items():
        heard = await same(depots, pieces(raw + behind))
        expected = [status, 200] if behind is LAST else [status]
        if statuses(heard) != expected:
            found.append(f"{label}: {statuses(heard)}, not {expected}: {heard[:300]!r}")
    return "\n".join(found)


@in_uvloop
async def test_requests_in_every_spelling_are_answered_alike_and_the_next_one_too() -> None:
    async with both(max_body=MAX_BODY) as depots:
        assert await wrong(depots, KEPT, lambda raw: [raw], LAST) == ""
        small = {label: case for label, case in KEPT.items() if len(case[0]) < 1000}
        assert await wrong(depots, small, lambda raw: cut(raw, 7), LAST) == ""
        for depot in depots:
            await depot.quiet()
        counts = [await depot.counts() for depot in depots]
        assert counts[0] == counts[1]


@in_uvloop
async def test_what_ends_a_connection_does_so_on_both_routes_and_nothing_behind_it_is_heard() -> (
    None
):
    async with both(max_body=MAX_BODY) as depots:
        assert await wrong(depots, ENDED, lambda raw: [raw], infer()) == ""
        small = {label: case for label, case in ENDED.items() if len(case[0]) < 1000}
        assert await wrong(depots, small, lambda raw: cut(raw, 9), infer()) == ""
        for depot in depots:
            await depot.quiet()
        counts = [await depot.counts() for depot in depots]
        assert counts[0] == counts[1]


@each_route
@in_uvloop
async def test_heads_that_differ_in_one_byte_are_not_taken_for_one_another(route: str) -> None:
    """Whoever remembers heads: the byte may be in the model's name, the length, a header or the end."""
    data = binary(1, 2, 3, 4)
    twice = [(binary(3, 4, 5, 6), [6, 8, 10, 12]), (data, [2, 4, 6, 8])]
    async with routed(route) as depot:
        script = [raw for _ in range(3) for raw, _ in twice]
        script += [data.replace(b"double", b"dOuble"), data, data.replace(b"Host: t", b"Host: T")]
        script += [data.replace(b"-Length: ", b"-Length:  "), data.replace(b"1.1", b"1.0", 1)]
        heard = await play(depot.port, [b"".join(script)])
        found = answers_in(heard)
        assert [a.status for a in found] == [200] * 6 + [404] + [200] * 4
        assert found[-1].headers["connection"] == "close"
        for n, answer in enumerate(found):
            if answer.status == 200:
                values = twice[1 if n > 5 else n % 2][1]
                assert answer.body.endswith(struct.pack("<4f", *values)), n


@in_uvloop
async def test_identical_heads_with_different_bodies_get_each_their_own_answer() -> None:
    """The same length, other bytes: in the data, in the id, in the name, and in the JSON's syntax."""
    bodies = [asking(n, 9 - n, id=str(n)) for n in range(10)]
    bodies[3]["inputs"][0]["name"], bodies[6]["inputs"][0]["shape"] = "y", [2, 1]
    raws = [json.dumps(body).encode() for body in bodies]
    raws.insert(5, b"[" + raws[4][1:])
    raws.insert(8, b"(" + raws[4][1:])
    assert len({len(raw) for raw in raws}) == 1
    async with both() as depots:
        for pieces in ([infer("double", raw) for raw in raws], None):
            script = pieces or [b"".join(infer("double", raw) for raw in raws)]
            heard = await same(depots, [*script, LAST])
            found = answers_in(heard)[:-1]
            bad = [n for n, a in enumerate(found) if a.status == 400]
            assert bad == [3, 5, 7, 8] and len(found) == 12
            for raw, answer in zip(raws, found, strict=True):
                if answer.status == 200:
                    asked, said = json.loads(raw), json.loads(answer.body)
                    assert said["id"] == asked["id"]
                    doubled = [2 * v for v in asked["inputs"][0]["data"]]
                    assert said["outputs"][0]["data"] == doubled


@in_uvloop
async def test_what_comes_behind_a_head_that_is_known_is_read_as_ever() -> None:
    """The first request of a connection is its piece of data; then come others with the same head, and
    in the same pieces what follows them."""
    known = {"small": binary(1, 2), "JSON": infer(), "large": wide(200_000)}
    async with both(lambda: Manners(room_from=65_536)) as depots:
        for label, raw in known.items():
            top = raw.index(b"\r\n\r\n") + 4
            for behind in (
                raw,
                infer("none"),
                infer("slow") + raw,
                head("GET", "/v2/models/double"),
                b"",
            ):
                for said in (raw + behind, raw + raw + behind):
                    for place in (top, top + 1, top + 5, len(raw) - 1, len(raw), len(said) - 1):
                        script = [raw, said[:place], said[place:], LAST]
                        heard = await same(depots, script)
                        expected = 2 + (len(said) - len(raw) - len(behind)) // len(raw)
                        expected += {b"": 0}.get(behind, 1 + (b"slow" in behind))
                        assert len(statuses(heard)) == expected + 1, (label, place)
        for depot in depots:
            await depot.quiet()


@in_uvloop
async def test_where_a_stream_is_cut_makes_no_difference() -> None:
    """In two, at every byte: in heads, bodies, between them, and in the request behind."""
    chunks = chunked(cut(BODY, 30), extension=b";a=b", trailers=b"X-A: b\r\n")
    async with both() as depots:
        for stream in (binary(1, 2) + LAST, chunks + LAST):
            whole = await same(depots, stream)
            assert statuses(whole) == [200] * 2
            for place in range(1, len(stream)):
                assert await same(depots, [stream[:place], stream[place:]]) == whole, place
            assert await same(depots, cut(stream, 1)) == whole
