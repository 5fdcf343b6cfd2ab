"""Marqo's calls against a real server, row by row of what it documents; errors too."""

from __future__ import annotations

import asyncio
import re
import shlex
import shutil
import time
from collections.abc import AsyncIterator
from html.parser import HTMLParser
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tests.e2e.grid import ADMIN, USER, Grid, bearer, grid_in
from tests.e2e.server import REQUEST, add_model, open_gate, reached, serving
from tests.wire import asked

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

VIT_L, VIT_B, HF = "ViT-L/14", "ViT-B/16", "hf/all_datasets_v4_MiniLM-L6"
PLUS = "words+more"
SEED_LIST = "curl  -XGET http://localhost:8882/models"
SEED_EJECT = "curl -X DELETE 'http://localhost:8882/models?model_name=ViT-L/14&model_device=cuda'"
SEED_HOST = "http://localhost:8882"
BROWSER = {"accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def grid(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Grid]:
    home = tmp_path_factory.mktemp("marqo")
    gated = {"busy": {"infer": "busy"}, "rising": {"load": "rising"}}
    async with grid_in(home, VIT_L, VIT_B, HF, PLUS, **gated) as found:
        yield found


async def eject(grid: Grid, query: str) -> httpx.Response:
    """The query as it is written: a client library would quote it."""
    port = int(grid.running.url.rpartition(":")[2])
    head = f"DELETE /models?{query} HTTP/1.1\r\nhost: t\r\nx-api-key: {ADMIN}\r\n\r\n"
    found = await asked(port, head.encode())
    return httpx.Response(found.status, headers=found.headers, content=found.body)


def is_marqo_error(answer: httpx.Response, status: int, code: str, message: str) -> None:
    assert answer.status_code == status
    assert answer.json() == {
        "message": message,
        "code": code,
        "type": "invalid_request",
        "link": None,
    }


async def curl(line: str, url: str) -> Any:
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    process = await asyncio.create_subprocess_exec(
        *shlex.split(line.replace(SEED_HOST, url)), "--silent", "-H", f"x-api-key: {ADMIN}",
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    said, _ = await process.communicate()
    return httpx.Response(200, content=said).json()


# what is loaded ---------------------------------------------------------------------------------


async def test_the_documents_own_curl_lines_list_and_eject(grid: Grid) -> None:
    """There is no GPU for the second: it is told so in the documented words."""
    await grid.clear(VIT_L, VIT_B, HF)
    assert await curl(SEED_LIST, grid.running.url) == {
        "models": [
            {"model_name": VIT_B, "model_device": "cpu"},
            {"model_name": VIT_L, "model_device": "cpu"},
            {"model_name": HF, "model_device": "cpu"},
        ]
    }
    assert await curl(SEED_EJECT, grid.running.url) == {
        "message": "The model_name `ViT-L/14` device `cuda` is not cached or found",
        "code": "model_not_in_cache",
        "type": "invalid_request",
        "link": None,
    }
    here = SEED_EJECT.replace("cuda", "cpu")
    assert await curl(here, grid.running.url) == {
        "result": "success",
        "message": "successfully eject model_name `ViT-L/14` from device `cpu`",
    }
    assert (await grid.states())[VIT_L] == "unloaded"


async def test_only_what_is_loaded_is_listed(grid: Grid) -> None:
    await grid.clear()
    assert (await grid.get("/models")).json() == {"models": []}
    load = asyncio.create_task(grid.load("rising"))
    await reached(grid.gates, "rising")
    assert (await grid.get("/models")).json() == {"models": []}
    assert (await eject(grid, "model_name=rising")).status_code == 404
    open_gate(grid.gates, "rising")
    assert (await load).status_code == 200
    assert len((await grid.get("/models")).json()["models"]) == 1


# eject ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (f"model_name={VIT_L}", f"successfully eject model_name `{VIT_L}`"),
        (f"model_name={VIT_L}&model_device=", f"successfully eject model_name `{VIT_L}`"),
        (
            f"model_device=cpu&telemetry=True&x&model_name={VIT_L}",
            f"successfully eject model_name `{VIT_L}` from device `cpu`",
        ),
        ("model_name=ViT-L%2F14", f"successfully eject model_name `{VIT_L}`"),
    ],
)
async def test_an_eject_says_what_it_did(grid: Grid, query: str, message: str) -> None:
    await grid.clear(VIT_L, VIT_B)
    answer = await eject(grid, query)
    assert (answer.status_code, answer.json()) == (200, {"result": "success", "message": message})
    states = await grid.states()
    assert (states[VIT_L], states[VIT_B]) == ("unloaded", "loaded")


@pytest.mark.parametrize("spelling", ["words+more", "words%2Bmore"])
async def test_a_plus_in_a_query_is_a_plus(grid: Grid, spelling: str) -> None:
    await grid.clear(PLUS)
    assert (await eject(grid, f"model_name={spelling}")).status_code == 200


@pytest.mark.parametrize(
    "name",
    ["ViT", "ViT-L", "ViT-L/1", "vit-l/14", "ViT-L/14/", "no", "a b", "/", "./", "./../x", "/etc"],
)
async def test_a_name_is_compared_exactly(grid: Grid, name: str) -> None:
    await grid.clear(VIT_L)
    text = f"The model_name `{name}` is not cached or found"
    is_marqo_error(
        await eject(grid, f"model_name={name.replace(' ', '%20')}"), 404, "model_not_in_cache", text
    )
    assert (await grid.states())[VIT_L] == "loaded"


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "CPU", "tpu"])
async def test_a_model_is_not_ejected_from_where_it_is_not(grid: Grid, device: str) -> None:
    await grid.clear(VIT_L)
    text = f"The model_name `{VIT_L}` device `{device}` is not cached or found"
    answer = await eject(grid, f"model_name={VIT_L}&model_device={device}")
    is_marqo_error(answer, 404, "model_not_in_cache", text)
    assert (await grid.states())[VIT_L] == "loaded"


@pytest.mark.parametrize(
    ("query", "kind"),
    [
        ("", "missing"),
        ("model_device=cpu", "missing"),
        ("model_name=", "empty"),
        ("model_name", "empty"),
        ("model_name=&model_device=cpu", "empty"),
        (f"model_name={VIT_L}&model_name={VIT_B}", "ambiguous"),
        (f"model_name={VIT_L}&model_device=cpu&model_device=cuda", "ambiguous"),
    ],
)
async def test_a_name_that_is_missing_is_a_422_and_ejects_nothing(
    grid: Grid, query: str, kind: str
) -> None:
    await grid.clear(VIT_L)
    answer = await eject(grid, query)
    body = answer.json()
    (detail,) = body.pop("detail")
    assert (answer.status_code, body) == (
        422,
        {"code": "unprocessable_entity", "type": "invalid_request", "link": ""},
    )
    assert detail["type"] == f"value_error.{kind}" and detail["msg"]
    assert detail["loc"][0] == "query" and detail["loc"][1].startswith("model_")
    assert (await grid.states())[VIT_L] == "loaded"


async def test_an_eject_lets_requests_end_and_the_model_stays_unloaded(grid: Grid) -> None:
    await grid.clear("busy")
    request = asyncio.create_task(grid.infer("busy"))
    await reached(grid.gates, "busy")
    ejecting = asyncio.create_task(eject(grid, "model_name=busy"))
    while (await grid.get("/models")).json()["models"]:
        pass
    second = await eject(grid, "model_name=busy")
    assert second.status_code == 404  # it is on its way out, and not cached any more
    open_gate(grid.gates, "busy")
    assert ((await request).status_code, (await ejecting).status_code) == (200, 200)
    refused = await grid.post("/v2/models/busy/infer", json=REQUEST)
    assert refused.status_code == 404 and (await grid.states())["busy"] == "unloaded"


# devices ----------------------------------------------------------------------------------------


async def test_the_cpu_answers_in_texts_and_at_once(grid: Grid) -> None:
    took = []
    for _ in range(5):
        began = time.perf_counter()
        found = (await grid.get("/device/cpu")).json()
        took.append(time.perf_counter() - began)
    assert min(took) < 0.1
    assert set(found) == {"cpu_usage_percent", "memory_used_percent", "memory_used_gb"}
    for key in ("cpu_usage_percent", "memory_used_percent"):
        assert re.fullmatch(r"\d+\.\d %", found[key]) and float(found[key][:-2]) <= 100
    assert re.fullmatch(r"\d+\.\d", found["memory_used_gb"])


async def test_without_a_gpu_cuda_is_a_400(grid: Grid) -> None:
    """With one: tests/integration/test_gpus.py."""
    answer = await grid.get("/device/cuda")
    if (await grid.get("/v1/gpu/status")).json()["total_gpus"]:
        pytest.skip("this machine has a GPU")
    text = "CUDA is not available on this instance"
    is_marqo_error(answer, 400, "hardware_compatability_error", text)


# keys and errors --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/models", "/device/cpu", "/device/cuda"])
async def test_looking_needs_a_key_of_any_scope_in_either_header(grid: Grid, path: str) -> None:
    async with httpx.AsyncClient(base_url=grid.running.url) as anyone:
        nobody = await anyone.get(path)
        assert nobody.status_code == 401 and nobody.json()["code"] == "unauthorized"
        assert nobody.json()["type"] == "invalid_request"
        for headers in (bearer(USER), {"x-api-key": USER}):
            assert (await anyone.get(path, headers=headers)).status_code in (200, 400)


async def test_an_eject_needs_an_admins_key(grid: Grid) -> None:
    await grid.clear(VIT_L)
    async with httpx.AsyncClient(base_url=grid.running.url) as anyone:
        for headers, status, code in (
            ({}, 401, "unauthorized"),
            ({"x-api-key": "wrong"}, 401, "unauthorized"),
            ({"x-api-key": USER}, 403, "forbidden"),
        ):
            url = f"/models?model_name={VIT_L}"
            answer = await anyone.delete(url, headers=headers)
            assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert (await grid.states())[VIT_L] == "loaded"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("POST", "/models", 405), ("PUT", "/device/cpu", 405), ("GET", "/device/tpu", 404)],
)
async def test_every_error_has_a_code_and_a_type(
    grid: Grid, method: str, path: str, status: int
) -> None:
    answer = await grid.client.request(method, path)
    body = answer.json()
    assert answer.status_code == status and body["code"] and body["message"]
    assert body["type"] == "invalid_request" and body["link"] is None


# the root ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "accept", [None, "*/*", "application/json", "nonsense;;q=", "text/html;q=0.1, */*"]
)
async def test_a_client_is_told_a_version_that_it_does_not_warn_of(
    grid: Grid, accept: str | None
) -> None:
    headers = {} if accept is None else {"accept": accept}
    async with httpx.AsyncClient(base_url=grid.running.url) as anyone:
        answer = await anyone.get("/?telemetry=True", headers=headers)
    found = answer.json()
    assert answer.status_code == 200 and found["version"] == "2.23.1"
    assert found["message"] and found["server_version"] != found["version"]


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [v or "" for k, v in attrs if k in ("href", "src", "action")]
        assert not any(k.startswith("on") or k == "style" for k, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


async def test_a_browser_gets_a_page_that_fetches_nothing_and_names_no_model_without_a_key(
    grid: Grid,
) -> None:
    async with httpx.AsyncClient(base_url=grid.running.url, headers=BROWSER) as anyone:
        answer = await anyone.get("/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["vary"] == "Accept"
    page = _Page(answer.text)
    assert not {"script", "link", "img", "iframe", "style"} & set(page.tags)
    assert {"/docs", "/v1/models/status", "/metrics"} <= set(page.sources)
    assert all(source.startswith("/") for source in page.sources)
    assert VIT_L not in answer.text and HF not in answer.text


async def test_without_keys_the_page_lists_the_models_to_this_machine_alone(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    home = tmp_path_factory.mktemp("page")
    repo = home / "models"
    add_model(repo, home, "org/one")
    async with serving(repo, "--settle", "0.1", "--model-control-mode", "explicit") as server:
        await server.said(r"ready after")
        async with server.client() as client:
            page = _Page((await client.get("/", headers=BROWSER)).text)
            assert "org/one" in page.text and "/v1/models/org/one" in page.sources
            assert (await client.get("/v1/models/org/one")).status_code == 200
            for stranger in ({"host": "evil.example"}, {"origin": "https://evil.example"}):
                answer = await client.get("/", headers={**BROWSER, **stranger})
                assert answer.status_code == 200 and "org/one" not in answer.text
