"""The OpenAPI document is true: of a real server, its examples are sent and answered as it says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
from openapi_spec_validator import OpenAPIV31SpecValidator, validate

from server.openapi.calls import OPERATIONS
from tests.e2e.described import KEYS, Described, key_file, models_of_the_examples, operations
from tests.e2e.fuzzing import faults_of, operations_of
from tests.e2e.lasting import Lasting, lasting

pytestmark = pytest.mark.e2e

MODELS = ("iris", "tiny-lm", "minilm")
ENDLESS = {"GET /v1/events"}
LAST = ("unload", "purge", "sleep")  # operations that leave the others without their models


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lasting]:
    folder = tmp_path_factory.mktemp("described")
    repo = folder / "models"
    repo.mkdir()
    models_of_the_examples(repo)
    with lasting(repo, "--api-keys", str(key_file(folder / "keys.yaml"))) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Lasting) -> Iterator[httpx.Client]:
    headers = {"x-api-key": KEYS["admin"]}
    with httpx.Client(base_url=server.url, timeout=40, headers=headers) as client:
        yield client


@pytest.fixture(scope="module")
def document(server: Lasting) -> dict[str, Any]:
    """Without a key."""
    answer = httpx.get(f"{server.url}/openapi.json")
    assert answer.status_code == 200
    found: dict[str, Any] = answer.json()
    return found


def test_the_document_is_valid_openapi_3_1(document: dict[str, Any]) -> None:
    assert document["openapi"] == "3.1.0"
    validate(document, cls=OpenAPIV31SpecValidator)
    ids = [op.found["operationId"] for op in operations(document)]
    assert len(ids) == len(set(ids))


def test_every_call_has_words_a_scope_and_examples(document: dict[str, Any]) -> None:
    wrong = []
    tags = {tag["name"] for tag in document["tags"] if tag["description"]}
    for op in operations(document):
        wrong += [f"{op}: no {key}" for key in ("summary", "description") if not op.found[key]]
        if not set(op.found["tags"]) <= tags or not op.found["tags"]:
            wrong.append(f"{op}: tags {op.found['tags']}")
        if bool(op.found["security"]) is not bool(op.found["x-scope"]):
            wrong.append(f"{op}: x-scope and security differ")
        wrong += [
            f"{op}: {p['name']} without example" for p in op.params("path") if "example" not in p
        ]
        if "requestBody" in op.found and not list(op.requests()):
            wrong.append(f"{op}: no request example")
        for status, media, _, examples in op.answers():
            if not examples and media != "application/octet-stream":
                wrong.append(f"{op}: {status} {media} without example")
        guarded = {"401", "403"} if op.found["x-scope"] else set()
        failing = {s for s, *_ in op.answers() if s >= "400"}
        if not guarded <= failing:
            wrong.append(f"{op}: no body for {guarded - failing}")
    assert wrong == []


def test_the_words_of_a_handler_are_in_the_document_under_its_tag() -> None:
    for op in OPERATIONS:
        if op.handler is not None:
            assert list(op.handler.tags) == [op.face.name], op.path
            assert op.handler.summary and (op.description or op.handler.fn.__doc__), op.path


def test_every_example_is_what_its_schema_says(document: dict[str, Any]) -> None:
    wrong = []
    for op in operations(document):
        for _, schema, value in op.requests():
            wrong += [f"{op}: {fault}" for fault in op.faults(schema, value)]
        for status, _, schema, examples in op.answers():
            for name, example in examples.items():
                faults = op.faults(schema, example["value"])
                wrong += [f"{op} {status} {name}: {fault}" for fault in faults]
    assert wrong == []


def asked(client: httpx.Client, op: Described, media: str, value: Any) -> httpx.Response:
    body = b"" if value is None else json.dumps(value).encode()
    headers = {"content-type": media} if body else {}
    return client.request(op.method, op.sample, params=op.query(), content=body, headers=headers)


def fault_of(op: Described, answer: httpx.Response) -> list[str]:
    """How an answer differs from what the document says of its status."""
    said = op.found["responses"].get(str(answer.status_code))
    if said is None:
        return [f"undocumented status {answer.status_code}: {answer.text[:200]}"]
    media = answer.headers.get("content-type", "").partition(";")[0]
    content = said.get("content", {})
    if not answer.content:
        return []
    if media not in content:
        return [f"undocumented media type {media}"]
    return op.faults(content[media]["schema"], answer.json()) if media.endswith("json") else []


def test_every_request_example_is_answered_as_the_document_says(
    client: httpx.Client, document: dict[str, Any]
) -> None:
    wrong = []
    found = [op for op in operations(document) if str(op) not in ENDLESS]
    found.sort(key=lambda op: (op.method == "DELETE") + 2 * any(word in op.path for word in LAST))
    for op in found:
        if any(word in op.path for word in LAST):
            load_all(client)
        for media, _, value in list(op.requests()) or [("", None, None)]:
            answer = asked(client, op, media, value)
            faults = fault_of(op, answer)
            if answer.status_code not in EXPECTED.get(str(op), (200,)):
                faults.append(f"{answer.status_code}: {answer.text[:200]}")
            wrong += [f"{op} {value}: {fault}" for fault in faults]
    load_all(client)
    assert wrong == [], "\n".join(wrong)


def load_all(client: httpx.Client) -> None:
    for name in MODELS:
        answer = client.post("/v1/models/load", json={"model_name": name})
        assert answer.status_code == 200, answer.text


# Where the examples meet another state than the one that they were written for.
EXPECTED = {
    "GET /device/cuda": (200, 400),  # with a GPU, without
    # Of the only model: here are three.
    "GET /adapters": (400,),
    "POST /adapters": (400,),
    "GET /adapters/{adapter}": (400,),
    "DELETE /adapters/{adapter}": (400,),
    "POST /adapters/{adapter}/update": (400,),
}
# Clients' shared memory is off, unless the server is told otherwise.
for _kind in ("system", "cuda"):
    for _call in ("GET {}/status", "POST {}/unregister", "POST {}/register"):
        for _what in ("", "/region/{name}"):
            EXPECTED[_call.format(f"/v2/{_kind}sharedmemory{_what}")] = (501,)


def test_a_packed_body_is_refused_as_the_document_says(
    client: httpx.Client, document: dict[str, Any]
) -> None:
    asking = [op for op in operations(document) if op.path.endswith(("/infer", "s/completions"))]
    assert asking
    for op in asking:
        path = op.path.format(model="iris", version=1)
        answer = client.post(path, content=b"{}", headers={"content-encoding": "br"})
        known = 501 if op.path.endswith("/infer") else 415
        assert answer.status_code == known and fault_of(op, answer) == []


def test_the_token_of_the_document_is_one_that_a_list_takes(
    client: httpx.Client, document: dict[str, Any]
) -> None:
    shown = document["paths"]["/models/{model}/adapters"]["get"]["responses"]["200"]["content"]
    (example,) = shown["application/json"]["examples"].values()
    token = {"next_page_token": example["value"]["nextPageToken"]}
    assert client.get("/models/tiny-lm/adapters", params=token).status_code == 200


def test_the_event_stream_is_what_the_document_says(
    client: httpx.Client, document: dict[str, Any]
) -> None:
    found = document["paths"]["/v1/events"]["get"]["responses"]["200"]["content"]
    with client.stream("GET", "/v1/events", params={"after": "0"}) as stream:
        assert stream.headers["content-type"].partition(";")[0] in found
        lines = stream.iter_lines()
        events = [line for line, _ in zip(lines, range(20), strict=False)]
    assert events[0] == ": keep-alive"
    assert any(line.startswith("data: {") for line in events)


@pytest.mark.timeout(300)  # hundreds of requests; a busy machine is slow
def test_no_request_is_answered_otherwise_than_documented(
    server: Lasting, client: httpx.Client, document: dict[str, Any]
) -> None:
    """Whatever the document allows, and much of what it forbids: no status, media type, body or header
    that it does not know, and nothing breaks."""
    wrong: list[str] = []
    with requests.Session() as session:
        session.headers["x-api-key"] = KEYS["admin"]
        for operation in operations_of(document, [*MODELS, "tiny-lm:pirate", "nothing", ""]):
            if operation.label in ENDLESS:
                continue
            wrong += faults_of(server.url, operation, session)
            if any(word in operation.label for word in LAST):
                load_all(client)
    assert wrong == [], "\n\n".join(wrong)


class Page(HTMLParser):
    """What a page fetches, and what runs inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.assets: list[str] = []
        self.inline: list[str] = []
        self._within = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        said = dict(attrs)
        fetched = said.get("src") or (said.get("href") if tag == "link" else None)
        if fetched:
            self.assets.append(fetched)
        if tag == "style" or (tag == "script" and not said.get("src")):
            self.inline.append(tag)
        self.inline += [name for name in said if name.startswith("on") or name == "style"]


def test_the_page_fetches_everything_from_this_server_and_holds_no_script(server: Lasting) -> None:
    with httpx.Client(base_url=server.url) as client:
        answer = client.get("/docs")
        page = Page()
        page.feed(answer.text)
        parts = {path: client.get(path) for path in page.assets}
    assert page.inline == []
    assert len(parts) == 4 and all(path.startswith("/docs/") for path in parts)
    assert {part.status_code for part in parts.values()} == {200}
    assert len(parts["/docs/swagger-ui-bundle.js"].content) > 500_000
    assert '"/openapi.json"' in parts["/docs/start.js"].text
    for one in (answer, *parts.values()):
        assert one.headers["content-type"].count("charset") <= 1
        policy = one.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy and "http" not in policy
        assert one.headers["x-content-type-options"] == "nosniff"
    # The style sheet brings its images with it.
    fetched = parts["/docs/swagger-ui.css"].text.split("url(")[1:]
    assert all(one.lstrip("\"'").startswith("data:") for one in fetched)
    assert "@import" not in parts["/docs/swagger-ui.css"].text


def test_no_other_file_is_a_part_of_the_page(client: httpx.Client) -> None:
    for name in (
        "index.html",
        "../__init__.py",
        "..%2f__init__.py",
        "start.js%00",
        "swagger-ui.js",
    ):
        assert client.get(f"/docs/{name}").status_code == 404


def test_the_document_costs_the_start_nothing_and_the_page_imports_no_framework() -> None:
    code = (
        "import sys, server.app; "
        "print([m for m in ('server.openapi.calls', 'flask', 'werkzeug') if m in sys.modules]); "
        "from server.openapi.pages import _content, document; "
        "_content('swagger-ui.css'); document('depot', '1'); "
        "print([m for m in ('flask', 'flask_swagger_ui', 'werkzeug') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["[]", "[]"]


def test_the_document_names_no_path_of_this_machine(document: dict[str, Any]) -> None:
    assert str(Path(__file__).parents[2]) not in json.dumps(document)
