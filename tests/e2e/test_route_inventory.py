"""Every route of the app on a real server: who may call it, under whatever spelling.

A route that has no row in SCOPES fails the first test: whoever adds one says here who may call it.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from server.app import build_app
from server.auth import TABLE
from server.openapi.calls import OPERATIONS
from server.settings import Settings
from tests.e2e.described import KEYS, key_file
from tests.e2e.lasting import Lasting, lasting
from tests.fakes.repository import FakeRepository
from tests.models import add_onnx

pytestmark = pytest.mark.e2e

# Method, the app's pattern, a path that fits it → the scope that it needs ("": open to everyone).
SCOPES: dict[tuple[str, str, str], str] = {
    ("GET", "/", "/"): "",
    ("GET", "/health", "/health"): "",
    ("GET", "/docs", "/docs"): "",
    ("GET", "/docs/{file:str}", "/docs/start.js"): "",
    ("GET", "/openapi.json", "/openapi.json"): "",
    ("GET", "/v2/health/live", "/v2/health/live"): "",
    ("GET", "/v2/health/ready", "/v2/health/ready"): "",
    ("GET", "/metrics", "/metrics"): "metrics",
    ("GET", "/v1/models", "/v1/models"): "inference",
    ("GET", "/v1/models/status", "/v1/models/status"): "inference",
    ("GET", "/v1/models/{name:path}", "/v1/models/org/name"): "inference",
    ("GET", "/v1/events", "/v1/events"): "inference",
    ("GET", "/v1/devices", "/v1/devices"): "metrics",
    ("GET", "/v1/gpu/status", "/v1/gpu/status"): "inference",
    ("GET", "/v1/gpu/memory", "/v1/gpu/memory"): "inference",
    ("GET", "/v2", "/v2"): "inference",
    ("GET", "/v2/models/{rest:path}", "/v2/models/org/name/ready"): "inference",
    ("GET", "/v2/systemsharedmemory/status", "/v2/systemsharedmemory/status"): "inference",
    (
        "GET",
        "/v2/systemsharedmemory/region/{name:str}/status",
        "/v2/systemsharedmemory/region/r/status",
    ): "inference",
    ("POST", "/v2/systemsharedmemory/unregister", "/v2/systemsharedmemory/unregister"): "inference",
    (
        "POST",
        "/v2/systemsharedmemory/region/{name:str}/unregister",
        "/v2/systemsharedmemory/region/r/unregister",
    ): "inference",
    (
        "POST",
        "/v2/systemsharedmemory/region/{name:str}/register",
        "/v2/systemsharedmemory/region/r/register",
    ): "inference",
    ("GET", "/v2/cudasharedmemory/status", "/v2/cudasharedmemory/status"): "inference",
    (
        "GET",
        "/v2/cudasharedmemory/region/{name:str}/status",
        "/v2/cudasharedmemory/region/r/status",
    ): "inference",
    ("POST", "/v2/cudasharedmemory/unregister", "/v2/cudasharedmemory/unregister"): "inference",
    (
        "POST",
        "/v2/cudasharedmemory/region/{name:str}/unregister",
        "/v2/cudasharedmemory/region/r/unregister",
    ): "inference",
    (
        "POST",
        "/v2/cudasharedmemory/region/{name:str}/register",
        "/v2/cudasharedmemory/region/r/register",
    ): "inference",
    ("GET", "/models", "/models"): "inference",
    ("GET", "/device/cpu", "/device/cpu"): "inference",
    ("GET", "/device/cuda", "/device/cuda"): "inference",
    ("GET", "/adapters", "/adapters"): "inference",
    ("GET", "/adapters/{adapter:str}", "/adapters/a1"): "inference",
    ("GET", "/models/{model:str}/adapters", "/models/org/name/adapters"): "inference",
    ("GET", "/models/{model:str}/adapters/{adapter:str}", "/models/add/adapters/a1"): "inference",
    ("POST", "/v2/models/*/infer", "/v2/models/add/infer"): "inference",
    ("POST", "/v2/models/*/generate", "/v2/models/add/generate"): "inference",
    ("POST", "/v2/models/*/generate_stream", "/v2/models/add/generate_stream"): "inference",
    ("POST", "/v2/models/{rest:path}", "/v2/models/add/trace/setting"): "admin",
    ("GET", "/v2/trace/setting", "/v2/trace/setting"): "metrics",
    ("POST", "/v2/trace/setting", "/v2/trace/setting"): "admin",
    ("GET", "/v2/logging", "/v2/logging"): "metrics",
    ("POST", "/v2/logging", "/v2/logging"): "admin",
    ("POST", "/v2/repository/index", "/v2/repository/index"): "inference",
    ("POST", "/v2/repository/{rest:path}", "/v2/repository/models/add/load"): "admin",
    ("POST", "/v2/repository/{rest:path}", "/v2/repository/models/org/name/unload"): "admin",
    ("POST", "/v1/completions", "/v1/completions"): "inference",
    ("POST", "/v1/chat/completions", "/v1/chat/completions"): "inference",
    ("POST", "/v1/embeddings", "/v1/embeddings"): "inference",
    ("POST", "/v1/models/load", "/v1/models/load"): "admin",
    ("POST", "/v1/models/unload", "/v1/models/unload"): "admin",
    ("POST", "/v1/models/unload-all", "/v1/models/unload-all"): "admin",
    ("POST", "/v1/models/sleep", "/v1/models/sleep"): "admin",
    ("POST", "/v1/models/wake", "/v1/models/wake"): "admin",
    ("POST", "/v1/models/pin", "/v1/models/pin"): "admin",
    ("POST", "/v1/gpu/purge", "/v1/gpu/purge"): "admin",
    ("POST", "/v1/load_model", "/v1/load_model"): "admin",
    ("POST", "/v1/unload_model", "/v1/unload_model"): "admin",
    ("DELETE", "/models", "/models?model_name=add"): "admin",
    ("POST", "/adapters", "/adapters?name=a1&src=a1"): "admin",
    ("DELETE", "/adapters/{adapter:str}", "/adapters/a1"): "admin",
    ("POST", "/adapters/{adapter:str}/update", "/adapters/a1/update?pin=true"): "admin",
    ("POST", "/models/{model:str}/adapters", "/models/add/adapters?name=a1&src=a1"): "admin",
    ("DELETE", "/models/{model:str}/adapters/{adapter:str}", "/models/add/adapters/a1"): "admin",
    (
        "POST",
        "/models/{model:str}/adapters/{adapter:str}/update",
        "/models/org/name/adapters/a1/update",
    ): "admin",
}
OPEN = [path for (_, _, path), need in SCOPES.items() if not need]
VERBS = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "DELETE", "PATCH", "TRACE", "BREW")
MAY = {
    "inference": {"inference"},
    "metrics": {"metrics"},
    "admin": {"inference", "metrics", "admin"},
}
BODY = json.dumps({"model_name": "add"}).encode()


def spellings(path: str) -> set[str]:
    """What a proxy or an attacker might make of a path, and a careless server might undo."""
    plain, mark, query = path.partition("?")
    first, _, rest = plain[1:].partition("/")
    found = {
        f"{plain}/", f"/{plain}", f"{plain}//", plain.replace("/", "//"), plain.upper(),
        plain.title(), plain.replace("/", "%2F"), f"/{plain[1:].replace('/', '%2F')}",
        plain.replace("/", "%2f", 2).replace("%2f", "/", 1), plain.replace("/", "/%2e/"),
        plain.replace("e", "%65").replace("a", "%61"), plain.replace("/", "%252F"),
        f"/./{plain[1:]}", f"/{first}/./{rest}", f"/x/..{plain}", f"/health/..{plain}",
        f"/health/%2e%2e{plain}", f"/docs/..{plain}", f"/docs/%2e%2e{plain}", f"/docs{plain}",
        f"/docs/%2e%2e%2f{plain[1:]}", f"/openapi.json{plain}", f"{plain};/health", f"{plain}%00",
        f"{plain}%20", f"{plain}%23/health", f"/v2/health/live/../../..{plain}", f"{plain}\\..\\health",
    }  # fmt: skip
    return {f"{one}{mark}{query}" for one in found} - {path}


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


class Wire:
    """Paths go out as they are written."""

    def __init__(self, port: int) -> None:
        self._line = http.client.HTTPConnection("127.0.0.1", port, timeout=40)

    def ask(self, method: str, path: str, key: str = "") -> Answer:
        line = self._line
        line.putrequest(method, path, skip_accept_encoding=True)
        body = BODY if method not in ("GET", "HEAD", "OPTIONS", "TRACE") else b""
        line.putheader("content-length", str(len(body)))
        line.putheader("content-type", "application/json")
        if key:
            line.putheader("x-api-key", key)
        line.endheaders(body or None)
        answer = line.getresponse()
        headers = {name.lower(): value for name, value in answer.getheaders()}
        if headers.get("content-type", "").startswith("text/event-stream"):
            line.close()
            return Answer(answer.status, headers, b"")
        return Answer(answer.status, headers, answer.read())

    def close(self) -> None:
        self._line.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lasting]:
    folder = tmp_path_factory.mktemp("inventory")
    for name in ("add", "org/name"):
        add_onnx(folder / "models" / name / "1" / "model.onnx")
    with lasting(folder / "models", "--api-keys", str(key_file(folder / "keys.yaml"))) as running:
        yield running


@pytest.fixture
def wire(server: Lasting) -> Iterator[Wire]:
    with closing(Wire(server.port)) as wire:
        yield wire


def truth(server: Lasting) -> Any:
    """All that a refused request must not change."""
    headers = {"x-api-key": KEYS["admin"]}
    with httpx.Client(base_url=server.url, headers=headers, timeout=40) as client:
        pages = [client.get(f"/v1/models/{name}").json() for name in ("add", "org/name")]
    return [(page["state"], page["wanted"], len(page["generations"][0]["story"])) for page in pages]


def shape_fault(path: str, answer: Answer) -> str:
    """Whether a refusal looks as its face's clients expect."""
    if answer.headers.get("content-type") != "application/json":
        return f"{answer.headers.get('content-type')}"
    found = json.loads(answer.body)
    if path.startswith("/v2"):
        good = set(found) == {"error"} and isinstance(found["error"], str)
    elif path.startswith(("/models/", "/adapters")):
        good = set(found) == {"code", "type", "message"} and found["code"] == answer.status
    elif path.startswith(("/models", "/device/")):
        good = set(found) == {"message", "code", "type", "link"}
    elif path in ("/v1/load_model", "/v1/unload_model"):
        good = found["error"]["code"] == answer.status and set(found) == {"error"}
    elif path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings"):
        good = set(found) == {"error"} and set(found["error"]) >= {
            "message",
            "type",
            "param",
            "code",
        }
    else:
        good = set(found) == {"error", "detail"} and found["error"]["message"] == found["detail"]
    return "" if good else f"looks otherwise: {answer.body[:200]!r}"


def test_every_route_of_the_app_has_a_row_here_and_every_row_a_route(tmp_path: Path) -> None:
    app = build_app(FakeRepository(), Settings(repo=tmp_path))
    known = {
        (method, route.path)
        for route in app.routes
        for method in getattr(route, "methods", ())
        if method not in ("HEAD", "OPTIONS")
    }
    known |= {("POST", path) for path in app.raw_paths}
    assert {(method, pattern) for method, pattern, _ in SCOPES} == known


def test_every_route_of_the_app_is_in_the_document_and_nothing_else() -> None:
    raw = ("infer", "generate", "generate_stream")

    def pattern_of(path: str, route: str) -> str:
        verb = path.rpartition("/")[2]
        return f"/v2/models/*/{verb}" if verb in raw else route or path

    described = {(op.method, pattern_of(op.path, op.route)) for op in OPERATIONS}
    assert described == {(method, pattern) for method, pattern, _ in SCOPES}


def test_every_row_of_the_gates_table_opens_a_route_that_is_listed_here() -> None:
    found = [(method, path.partition("?")[0], need) for (method, _, path), need in SCOPES.items()]
    for row in TABLE:
        needs = {
            need
            for method, path, need in found
            if method in row.methods and (path + "/").startswith(row.path.rstrip("/") + "/")
        }
        assert (row.scope or "") in needs, row


def test_without_a_key_only_the_open_routes_answer(wire: Wire, server: Lasting) -> None:
    before, wrong = truth(server), []
    for (method, _, path), need in SCOPES.items():
        answer = wire.ask(method, path)
        if not need:
            if answer.status != 200:
                wrong.append((method, path, answer.status))
            continue
        if answer.status != 401 or answer.headers.get("www-authenticate") != "Bearer":
            wrong.append((method, path, answer))
        elif fault := shape_fault(path.partition("?")[0], answer):
            wrong.append((method, path, fault))
    assert wrong == []
    assert truth(server) == before


def test_a_key_without_the_scope_is_refused_in_the_faces_own_words(
    wire: Wire, server: Lasting
) -> None:
    before, wrong = truth(server), []
    for (method, _, path), need in SCOPES.items():
        for name, key in KEYS.items():
            if not need or need in MAY[name]:
                continue
            answer = wire.ask(method, path, key)
            if answer.status != 403:
                wrong.append((method, path, name, answer))
            elif fault := shape_fault(path.partition("?")[0], answer):
                wrong.append((method, path, name, fault))
    assert wrong == []
    assert truth(server) == before


def test_a_key_with_the_scope_is_let_in(wire: Wire) -> None:
    wrong = []
    for (method, _, path), need in SCOPES.items():
        for name, key in KEYS.items():
            if need != "admin" and (not need or need in MAY[name]):
                status = wire.ask(method, path, key).status
                if status in (401, 403):
                    wrong.append((method, path, name, status))
    assert wrong == []


def test_no_spelling_opens_a_route(wire: Wire, server: Lasting) -> None:
    before, wrong = truth(server), []
    weak = KEYS["metrics"]
    for (method, _, path), need in SCOPES.items():
        if not need:
            continue
        for spelling in sorted(spellings(path)):
            # Below /docs all is open, and there is nothing but the parts of a page.
            refused = {401, 400} | ({404} if spelling.startswith("/docs/") else set())
            answer = wire.ask(method, spelling)
            if answer.status not in refused:
                wrong.append((method, spelling, answer.status))
            if need == "admin":
                answer = wire.ask(method, spelling, KEYS["inference"])
                if answer.status not in (403, 404, 405, 400):
                    wrong.append((method, spelling, "inference", answer.status))
            if need != "metrics" and wire.ask(method, spelling, weak).status not in (403, 404, 400):
                wrong.append((method, spelling, "metrics"))
    assert wrong == []
    assert truth(server) == before


def test_no_other_verb_opens_a_route(wire: Wire, server: Lasting) -> None:
    before, wrong = truth(server), []
    known = {(method, path) for method, _, path in SCOPES}
    for path in sorted({path for _, path in known}):
        for verb in VERBS:
            if (verb, path) in known:
                continue
            head_of_open = verb == "HEAD" and path in OPEN
            allowed = {200, 405} if head_of_open else {401, 400, 405, 501}
            answer = wire.ask(verb, path)
            if answer.status not in allowed or (answer.status == 405 and path not in OPEN):
                wrong.append((verb, path, answer.status))
            if verb not in ("HEAD", "GET"):
                answer = wire.ask(verb, path, KEYS["inference"])
                if answer.status not in (403, 400, 405, 501):
                    wrong.append((verb, path, "inference", answer.status))
    assert wrong == []
    assert truth(server) == before
