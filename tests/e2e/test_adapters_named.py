"""Adapters as they come and go and as requests name them, against a real server."""

from __future__ import annotations

import json
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests import adapters
from tests.e2e.djl import MANY, SAGEMAKER, Depot, add_model, client_of, refused, serving
from tests.e2e.server import WITHIN_S

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def depot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Depot]:
    home = tmp_path_factory.mktemp("adapters")
    for model in (MANY, "pages", "stirred"):
        add_model(home, model)
    with serving(home) as depot:
        yield depot


# lists --------------------------------------------------------------------------------------------


def test_a_list_comes_in_pages_sorted_by_name(depot: Depot) -> None:
    names = [f"p{i}" for i in range(5)]
    for name in reversed(names):
        depot.register(name, model="pages", preload="false")

    def get(**query: Any) -> tuple[list[str], str | None]:
        found = depot.good("GET", "", "pages", params=query)
        return [one["name"] for one in found["adapters"]], found.get("nextPageToken", None)

    for whole in ({}, {"limit": 0}, {"limit": -3}, {"limit": 101}, {"limit": ""}, {"limit": 5}):
        assert get(**whole) == (names, None), whole
    for start in ({}, {"next_page_token": "0"}, {"next_page_token": ""}):
        first, token = get(limit=2, **start)
        assert first == names[:2] and token
    second, token = get(limit=2, next_page_token=token)
    assert second == names[2:4] and token
    depot.unregister("p3", model="pages")  # the last of that page
    assert get(limit=2, next_page_token=token) == (["p4"], None)
    for query, message in (
        ({"limit": "abc"}, "'limit' must be a whole number, not 'abc'"),
        ({"next_page_token": "2"}, "...none that a list has given"),
        ({"next_page_token": "../../x"}, "...none that a list has given"),
    ):
        refused(depot.call("GET", "", "pages", params=query), 400, message)
    depot.unregister("p0", "p1", "p2", "p4", model="pages")


def test_whoever_stays_is_on_exactly_one_page_while_others_come_and_go(depot: Depot) -> None:
    model = "stirred"
    stay = [f"s{i:02}" for i in range(12)]
    for name in stay:
        depot.register(name, model=model, preload="false")
    over = threading.Event()

    def stir(seed: int) -> set[str]:
        """Two of them; each has names of its own."""
        chance, mine = random.Random(seed), set[str]()
        pool = [f"s{i:02}{'xy'[seed]}" for i in range(12)]
        with client_of(depot.server) as client:
            other = Depot(depot.server, client, depot.home)
            while not over.is_set():
                name = chance.choice(pool)
                if name in mine:
                    other.unregister(name, model=model)
                else:
                    other.register(name, model=model, preload="false")
                mine ^= {name}
            other.unregister(*mine, model=model)
        return mine

    with ThreadPoolExecutor(2) as users:
        stirring = [users.submit(stir, seed) for seed in range(2)]
        try:
            for limit in (1, 2, 3, 5, 7) * 3:
                seen: list[str] = []
                token: str | None = "0"
                while token is not None:
                    query = {"limit": limit, "next_page_token": token}
                    found = depot.good("GET", "", model, params=query)
                    seen += [one["name"] for one in found["adapters"]]
                    token = found.get("nextPageToken")
                assert seen == sorted(set(seen)) and set(stay) <= set(seen)
        finally:
            over.set()
        assert [one.result(WITHIN_S) for one in stirring]
    assert depot.names(model) == stay
    depot.unregister(*stay, model=model)


# the folder ---------------------------------------------------------------------------------------


def until(holds: Callable[[], bool], within_s: float) -> float:
    """For what only the list shows. Returns how long it took."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < within_s
    return time.monotonic() - began


def test_one_that_is_dropped_in_is_listed_within_two_seconds_and_half_of_one_is_not(
    depot: Depot,
) -> None:
    """At the settle time that servers have."""
    place = depot.repo / "m/adapters"
    new = adapters.write_adapter(depot.home / "new/dropped", lora_alpha=4)
    half = adapters.write_config(depot.home / "new/half", lora_alpha=6).parent
    (half / "adapter_model.safetensors").write_bytes(adapters.weights()[:-5])
    place.mkdir(exist_ok=True)
    half.rename(place / "half")
    new.rename(place / "dropped")

    def write_on() -> None:
        """Somebody is still at it."""
        with (place / "half/adapter_model.safetensors").open("ab") as file:
            file.write(b"\0")

    def there() -> bool:
        write_on()
        names = depot.names()
        assert "half" not in names
        return "dropped" in names

    assert until(there, 2.0) < 2.0
    refused(depot.call("GET", "/half"), 404, "The adapter half was not found")
    found = depot.shown("dropped")
    assert (found["origin"], found["src"]) == ("folder", "adapters/dropped")
    until(lambda: depot.infer(adapters="dropped").status_code == 200, WITHIN_S)
    assert depot.added(adapters=["dropped", ""]) == [4, 0]
    refused(
        depot.call("POST", "", params={"name": "dropped", "src": "loras/three"}),
        409, "...already exists",
    )  # fmt: skip
    (place / "half/adapter_model.safetensors").write_bytes(adapters.weights())
    shutil.rmtree(place / "dropped")
    until(lambda: "dropped" not in depot.names(), 3.0)
    assert depot.infer(adapters="dropped").status_code == 424
    until(lambda: "half" in depot.names(), 3.0)
    depot.unregister("half")
    assert (place / "half").is_dir() and "half" not in depot.names()


# inference ----------------------------------------------------------------------------------------

# The second address is the same one, answered on the way that is not the quick one.
INFER = {"quick": "m", "over ASGI": "/m"}


@pytest.mark.parametrize("way", INFER)
def test_a_request_names_its_adapter_in_its_body_address_or_header_and_the_later_wins(
    depot: Depot, way: str
) -> None:
    for name, src in (("i3", "loras/three"), ("i5", "loras/five")):
        depot.register(name, src)
    said: list[tuple[dict[str, Any], list[float]]] = [
        ({}, [0, 0]),
        ({"adapters": "i3"}, [3, 3]),
        ({"adapters": ["i5", ""]}, [5, 0]),
        ({"adapters": "", "parameters": {"adapter": "i3"}}, [0, 0]),
        ({"adapters": ["", "i5"], "parameters": {"adapters": '["i3", "i3"]'}}, [0, 5]),
        ({"parameters": {"adapter": "i3"}}, [3, 3]),
        ({"parameters": {"adapter": "i3"}, "query": "?adapter=i5"}, [5, 5]),
        ({"adapters": ["i5", ""], "query": "?adapter=i3"}, [3, 3]),
        ({"adapters": "i3", "query": "?adapter=i3", "headers": {SAGEMAKER: "i5"}}, [5, 5]),
        ({"headers": {SAGEMAKER: "i3"}}, [3, 3]),
    ]
    for _ in range(2):
        for asked, wanted in said:
            assert depot.added(model=INFER[way], **asked) == wanted, asked
    for asked in ({"adapters": ["i3"]}, {"adapters": ["i3"] * 3}):
        found = depot.infer(model=INFER[way], **asked)
        assert found.status_code == 400 and "2 rows" in found.json()["error"]
    for asked in ({"adapters": "a1"}, {"adapters": ["i3", "a1"]}, {"query": "?adapter=a1"},
                  {"adapters": "i3", "headers": {SAGEMAKER: "a1"}},
                  {"parameters": {"adapter": "a1"}}):  # fmt: skip
        found = depot.infer(model=INFER[way], **asked)
        error = {"error": "The adapter a1 has not been registered"}
        assert (found.status_code, found.json()) == (424, error)
    depot.unregister("i3", "i5")


def test_a_large_request_in_json_names_an_adapter_for_each_row(depot: Depot) -> None:
    """As scribes read it."""
    depot.register("big")
    x = {"name": "x", "datatype": "FP32", "shape": [8, 2], "data": [0.0] * 16}
    said = json.dumps({"inputs": [x], "adapters": ["big", ""] * 4}).ljust(100_000)
    path = "/v2/models/m/infer"
    found = depot.client.post(path, content=said).json()
    assert found["outputs"][0]["data"][::2] == [3, 0] * 4
    found = depot.client.post(path, content=said, headers={SAGEMAKER: "big"}).json()
    assert found["outputs"][0]["data"] == [3] * 16
    assert depot.client.post(f"{path}?adapter=no", content=said).status_code == 424
    depot.unregister("big")
