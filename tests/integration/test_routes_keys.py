"""On both routes: who may ask, request by request, and what is counted and noted of it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from server import auth
from tests.integration.test_routes_bodies import binary, chunked, cut
from tests.routes import (
    BOTH,
    CLOSE,
    INFER,
    Depot,
    asking,
    both,
    each_route,
    in_uvloop,
    infer,
    play,
    routed,
    same,
    statuses,
)
from tests.wire import connected, head, post

KEYS = {"inference": "key-i", "admin": "key-a", "metrics": "key-m"}
GOOD, ADMIN, WEAK = ("x-api-key: " + KEYS[k] for k in ("inference", "admin", "metrics"))


def write_keys(path: Path, **keys: str) -> Path:
    """Whole at once, as a deployment would."""
    lines = ["keys:"]
    for name, key in keys.items():
        digest = hashlib.sha256(key.encode()).hexdigest()
        scope = name.partition("_")[0]
        lines.append(f'  - {{name: {name}, sha256: "{digest}", scopes: [{scope}]}}')
    fresh = path.with_suffix(".new")
    fresh.write_text("\n".join(lines) + "\n")
    os.replace(fresh, path)
    return path


def spoil(path: Path) -> None:
    path.write_text("keys: [")


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return write_keys(tmp_path / "keys.yaml", **KEYS)


SAID: dict[str, tuple[tuple[str, ...], int]] = {
    "no key": ((), 401),
    "a good key": ((GOOD,), 200),
    "a good key as a bearer": (("Authorization: Bearer key-i",), 200),
    "a bearer in small letters": (("authorization: bearer key-i",), 200),
    "the admin's": ((ADMIN,), 200),
    "a key for something else": ((WEAK,), 403),
    "an unknown key": (("x-api-key: key-x",), 401),
    "half a key": (("x-api-key: key-",), 401),
    "an empty key": (("x-api-key:",), 401),
    "a long key": (("x-api-key: " + "k" * 5000,), 401),
    "another scheme": (("Authorization: Basic key-i",), 401),
    "no scheme": (("Authorization: key-i",), 401),
    "an empty bearer": (("Authorization: Bearer",), 401),
    "no ASCII": (("x-api-key: k\xe9y",), 401),
    "a bearer over a key": (("x-api-key: key-i", "Authorization: Bearer key-x"), 401),
    "a bearer over a bad key": (("x-api-key: key-x", "Authorization: Bearer key-i"), 200),
    "a second key": (("x-api-key: key-x", "x-api-key: key-i"), 200),
    "a good key before a bad": (("x-api-key: key-i", "x-api-key: key-x"), 401),
    "blanks around it": (("x-api-key:   key-i  ",), 200),
    "with an Origin": ((GOOD, "Origin: http://evil.example"), 200),
    "with another host": ((GOOD, "Host: evil.example"), 200),
}


@in_uvloop
async def test_every_way_to_show_a_key_is_judged_alike(keys: Path) -> None:
    async with both(api_keys=keys) as depots:
        for label, (said, status) in SAID.items():
            for raw in (infer("double", None, *said), binary(1, 2, more=said),
                        chunked(cut(json.dumps(asking()).encode(), 9), *said)):  # fmt: skip
                heard = await same(depots, [raw, infer("double", None, CLOSE, GOOD)])
                assert statuses(heard) == ([200, 200] if status == 200 else [status]), label
        for raw in (infer("none"), post(INFER, b"{"), infer("%00"), infer("../x"),
                    infer("double", None, "Content-Encoding: gzip"),
                    head("POST", INFER, "Content-Length: 999999999999"),
                    post(INFER + "/", asking()), post("/" + INFER, asking())):  # fmt: skip
            heard = await same(depots, [raw, infer()])
            assert statuses(heard) == [401]  # who may not ask learns nothing else
        counts = [await depot.counts() for depot in depots]
        assert counts[0] == counts[1]
        assert counts[0]['auth_failures_total{scope="inference"}'] > 30


@in_uvloop
async def test_a_key_is_asked_for_with_every_request_of_a_connection(keys: Path) -> None:
    good, bad = infer("double", None, GOOD), infer("double", None, WEAK)
    async with both(api_keys=keys) as depots:
        for script in ([good * 3 + bad + good], [good] * 3 + [bad, good], [good, infer(), good]):
            heard = await same(depots, script)
            assert statuses(heard)[-1] in (401, 403) and set(statuses(heard)[:-1]) == {200}
        # a head that is as long as the one that was let in, and differs in the key alone
        heard = await same(depots, [good, good, good.replace(b"key-i", b"key-x"), good])
        assert statuses(heard) == [200, 200, 401]


@each_route
@in_uvloop
async def test_a_key_that_was_taken_away_is_refused_on_a_connection_that_it_opened(
    route: str, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 2 s, says the README; here the file is looked at for every request."""
    monkeypatch.setattr(auth, "LOOK_S", 0.0)
    requests = [infer("double", None, GOOD), binary(1, 2, more=(GOOD,))]
    async with routed(route, api_keys=keys) as depot:
        for n, raw in enumerate(requests):
            write_keys(keys, **KEYS)
            async with connected(depot.port) as wire, connected(depot.port) as other:
                for one in (wire, other) * 3:
                    await one.send(raw)
                    assert (await one.answer()).status == 200
                write_keys(keys, inference=f"another{n}", admin=KEYS["admin"])
                await wire.send(raw)
                answer = await wire.answer()
                assert answer.status == 401 and answer.headers["connection"] == "close"
                assert await wire.end() == b""
                # the other one's new key, and a file that is spoilt, which keeps the keys that were
                await other.send(raw.replace(b"key-i", f"another{n}".encode()))
                assert (await other.answer()).status == 200
                spoil(keys)
                await other.send(raw.replace(b"key-i", f"another{n}".encode()))
                assert (await other.answer()).status == 200
                await other.send(raw)
                assert (await other.answer()).status == 401


@each_route
@in_uvloop
async def test_a_key_that_is_taken_away_amid_a_request_counts_for_the_next(
    route: str, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "LOOK_S", 0.0)
    raw = infer("held", None, GOOD)
    async with routed(route, api_keys=keys) as depot, connected(depot.port) as wire:
        await wire.send(raw)
        await depot.models.asked.wait()
        write_keys(keys, admin=KEYS["admin"])
        await wire.send(raw)
        depot.models.release()
        assert [(await wire.answer()).status for _ in range(2)] == [200, 401]


@in_uvloop
async def test_without_keys_only_this_machine_is_served() -> None:
    plain = infer()
    origins = {"http://t": 200, "http://evil.example": 403, "null": 403, "": 403, "https://t": 200}
    hosts = {"localhost": 200, "localhost:8000": 200, "127.0.0.1": 200, "[::1]:80": 200,
             "evil.example": 403, "evil.example:80": 403, "10.1.2.3": 200, "": 200}  # fmt: skip
    async with both() as depots:
        for origin, status in origins.items():
            heard = await same(depots, [infer("double", None, f"Origin: {origin}"), *[plain] * 2,
                                        infer("double", None, CLOSE)])  # fmt: skip
            assert statuses(heard) == ([200] * 4 if status == 200 else [403]), origin
        for host, status in hosts.items():
            raw = infer("double", None, CLOSE).replace(b"Host: t", f"Host: {host}".encode())
            # behind one that was let in, whose head is known
            assert statuses(await same(depots, [plain, plain, raw])) == [200, 200, status], host
        raw = infer().replace(b"Host: t\r\n", b"")
        assert len(set(statuses(await same(depots, [raw, infer("double", None, CLOSE)])))) == 1


# who counts ---------------------------------------------------------------------------------------


def stream() -> Iterator[bytes]:
    """Something of everything that is counted or noted."""
    for model in ("double", "next", "slow", "broken", "full", "gone", "stuck", "none", "org/name",
                  "double/versions/1", "double/versions/7", "%00", "large"):  # fmt: skip
        yield infer(model, asking(5, 5), GOOD)
        yield binary(1, 2, 3, 4, model=model, more=(GOOD,))
        yield infer(model, b"{", GOOD)
    yield post("/v1/models/load", {"model_name": "double"}, ADMIN)
    yield post("/v1/models/load", {"model_name": "double"}, GOOD)
    yield post("/v1/models/unload", {"model_name": "no\nsuch"}, ADMIN)
    yield infer("double", asking(parameters={"timeout": "x"}), GOOD)
    yield head("DELETE", INFER, ADMIN)
    yield head("GET", INFER, GOOD)
    yield infer("double", None, WEAK)


async def asked_all(depot: Depot) -> None:
    for raw in stream():
        one, script = infer("double", None, GOOD), raw.partition(b"\r\n")
        closing = script[0] + b"\r\n" + CLOSE.encode() + b"\r\n" + script[2]
        await play(depot.port, [one, closing])
        await play(depot.port, cut(closing, 100))


@in_uvloop
async def test_the_routes_count_and_note_the_same(
    keys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    noted, counts = [], []
    for route in BOTH:
        async with routed(route, api_keys=keys) as depot:
            caplog.clear()
            with caplog.at_level(logging.INFO):
                await asked_all(depot)
                await depot.quiet()
            lines = [(r.name, r.levelname, r.getMessage()) for r in caplog.records]
            noted.append([(*a, VOLATILE.sub("", b)) for *a, b in lines])
            counts.append({k: n for k, n in (await depot.counts()).items() if n})
    assert noted[0] == noted[1]
    assert {name for name, *_ in noted[0]} == {"modeldepot.audit", "server.errors"}
    assert counts[0] == counts[1]
    outcomes = {found[1] for key in counts[0] if (found := re.search('outcome="([a-z_]+)"', key))}
    assert outcomes == {"success", "rejected", "backend_error", "bad_request"}


VOLATILE = re.compile(r"took=[0-9.]+s|request=[0-9a-f]{32}|client=\S+")


@each_route
@in_uvloop
async def test_what_is_in_flight_is_shown_while_it_is(route: str) -> None:
    async with routed(route) as depot:
        key = 'inference_in_flight{model="held",version="1"}'
        async with connected(depot.port) as one, connected(depot.port) as two:
            await one.send(infer("held"))
            await two.send(infer("held"))
            await depot.until(lambda: len(depot.models.waiting) == 2)
            assert (await depot.counts())[key] == 2
            depot.models.release()
            assert [(await wire.answer()).status for wire in (one, two)] == [200, 200]
        await depot.quiet()
        assert (await depot.counts())[key] == 0
