"""Answers that are kept, as Triton's four clients and its dashboards see them: one server for all."""

from __future__ import annotations

import itertools
import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from tests.e2e.lasting import Lasting, lasting
from tests.e2e.triton_clients import KINDS, Client, connected
from tests.e2e.triton_scene import write_python
from tests.triton_models import ELEMENTS, write_simple, write_simple_identity, write_simple_string

pytestmark = pytest.mark.e2e

WANTS = "\nresponse_cache { enable: true }\n"
NEW = itertools.count(1)
COUNTED = ("inference_count", "execution_count", "success", "compute_infer", "hit", "miss")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lasting]:
    repo = tmp_path_factory.mktemp("kept") / "models"
    for folder in (write_simple(repo), write_simple_string(repo), write_simple_identity(repo)):
        config = folder / "config.pbtxt"
        config.write_text(config.read_text() + WANTS)
    write_simple(repo, "plain")
    write_python(
        repo, "talkative", "talkative", {"X": "INT32 [1]"}, {"SAID": "STRING [1]"}, more=WANTS
    )
    with lasting(repo, "--cache-config", "local,size=4194304", grpc=True) as running:
        yield running


@pytest.fixture(params=KINDS)
def client(server: Lasting, request: pytest.FixtureRequest) -> Iterator[Client]:
    with connected(request.param, server) as client:
        yield client


def fresh() -> dict[str, np.ndarray]:
    """Inputs that nobody has sent before."""
    both = np.full((1, ELEMENTS), next(NEW), np.int32)
    return {"INPUT0": both, "INPUT1": both}


def counts(client: Client, model: str) -> list[int]:
    (found,) = client.show("get_inference_statistics", model)["model_stats"]
    of = found["inference_stats"]
    kinds = ("success", "compute_infer", "cache_hit", "cache_miss")
    each = [int(of.get(kind, {}).get("count", 0)) for kind in kinds]
    return [int(found.get(key, 0)) for key in COUNTED[:2]] + each


def grown(client: Client, model: str, before: list[int]) -> dict[str, int]:
    now = counts(client, model)
    return {kind: b - a for kind, a, b in zip(COUNTED, before, now, strict=True)}


def metric(server: Lasting, name: str, model: str = "") -> float | None:
    page = httpx.get(f"{server.url}/metrics").text
    found = [
        float(line.rpartition(" ")[2])
        for line in page.splitlines()
        if line.startswith((f"{name} ", f"{name}{{")) and (not model or f'model="{model}"' in line)
    ]
    return found[0] if found else None


def test_the_same_again_is_answered_without_the_model(client: Client) -> None:
    before, asked = counts(client, "simple"), fresh()
    first, *others = [client.infer("simple", asked) for _ in range(4)]
    for other in others:
        for name, array in first.arrays.items():
            assert (other.arrays[name] == array).all()
    assert (first.arrays["OUTPUT0"] == 2 * asked["INPUT0"]).all()
    assert grown(client, "simple", before) == {
        "inference_count": 1, "execution_count": 1, "success": 4, "compute_infer": 1, "hit": 3,
        "miss": 1,
    }  # fmt: skip
    (found,) = client.show("get_inference_statistics", "simple")["model_stats"]
    for kind in ("cache_hit", "cache_miss"):
        assert 0 < int(found["inference_stats"][kind]["ns"]) < 10**10
    assert client.show("get_model_config", "simple")["response_cache"] == {"enable": True}


def test_what_differs_is_run(client: Client) -> None:
    before, asked = counts(client, "simple"), fresh()
    client.infer("simple", asked)
    one = client.infer("simple", asked, "OUTPUT1")
    assert list(one.arrays) == ["OUTPUT1"]
    client.infer("simple", {name: np.tile(array, (2, 1)) for name, array in asked.items()})
    client.infer("simple", {"INPUT0": asked["INPUT0"], "INPUT1": asked["INPUT1"] + 1})
    assert grown(client, "simple", before)["miss"] == 4
    again = client.infer("simple", asked, request_id="mine")
    assert again.id == "mine" and grown(client, "simple", before)["hit"] == 1


def test_texts_and_parameters_come_back_as_they_were(client: Client) -> None:
    texts = {
        name: np.array([[str(next(NEW)).encode()] * ELEMENTS], object)
        for name in ("INPUT0", "INPUT1")
    }
    first, again = [client.infer("simple_string", texts) for _ in range(2)]
    assert (first.arrays["OUTPUT0"] == again.arrays["OUTPUT0"]).all()
    asked, how = {"X": np.array([next(NEW)], np.int32)}, {"parameters": {"top": 3}}
    said = [client.infer("talkative", asked, request_id=id, **how) for id in ("a", "b")]
    told = [json.loads(one.arrays["SAID"][0]) for one in said]
    assert told[0] == told[1] and told[0]["request"]["top"] == 3, "the model ran once"
    assert [one.id for one in said] == ["a", "b"]
    assert said[1].parameters.items() >= {"kind": "said", "n": 1}.items()
    other = client.infer("talkative", asked, parameters={"top": 4})
    assert json.loads(other.arrays["SAID"][0])["request"]["top"] == 4


def test_classes_are_made_of_an_answer_that_stays_as_it_is(client: Client) -> None:
    before, asked = counts(client, "simple"), fresh()
    asked["INPUT0"][0, 3] += 1
    first = client.infer("simple", asked, "OUTPUT0")
    (best,) = client.infer(
        "simple", asked, outputs=client.outputs("OUTPUT0", class_count=1)
    ).arrays["OUTPUT0"]
    assert best[0].decode().split(":")[1] == "3"
    again = client.infer("simple", asked, "OUTPUT0")
    assert (first.arrays["OUTPUT0"] == again.arrays["OUTPUT0"]).all()
    assert grown(client, "simple", before)["hit"] == 2


def test_large_ones_too(client: Client) -> None:
    texts = np.array([[bytes(str(next(NEW)), "ascii") * 50_000, b"", b"\xc3\xa4"]], object)
    before = counts(client, "simple_identity")
    for _ in range(3):
        found = client.infer("simple_identity", {"INPUT0": texts})
        assert (found.arrays["OUTPUT0"] == texts).all()
    assert grown(client, "simple_identity", before)["execution_count"] == 1
    assert grown(client, "simple_identity", before)["hit"] == 2


def test_a_model_that_does_not_want_it_is_always_run(client: Client) -> None:
    before, asked = counts(client, "plain"), fresh()
    for _ in range(2):
        client.infer("plain", asked)
    assert grown(client, "plain", before) == {
        "inference_count": 2, "execution_count": 2, "success": 2, "compute_infer": 2, "hit": 0,
        "miss": 0,
    }  # fmt: skip


def test_who_asks_in_another_way_hits_the_same_answer(server: Lasting) -> None:
    asked = fresh()
    with connected("http", server) as client:
        client.infer("simple", asked)
        before = counts(client, "simple")
        for kind in KINDS:
            with connected(kind, server) as other:
                other.infer("simple", asked)
        with connected("grpc.aio", server) as streaming:
            (one,) = streaming.streamed([{"model_name": "simple", "inputs": asked}])  # type: ignore[attr-defined]
            assert (one.arrays["OUTPUT0"] == 2 * asked["INPUT0"]).all()
        body = {name: array[0].tolist() for name, array in asked.items()}
        told = httpx.post(f"{server.url}/v2/models/simple/generate", json=body)
        assert told.json()["OUTPUT0"] == (2 * asked["INPUT0"])[0].tolist()
        inputs: list[dict[str, Any]] = [
            {"name": n, "datatype": "INT32", "shape": [1, ELEMENTS], "data": a.tolist()}
            for n, a in asked.items()
        ]
        url = f"{server.url}/v2/models/simple/infer"
        assert httpx.post(url, json={"inputs": inputs}).json()["outputs"][0]["data"] == (
            (2 * asked["INPUT0"])[0].tolist()
        )
        assert grown(client, "simple", before)["miss"] == 0
        assert grown(client, "simple", before)["hit"] == len(KINDS) + 3


def test_many_requests_in_one_piece_are_each_answered(server: Lasting) -> None:
    """On one connection, without waiting: all of them find their answer."""
    asked = fresh()
    inputs = [
        {"name": n, "datatype": "INT32", "shape": [1, ELEMENTS], "data": a.tolist()}
        for n, a in asked.items()
    ]
    body = json.dumps({"inputs": inputs}).encode()
    head = (
        f"POST /v2/models/simple/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    one, many = head.encode() + body, 200
    with socket.create_connection(("127.0.0.1", server.port), timeout=40) as connection:
        connection.sendall(one)
        assert b'"OUTPUT0"' in connection.recv(65536)
        connection.sendall(one * many)
        got = b""
        while got.count(b"HTTP/1.1 200") < many or got.count(b'"OUTPUT1"') < many:
            piece = connection.recv(1 << 20)
            assert piece, got[-500:]
            got += piece


def test_dashboards_see_it(server: Lasting) -> None:
    with connected("http", server) as client:
        asked = fresh()
        for _ in range(2):
            client.infer("simple", asked)
        _, _, _, _, hits, misses = counts(client, "simple")
    assert metric(server, "nv_cache_num_hits_per_model", "simple") == hits
    assert metric(server, "nv_cache_num_misses_per_model", "simple") == misses
    assert metric(server, "modeldepot_response_cache_hits_total", "simple") == hits
    assert metric(server, "modeldepot_response_cache_misses_total", "simple") == misses
    for kind in ("hit", "miss"):
        assert (metric(server, f"nv_cache_{kind}_duration_per_model", "simple") or 0) > 0
        assert metric(server, f"nv_cache_{kind}_duration_per_model", "plain") is None
    assert metric(server, "modeldepot_response_cache_limit_bytes") == 4 << 20
    assert (metric(server, "modeldepot_response_cache_entries") or 0) >= 1
    assert 0 < (metric(server, "modeldepot_response_cache_bytes") or 0) <= 4 << 20
    assert metric(server, "modeldepot_response_cache_evictions_total") == 0


def test_a_model_that_comes_back_has_forgotten_its_answers_and_not_its_counts(
    client: Client,
) -> None:
    before, asked = counts(client, "simple"), fresh()
    for _ in range(2):
        client.infer("simple", asked)
    client.do("unload_model", "simple")
    client.do("load_model", "simple")
    for _ in range(2):
        client.infer("simple", asked)
    assert grown(client, "simple", before) == {
        "inference_count": 2, "execution_count": 2, "success": 4, "compute_infer": 2, "hit": 2,
        "miss": 2,
    }  # fmt: skip
