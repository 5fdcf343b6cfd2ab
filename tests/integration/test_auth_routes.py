"""Every route that is registered, walked without a key, with a weak one, and in odd spellings."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import pytest_asyncio
from litestar.utils import normalize_path

from server.app import ModelDepot, build_app
from server.auth import Scope, scope_of
from server.settings import Settings
from tests.fakes.repository import FakeRepository
from tests.fakes.serving import Client, serving, staying

KEYS = {"inference": "key-i", "admin": "key-a", "metrics": "key-m"}
OPEN = {"/", "/docs", "/health", "/openapi.json", "/v2/health/live", "/v2/health/ready"}
RAW = (  # routes that Litestar does not know
    ("POST", "/v2/models/a/infer"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/embeddings"),
)


together = pytest.mark.asyncio(loop_scope="module")  # with one app for all routes


def write_keys(path: Path) -> Path:
    lines = ["keys:\n"]
    for scope, key in KEYS.items():
        digest = hashlib.sha256(key.encode()).hexdigest()
        lines.append(f'  - {{name: {scope}, sha256: "{digest}", scopes: [{scope}]}}\n')
    path.write_text("".join(lines))
    return path


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    return write_keys(tmp_path / "keys.yaml")


def depot() -> FakeRepository:
    models = FakeRepository()
    models.add("a", loaded=True)
    return models


def registered(app: ModelDepot) -> Iterator[tuple[str, str]]:
    """Every method and path, path parameters filled in."""
    for route in app.routes:
        path = "/".join("a" if part.startswith("{") else part for part in route.path.split("/"))
        for method in sorted(getattr(route, "methods", ())):
            yield method, path
    yield from RAW


ROUTES = sorted(set(registered(build_app(depot(), Settings()))))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gate(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Client, list[Any]]]:
    """An app, and the calls that got through to its models, which no test should add to."""
    models = depot()
    key_file = write_keys(tmp_path_factory.mktemp("gate") / "keys.yaml")
    async with staying(models, api_keys=key_file) as client:
        yield client, models.calls


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def admin(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Client]:
    """For who may do everything, and does: what became of the models is nobody's matter."""
    key_file = write_keys(tmp_path_factory.mktemp("admin") / "keys.yaml")
    async with staying(depot(), KEYS["admin"], api_keys=key_file) as client:
        yield client


def spellings(path: str) -> set[str]:
    """What a proxy or an attacker might make of a path, and a careless server might undo."""
    first, _, rest = path[1:].partition("/")
    found = {
        f"{path}/",
        f"/{path}",
        f"{path}//",
        path.upper(),
        path.replace("/", "//"),
        path.replace("/", "%2f"),
        path.replace("e", "%65").replace("a", "%61"),
        f"/./{path[1:]}",
        f"/x/..{path}",
        f"/health/..{path}",
        f"/health/%2e%2e{path}",
        f"/v2/health/live/../../..{path}",
        f"/{first}/%2e/{rest}",
        f"{path};/health",
        f"{path}?/health",
        f"{path}%00",
        f"{path}%20",
        f"{path}/infer",
        f"/v2/models/..{path}",
    }
    return found - {path}


def test_the_walk_sees_all_the_faces() -> None:
    paths = {path for _, path in ROUTES}
    assert {"/v1/models/load", "/v1/models/a", "/v1/events", "/metrics", "/v2"} <= paths | {"/v2"}
    assert len(ROUTES) > 15


@together
@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_without_a_key_only_the_open_routes_answer(
    gate: tuple[Client, list[Any]], method: str, path: str
) -> None:
    client, calls = gate
    answer = await client.request(method, path, json={"model_name": "a"})
    if path in OPEN and method == "GET":
        assert answer.status_code == 200
    elif path.startswith("/docs/") and method == "GET":
        assert answer.status_code == 404  # no part of the page
    else:
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert {"error", "message"} & set(answer.json())  # each face in its own words
    assert calls == []


@together
@pytest.mark.parametrize(("method", "path"), [r for r in ROUTES if scope_of(*r) is Scope.ADMIN])
@pytest.mark.parametrize("key", ["inference", "metrics"])
async def test_an_admin_route_refuses_every_weaker_key(
    gate: tuple[Client, list[Any]], method: str, path: str, key: str
) -> None:
    client, calls = gate
    headers = {"authorization": f"Bearer {KEYS[key]}"}
    answer = await client.request(method, path, json={"model_name": "a"}, headers=headers)
    assert answer.status_code == 403 and key in answer.text
    assert calls == []


@together
@pytest.mark.parametrize(("method", "path"), [r for r in ROUTES if r[1] != "/v1/events"])
async def test_an_admin_key_passes_everywhere(admin: Client, method: str, path: str) -> None:
    answer = await admin.request(method, path, json={"model_name": "a"})
    assert answer.status_code not in (401, 403)


async def ask(
    app: ModelDepot, method: str, raw: str, *headers: tuple[bytes, bytes], root: str = ""
) -> int:
    """The status of a request whose path is sent as it is, shown to the app as uvicorn does. The
    client leaves once its body is sent."""
    path, _, query = raw.partition("?")
    scope = {
        "type": "http",
        "method": method,
        "path": unquote(path),
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": root,
        "headers": [(b"host", b"test"), (b"content-type", b"application/json"), *headers],
    }
    messages = [{"type": "http.request", "body": b'{"model_name": "a"}', "more_body": False}]
    statuses: list[int] = []

    async def receive() -> dict[str, Any]:
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    await app(scope, receive, send)
    return statuses[0] if statuses else 0


@together
@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_no_spelling_of_a_path_gets_past_the_gate(
    gate: tuple[Client, list[Any]], method: str, path: str
) -> None:
    """Without a key nothing but the open routes answers; with an inference key nothing of an
    admin's is ever done."""
    client, calls = gate
    for spelling in sorted(spellings(path)):
        status = await ask(client.app, method, spelling)
        allowed = (200, 401) if path in OPEN and method == "GET" else (401,)
        plain = normalize_path(unquote(spelling.partition("?")[0]))
        if plain.startswith("/docs/") and method == "GET":
            allowed = (200, 401, 404)  # nothing but the parts of a page is below it
        assert status in allowed, spelling
        key = (b"x-api-key", KEYS["inference"].encode())
        status = await ask(client.app, method, spelling, key)
        assert status != 401, spelling
    assert calls == []


async def test_a_root_path_moves_nothing_past_the_gate(key_file: Path) -> None:
    """What is checked as a model's page is not then routed to the metrics."""
    async with serving(depot(), api_keys=key_file) as client:
        key = (b"x-api-key", KEYS["inference"].encode())
        path, root = "/v1/models/a/metrics", "/v1/models/a"
        assert await ask(client.app, "GET", path, key, root=root) == 404


async def test_extra_slashes_change_neither_the_right_nor_the_route(key_file: Path) -> None:
    key = (b"x-api-key", KEYS["inference"].encode())
    async with serving(depot(), api_keys=key_file) as client:
        for path in ("//v1//models/status/", "/v1/models//a", "/v1/models/"):
            assert await ask(client.app, "GET", path, key) == 200
        assert await ask(client.app, "GET", "//health/") == 200
        body: dict[str, Any] = {"inputs": []}
        plain = await client.post("/v2/models/a/infer", json=body, headers=[key])
        odd = await client.post("/v2/models/a//infer/", json=body, headers=[key])
        assert (odd.status_code, odd.content) == (plain.status_code, plain.content)


async def test_metrics_need_their_own_scope(key_file: Path) -> None:
    for key, status in (("inference", 403), ("metrics", 200), ("admin", 200)):
        async with serving(depot(), KEYS[key], api_keys=key_file) as client:
            assert (await client.get("/metrics")).status_code == status


async def test_refusals_are_counted(key_file: Path) -> None:
    async with serving(depot(), api_keys=key_file) as client:
        await client.post("/v1/models/load", json={"model_name": "a"})
        await client.post("/v2/models/a/infer", json={"inputs": []})
        page = (await client.get("/metrics", headers={"x-api-key": KEYS["metrics"]})).text
        assert 'modeldepot_auth_failures_total{scope="admin"} 1.0' in page
        assert 'modeldepot_auth_failures_total{scope="inference"} 1.0' in page


async def test_a_websocket_is_closed_at_the_door() -> None:
    sent: list[object] = []

    async def receive() -> dict[str, str]:
        return {"type": "websocket.connect"}

    async def send(message: object) -> None:
        sent.append(message)

    app = build_app(depot(), Settings())
    await app({"type": "websocket", "path": "/v1/events", "headers": []}, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]
