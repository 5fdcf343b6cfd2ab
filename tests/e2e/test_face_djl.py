"""DJL's calls for adapters against real servers, row by row of what it documents; every error too."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple
from urllib.parse import quote

import pytest

from tests import adapters
from tests.e2e.djl import MANY, PLAIN, Depot, add_mlp, add_model, refused, serving
from tests.e2e.server import WITHIN_S, open_gate, reached
from tests.models import python_model

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

NESTED = ("org/name", "a/adapters/b", "team/adapters")
EXISTS = (
    "The adapter {} already exists. If you want to replace it, please unregistering before "
    "registering a new adapter with the same name."
)
ALONE = (
    "The adapter must be prefixed with a model unless there is only a single startup model used."
)


@pytest.fixture(scope="module")
def depot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Depot]:
    home = tmp_path_factory.mktemp("djl")
    for model in (MANY, *NESTED):
        add_model(home, model)
    add_model(home, "narrow", slots=1)
    python_model(home / "models/plain/1", PLAIN)
    adapters.write_adapter(home / "allowed/nine", lora_alpha=9)
    adapters.write_adapter(home / "outside", lora_alpha=9)
    add_mlp(home / "models/mlp")
    with serving(home, "--allowed-root", str(home / "allowed")) as depot:
        yield depot


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Depot]:
    """The repository of DJL's own examples: one model, `adaptecho`."""
    home = tmp_path_factory.mktemp("adaptecho")
    add_model(home, "adaptecho")
    adapters.write_adapter(home / "opt/a1", lora_alpha=3)
    with serving(home, "--allowed-root", str(home / "opt")) as depot:
        yield depot


# the seed's own lines -----------------------------------------------------------------------------

CURL = [
    (
        'curl -X POST "http://localhost:8080/models/adaptecho/adapters?name=a1&src=/opt/ml/model/adapters/a1"',
        {"status": "Adapter a1 registered"},
    ),
    (
        'curl -X POST "http://localhost:8080/models/adaptecho/adapters/a1/update?pin=true"',
        {"status": "Adapter a1 updated"},
    ),
    (
        "curl http://localhost:8080/models/adaptecho/adapters/a1",
        [{"name": "a1", "pin": True, "preload": True, "state": "loaded"}],
    ),
    (
        'curl "http://localhost:8080/models/adaptecho/adapters"',
        {"adapters": [{"name": "a1", "src": "opt/a1", "pin": True, "preload": True}]},
    ),
    (
        'curl "http://localhost:8080/models/adaptecho/adapters?limit=5&next_page_token=0"',
        {"adapters": [{"name": "a1", "src": "opt/a1", "pin": True, "preload": True}]},
    ),
    (
        "curl -X DELETE http://localhost:8080/models/adaptecho/adapters/a1",
        {"status": "Adapter a1 unregistered"},
    ),
]


def curl(line: str) -> Any:
    found = subprocess.run(
        ["bash", "-c", f"{line} -sS"], capture_output=True, text=True, timeout=WITHIN_S, check=True
    )
    return json.loads(found.stdout)


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
@pytest.mark.parametrize("prefixed", [True, False], ids=["prefixed", "prefix-less"])
def test_the_documented_lines_run_as_they_are_written(alone: Depot, prefixed: bool) -> None:
    """Apart from host and port, and from where the adapter lies."""
    for line, wanted in CURL:
        line = line.replace("http://localhost:8080", alone.server.url)
        line = line.replace("/opt/ml/model/adapters/a1", str(alone.home / "opt/a1"))
        found = curl(line if prefixed else line.replace("/models/adaptecho", ""))
        if isinstance(wanted, list):
            assert [wanted[0] | found[0]] == found and found[0]["src"] == "opt/a1"
        else:
            assert found == wanted


def test_a_prefix_is_needed_where_there_is_more_than_one_model(depot: Depot) -> None:
    for method, path in [
        ("GET", "/adapters"), ("POST", "/adapters?name=a&src=b"), ("GET", "/adapters/a1"),
        ("DELETE", "/adapters/a1"), ("POST", "/adapters/a1/update"),
    ]:  # fmt: skip
        refused(depot.client.request(method, path), 400, ALONE)


# register -----------------------------------------------------------------------------------------


def test_what_is_registered_is_told_listed_and_used(depot: Depot) -> None:
    depot.register("r1")
    depot.register("r2", "loras/five", pin="True", preload="TRUE", more="0.5")
    assert depot.added(adapters="r1") == [3, 3] and depot.added(adapters="r2") == [5.5, 5.5]
    listed = depot.good("GET", "")["adapters"]
    assert [one for one in listed if one["name"] in ("r1", "r2")] == [
        {"name": "r1", "src": "loras/three", "pin": False, "preload": True},
        {"name": "r2", "src": "loras/five", "pin": True, "preload": True},
    ]
    found = depot.shown("r2")
    assert found["state"] == "loaded" and found["memory_bytes"] > 0 and found["origin"] == "call"
    assert found["options"] == {"more": "0.5"} and found["error"] is None
    depot.unregister("r1", "r2")
    assert depot.infer(adapters="r1").status_code == 424


def test_parameters_come_in_json_too_and_the_query_wins(depot: Depot) -> None:
    body = {"name": "j1", "src": "loras/five", "pin": True, "more": 0.25, "nothing": None}
    assert depot.good("POST", "", json=body) == {"status": "Adapter j1 registered"}
    assert depot.shown("j1")["options"] == {"more": "0.25"} and depot.shown("j1")["pin"] is True
    depot.good("POST", "", json=body, params={"name": "j2", "pin": "false", "more": "2"})
    assert depot.added(adapters=["j1", "j2"]) == [5.25, 7] and not depot.shown("j2")["pin"]
    depot.unregister("j1", "j2")


def test_a_file_address_and_an_allowed_root_are_read(depot: Depot) -> None:
    depot.register("f1", f"file://{depot.repo}/m/loras/five")
    depot.register("f2", str(depot.home / "allowed/nine"))
    depot.register("f3", "../org/name/loras/three")
    assert depot.added(3, adapters=["f1", "f2", "f3"]) == [5, 9, 3]
    sources = [depot.shown(name)["src"] for name in ("f1", "f2", "f3")]
    assert sources == ["loras/five", "allowed/nine", "../org/name/loras/three"]
    depot.unregister("f1", "f2", "f3")


class Row(NamedTuple):
    query: dict[str, str]
    status: int
    message: str
    model: str = MANY


REGISTER: dict[str, Row] = {
    "no such model, whatever else": Row({"pin": "x"}, 404, "The model none was not found", "none"),
    "no possible model": Row({}, 404, "The model org%2Fname was not found", "org%252Fname"),
    "a path out of bounds": Row({}, 404, "The model ./../x was not found", ".%2F..%2Fx"),
    "no name": Row({"src": "s3://b/a"}, 400, "The parameter name is required"),
    "an empty name": Row({"name": "", "src": "x"}, 400, "The parameter name is required"),
    "no src": Row({"name": "live"}, 400, "The parameter src is required"),
    "an empty src": Row({"name": "live", "src": ""}, 400, "The parameter src is required"),
    "pin is neither": Row(
        {"name": "live", "src": "x", "pin": "yes"}, 400, "'pin' must be true or false, not 'yes'"
    ),
    "preload is neither": Row(
        {"name": "live", "src": "x", "preload": ""}, 400, "'preload' must be true or false, not ''"
    ),
    "a name that is a path": Row({"name": "a/b", "src": "s3://b/a"}, 400, "...invalid adapter name"),
    "the addresses' own name": Row(
        {"name": "adapters", "src": "loras/three"}, 400, "...the server's own addresses use it"
    ),
    "it exists, whatever its src": Row({"name": "live", "src": "s3://b/a"}, 409, EXISTS.format("live")),
    "another address": Row(
        {"name": "n", "src": "s3://b/a"}, 409, "URL adapters are not currently supported"
    ),
    "a web address": Row(
        {"name": "n", "src": "http://127.0.0.1/a"}, 409, "URL adapters are not currently supported"
    ),
    "no folder": Row({"name": "n", "src": "loras/none"}, 424, "there is no folder 'loras/none'"),
    "outside": Row({"name": "n", "src": "../../outside"}, 424, "...src lies outside of the model's"),
    "an absolute path outside": Row({"name": "n", "src": "/etc"}, 424, "...src lies outside"),
    "not an adapter": Row({"name": "n", "src": "1"}, 424, "...adapter_config.json"),
    "pinned and not loaded": Row(
        {"name": "n", "src": "loras/three", "pin": "true", "preload": "false"},
        424, "Can not set preload to false and pin to true",
    ),
    "the model refuses": Row(
        {"name": "n", "src": "loras/three", "refuse": "1"}, 424, "...the model was told to refuse it"
    ),
    "a model without": Row(
        {"name": "n", "src": "../m/loras/three"}, 424, "...takes no adapters", "plain"
    ),
    "no such layer": Row({"name": "n", "src": "loras/elsewhere"}, 424, "...three", "mlp"),
    "another shape": Row({"name": "n", "src": "loras/wide"}, 424, "...one", "mlp"),
    "a high rank": Row({"name": "n", "src": "loras/high"}, 424, "...rank", "mlp"),
    "DoRA": Row({"name": "n", "src": "loras/dora"}, 424, "...DoRA", "mlp"),
    "a pickle": Row({"name": "n", "src": "loras/pickled"}, 424, "...adapter_model", "mlp"),
    "half a file": Row({"name": "n", "src": "loras/cut"}, 424, "...adapter_model.safetensors", "mlp"),
    "no slot": Row(
        {"name": "n", "src": "loras/five", "pin": "true"}, 507, "...adapter slots", "narrow"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def live(depot: Depot) -> Depot:
    """With adapters that serve, and that no error may touch."""
    depot.register("live")
    depot.register("live", model="narrow", pin="true")
    depot.register("live", "loras/good", model="mlp")
    return depot


@pytest.mark.parametrize("case", REGISTER)
def test_what_cannot_be_registered_is_refused_and_nothing_has_changed(
    live: Depot, case: str
) -> None:
    query, status, message, model = REGISTER[case]
    known = model if model in ("mlp", "narrow", "plain") else MANY
    before = live.names(known)
    found = live.call("POST", "", model, params=query)
    refused(found, status, message)
    assert str(live.home) not in found.text
    assert live.names(known) == before
    if known == MANY:
        assert live.added(adapters=["live", ""]) == [3, 0]
    elif known != "plain":
        assert live.shown("live", known)["state"] == "loaded"


BODIES: dict[str, tuple[bytes, str, int, str]] = {
    "no JSON": (b'{"name": "n"', "application/json", 400, "...is not JSON"),
    "no object": (b'["n"]', "application/json", 400, "...must be a JSON object with the parameters"),
    "a name that is no text": (b'{"name": 5}', "application/json", 400, "'name' must be a text"),
    "an option that is a list": (
        b'{"name": "n", "src": "s", "o": []}', "application/json", 400,
        "'o' must be a text, a number or true or false",
    ),
    "a form": (b"name=n&src=s", "application/x-www-form-urlencoded", 415, "...send JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", BODIES)
def test_a_body_that_says_nothing_clear_is_refused(depot: Depot, case: str) -> None:
    body, kind, status, message = BODIES[case]
    headers = {"content-type": kind}
    refused(depot.call("POST", "", content=body, headers=headers), status, message)


def test_a_key_that_is_there_twice_is_refused(live: Depot) -> None:
    for path in ("?name=a&name=b&src=x", "/live/update?pin=true&pin=false"):
        key = path.partition("?")[2].partition("=")[0]
        refused(live.call("POST", path), 400, f"'{key}' is there twice; say it once")
    refused(live.call("GET", "?limit=1&limit=2"), 400, "'limit' is there twice; say it once")


# update -------------------------------------------------------------------------------------------


def test_an_update_says_what_is_new_and_leaves_the_rest(depot: Depot) -> None:
    depot.register("u1", preload="false", more="1")
    assert not depot.shown("u1")["preload"]
    done = {"status": "Adapter u1 updated"}
    assert depot.good("POST", "/u1/update", params={"pin": "true"}) == done
    found = depot.shown("u1")
    assert (found["pin"], found["preload"], found["options"]) == (True, True, {"more": "1"})
    assert depot.good("POST", "/u1/update", params={"src": "loras/five"}) == done
    assert depot.added(adapters="u1") == [6, 6] and depot.shown("u1")["pin"]
    assert depot.good("POST", "/u1/update", json={"pin": False, "more": 2, "other": "x"}) == done
    found = depot.shown("u1")
    assert (found["pin"], found["src"]) == (False, "loras/five")
    assert found["options"] == {"more": "2", "other": "x"} and depot.added(adapters="u1") == [7, 7]
    assert depot.good("POST", "/u1/update", params={"name": "u1", "src": ""}) == done
    assert depot.shown("u1") == found
    depot.unregister("u1")


UPDATE: dict[str, tuple[str, dict[str, str], int, str]] = {
    "no such model": ("none/live", {}, 404, "The model none was not found"),
    "no such adapter, whatever else": ("m/no", {"pin": "x"}, 404, "The adapter no was not found"),
    "pin is neither": ("m/live", {"pin": "1"}, 400, "'pin' must be true or false, not '1'"),
    "another name": ("m/live", {"name": "x"}, 400, "...cannot be renamed"),
    "another address": (
        "m/live", {"src": "s3://b/a"}, 409, "URL adapters are not currently supported"
    ),
    "no folder": ("m/live", {"src": "loras/none"}, 424, "there is no folder 'loras/none'"),
    "outside": ("m/live", {"src": "../../outside"}, 424, "...src lies outside"),
    "pinned and not loaded": (
        "m/live", {"pin": "true", "preload": "false"},
        424, "Can not set preload to false and pin to true",
    ),
    "the model refuses": ("m/live", {"refuse": "1"}, 424, "...told to refuse"),
    "no such layer": ("mlp/live", {"src": "loras/elsewhere"}, 424, "...three"),
    "no slot": ("narrow/second", {"pin": "true"}, 507, "...adapter slots"),
}  # fmt: skip


@pytest.mark.parametrize("case", UPDATE)
def test_an_update_that_fails_changes_nothing(live: Depot, case: str) -> None:
    address, query, status, message = UPDATE[case]
    model, name = address.split("/")
    if name == "second":
        live.register(name, "loras/five", model)
    there = status != 404
    before = live.shown(name, model) if there else None
    refused(live.call("POST", f"/{name}/update", model, params=query), status, message)
    assert not there or live.shown(name, model) == before
    if model == MANY:
        assert live.added(adapters="live") == [3, 3]
    if name == "second":
        live.unregister(name, model=model)


def test_describing_and_unregistering_what_is_not_there_is_a_404(depot: Depot) -> None:
    for method in ("GET", "DELETE"):
        refused(depot.call(method, "/no"), 404, "The adapter no was not found")
        refused(depot.call(method, "/a1", "none"), 404, "The model none was not found")
    refused(depot.call("GET", "", "none"), 404, "The model none was not found")


@pytest.mark.parametrize(
    ("method", "path"),
    [("PUT", ""), ("DELETE", ""), ("PATCH", ""), ("PUT", "/a1"), ("POST", "/a1"), ("PATCH", "/a1"),
     ("POST", "/update"), ("GET", "/a1/update"), ("PUT", "/a1/update"), ("DELETE", "/a1/update")],
)  # fmt: skip
def test_other_verbs_are_not_allowed(depot: Depot, method: str, path: str) -> None:
    for base in (f"/models/{MANY}/adapters", "/models/org/name/adapters", "/adapters"):
        found = depot.client.request(method, base + path)
        refused(found, 405, "Method Not Allowed")
        assert found.headers["allow"]


def test_a_request_ends_with_its_adapter_while_that_is_unregistered(depot: Depot) -> None:
    depot.register("held")
    with ThreadPoolExecutor(2) as users:
        asked = users.submit(depot.added, adapters="held")
        asyncio.run(reached(depot.gates, "held"))
        told = users.submit(depot.call, "DELETE", "/held")
        try:
            while "held" in depot.names():
                pass
            assert depot.infer(adapters="held").status_code == 424 and not asked.done()
        finally:
            open_gate(depot.gates, "held")
        assert asked.result(WITHIN_S) == [3, 3]
        assert told.result(WITHIN_S).json() == {"status": "Adapter held unregistered"}


# names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", NESTED)
@pytest.mark.parametrize(
    "spelt", [lambda name: name, lambda name: quote(name, safe="")], ids=["raw", "quoted"]
)
def test_a_models_name_may_have_slashes_and_an_adapter_be_called_update(
    depot: Depot, model: str, spelt: Callable[[str], str]
) -> None:
    name = spelt(model)
    depot.register("update", "loras/five", name)
    assert depot.names(name) == ["update"] and depot.shown("update", name)["src"] == "loras/five"
    assert depot.good("POST", "/update/update", name, params={"more": "1"}) == {
        "status": "Adapter update updated"
    }
    assert depot.added(model=model, adapters="update") == [6, 6]
    depot.unregister("update", model=name)
    refused(depot.call("GET", "/update", name), 404, "The adapter update was not found")
