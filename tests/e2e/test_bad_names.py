"""Names that could never be a model's, on every route of a real server, in every spelling of a URL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from repository.names import RESERVED_NAMES
from tests.e2e.siege import GOOD, Siege, besieged
from tests.wire import Answer, head, post

pytestmark = pytest.mark.e2e

LOAD, UNLOAD = "/v1/models/load", "/v1/models/unload"
MADE_UP = "madeup"  # in every name, so that it can be looked for afterwards

NAMES = (
    "..", "../" + MADE_UP, "../../etc/passwd", f"{MADE_UP}/../add", "add/..", "org/../add", "add/.",
    f"{MADE_UP}/", f"/{MADE_UP}", "/etc/passwd", "//etc/passwd", f"a//{MADE_UP}", f".{MADE_UP}",
    f"~{MADE_UP}", f"{MADE_UP}\0", "add\0", f"{MADE_UP}\n", f"{MADE_UP} x", f"-{MADE_UP}", "\\..\\add",
    f"..\\{MADE_UP}", f"{MADE_UP}*", f"{MADE_UP}?", f"{MADE_UP}#x", f"{MADE_UP}%00", "%2e%2e",
    "%2e%2e%2fadd", "..%2fadd", "%252e%252e", f"{MADE_UP};x", f"{MADE_UP}:1", "C:add", f"é{MADE_UP}",
    "\u202e" + MADE_UP, "\uff41dd", "add\u200b", f"{MADE_UP}" * 40, MADE_UP * 5000, "a/" * 40 + MADE_UP,
    f"{MADE_UP}/versions/1", f"{MADE_UP}/infer", "org/versions/name", "12345", "file:///etc/passwd",
    f"http://{MADE_UP}", f"s3://{MADE_UP}/x", f"<{MADE_UP}>", f"{{{MADE_UP}}}", f"'{MADE_UP}'",
    f'"{MADE_UP}"', f"${{{MADE_UP}}}", f"{MADE_UP}\r\nX-A: b",
)  # fmt: skip
NOT_NAMES: tuple[Any, ...] = (None, "", 1, 1.5, True, [], ["add"], {}, {"model_name": "add"})


def addresses(name: str) -> Iterator[bytes]:
    """Every request that bears the name in its address, in three spellings."""
    for spelling in {quote(name, safe=""), quote(name, safe="/"), quote(name).replace(".", "%2e")}:
        yield head("GET", f"/v1/models/{spelling}")
        for version in ("", "/versions/1"):
            at = f"/v2/models/{spelling}{version}"
            yield head("GET", at)
            yield head("GET", f"{at}/ready")
            yield post(f"{at}/infer", GOOD)


def orders(name: Any) -> Iterator[bytes]:
    """Every request that bears the name in its body."""
    yield post(LOAD, {"model_name": name})
    yield post(LOAD, {"model_name": name, "force_reload": True})
    yield post(LOAD, {"model_name": name, "dry_run": True})
    yield post(UNLOAD, {"model_name": name})
    if name is not None:
        yield post(UNLOAD, {"model": name})
        yield post(LOAD, {"model_id": name})


async def test_a_bad_name_is_a_clear_4xx_on_every_route_and_changes_nothing(
    tmp_path: Path,
) -> None:
    found: list[tuple[str, Answer]] = []
    async with besieged(tmp_path) as siege:
        await siege.works()
        before = await siege.truth()
        for name in (*NAMES, *NOT_NAMES, *RESERVED_NAMES):
            found += [(f"{r[:40]!r} {name!r:.60}", await siege.ask(r)) for r in orders(name)]
        for name in NAMES:
            found += [(f"{r[:90]!r}", await siege.ask(r)) for r in addresses(name)]
        assert await siege.truth() == before
        assert await siege.check(found, lambda status: status in (400, 403, 404, 405)) == []
        page = (await siege.client.get("/metrics")).text
        assert MADE_UP not in page and "passwd" not in page
        assert 'model="_unknown"' in page


async def spelled(siege: Siege, name: str) -> list[int]:
    version = f"/v2/models/{name}/versions/1"
    requests = (
        head("GET", f"/v1/models/{name}"),
        head("GET", f"/v2/models/{name}"),
        head("GET", f"/v2/models/{name}/ready"),
        head("GET", version),
        head("GET", f"{version}/ready"),
        post(f"/v2/models/{name}/infer", GOOD),
        post(f"{version}/infer", GOOD),
    )
    return [(await siege.ask(raw)).status for raw in requests]


async def test_a_nested_model_is_reached_on_every_route_also_with_its_slash_encoded(
    tmp_path: Path,
) -> None:
    async with besieged(tmp_path) as siege:
        for name in ("org/name", "org%2Fname", "org%2fname", "%6frg/n%61me", "org//name"):
            assert await spelled(siege, name) == [200] * 7, name
        for path in (UNLOAD, LOAD):
            assert (await siege.ask(post(path, {"model_name": "org/name"}))).status == 200
        assert await siege.works("org/name")
        shown = (await siege.client.get("/v1/models/org%2Fname")).json()
        assert (shown["name"], shown["state"]) == ("org/name", "loaded")


async def test_a_body_that_is_no_order_is_a_clear_4xx_and_names_what_is_near(
    tmp_path: Path,
) -> None:
    deep = (b"[" * 10_000, b"[" * 1_000_000, b'{"model_name":' * 10_000, b'{"z":' * 10**6)
    bodies: dict[bytes, str] = {
        b"": "empty",
        b"{": "JSON",
        b"[]": "object",
        b"null": "object",
        b"\xff\xfe": "JSON",
        b'{"model_nam": "add"}': "did you mean 'model_name'?",
        b'{"model_name": "add", "force": true}': "did you mean 'force_reload'?",
        b'{"model_name": "add", "dryrun": true}': "did you mean 'dry_run'?",
        b'{"model_name": "add", "force_reload": "yes"}': "force_reload",
        b'{"model_name": "add", "force_reload": 1}': "force_reload",
        b'{"model_name": "add", "model": "org/name"}': "more than one",
        b'{"model_name": "\\ud800"}': "JSON",
        b'{"model_name": "add", "' + b"k" * 10**5 + b'": 1}': "unknown field",
        b'{"model_name": ' + b"9" * 10**5 + b"}": "model_name",
        b'{"model_name": "' + b"n" * 10**6 + b'"}': "1000000 characters",
        b"[" * (1 << 20): "object",
        **dict.fromkeys(deep, ""),
    }
    async with besieged(tmp_path) as siege:
        before = await siege.truth()
        found, untold = [], []
        for body, told in bodies.items():
            answer = await siege.ask(post(LOAD, body))
            found.append((repr(body[:60]), answer))
            if told not in answer.text:
                untold.append((body[:60], told, answer.text))
        large = await siege.ask(post(LOAD, b" " * ((1 << 20) + 1)))
        form = await siege.ask(
            post(LOAD, b"a=b", "Content-Type: application/x-www-form-urlencoded")
        )
        assert (large.status, form.status) == (413, 415)
        assert await siege.check([*found, ("form", form), ("large", large)], is_refused) == []
        assert untold == []
        assert await siege.ask(post("/v1/models/unload-all", b"[" * 10_000))
        assert (await siege.truth()).keys() == before.keys()


def is_refused(status: int) -> bool:
    return status in (400, 413, 415)


async def test_other_verbs_are_405_and_other_addresses_404_in_json(tmp_path: Path) -> None:
    known = {
        "/health": "GET", "/metrics": "GET", "/v1/models": "GET", "/v1/models/status": "GET",
        "/v1/models/add": "GET", LOAD: "POST", UNLOAD: "POST", "/v1/models/unload-all": "POST",
        "/v1/events": "GET", "/v2": "GET", "/v2/health/live": "GET", "/v2/health/ready": "GET",
        "/v2/models/add": "GET", "/v2/models/add/ready": "GET", "/v2/models/add/infer": "POST",
        "/v2/models/org/name/versions/1/infer": "POST", "/": "GET", "/docs": "GET",
        "/openapi.json": "GET", "/v2/repository/index": "POST",
    }  # fmt: skip
    missing = (
        "/v1", "/v3", "/v1/model", "/v1/models2", "/v2/health", "/v2/repository",
        "/openapi", "/schema", "/favicon.ico", "/.env", "/health/x", "/metrics/x",
        "/v1/events/x", "/v2/models/infer", "/etc/passwd", "/../etc/passwd", "/%2e%2e/etc/passwd",
        "/V1/models", "/v1/Models/load",
    )  # fmt: skip
    async with besieged(tmp_path) as siege:
        before = await siege.truth()
        wrong, found = [], []
        for path, verb in known.items():
            for other in {"GET", "POST", "PUT", "DELETE", "PATCH", "TRACE"} - {verb}:
                answer = await siege.ask(head(other, path, "Content-Length: 0"))
                found.append((f"{other} {path}", answer))
                if answer.status != 405 or verb not in answer.headers.get("allow", ""):
                    wrong.append((other, path, answer))
            bodiless = await siege.ask(head("HEAD", path))
            as_get = verb == "GET" and path != "/v1/events"
            if bodiless.status != (200 if as_get else 405) or bodiless.body:
                wrong.append(("HEAD", path, bodiless))
        for path in missing:
            for verb in ("GET", "POST", "PUT", "DELETE"):
                answer = await siege.ask(head(verb, path, "Content-Length: 0"))
                found.append((f"{verb} {path}", answer))
                if answer.status != 404 and not (path == "/v2/models/infer" and verb != "POST"):
                    wrong.append((verb, path, answer))
        assert wrong == []
        assert await siege.truth() == before
        assert await siege.check(found, lambda status: status in (404, 405)) == []
