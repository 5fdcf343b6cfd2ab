"""How adapters are shown: in a model's page and in metrics."""

from __future__ import annotations

import msgspec

from repository.lifecycle.states import State
from repository.reports import AdapterView
from server.faces.models import view_of
from tests.fakes.heart import brought, newborn, spec
from tests.fakes.metrics import Shown


def test_a_models_page_lists_its_adapters() -> None:
    shown = Shown()
    shown.models.put(brought(newborn(spec("m")), State.READY))
    views = [
        AdapterView("a", "adapters/a", "loaded", "device", pin=True, rank=8, bytes=512),
        AdapterView("b", "../b", "failed", origin="call", error="no layer", options={"k": "v"}),
    ]
    page = msgspec.to_builtins(view_of(shown.models.status("m"), "us", views))
    a, b = page["adapters"]
    assert (a["name"], a["state"], a["residence"], a["error"]) == ("a", "loaded", "device", None)
    assert (a["src"], a["pin"], a["rank"], a["bytes"]) == ("adapters/a", True, 8, 512)
    assert (b["origin"], b["error"], b["options"]) == ("call", "no layer", {"k": "v"})


async def test_adapters_have_series_while_they_are_registered() -> None:
    shown = Shown()
    shown.models.put(brought(newborn(spec("m")), State.READY))
    view = AdapterView("a", "adapters/a", "loaded", bytes=512, requests=3, loads=2, failures=1)
    shown.models.of_models["m"] = [view]
    of = {"model": "m", "adapter": "a"}
    assert await shown.value("adapter_state", **of, state="loaded") == 1
    assert await shown.value("adapter_state", **of, state="failed") == 0
    assert await shown.value("adapter_memory_bytes", **of) == 512
    assert await shown.value("adapter_requests_total", **of) == 3
    assert await shown.value("adapter_load_total", **of, outcome="success") == 2
    assert await shown.value("adapter_load_total", **of, outcome="failure") == 1
    shown.models.of_models.clear()
    assert "adapter=" not in await shown.page()


async def test_a_thousand_adapters_have_a_hundred_series_and_one_for_the_rest() -> None:
    shown = Shown()
    shown.models.put(brought(newborn(spec("m")), State.READY))
    shown.models.of_models["m"] = [
        AdapterView(f"a{i:04}", "", "loaded", bytes=1, requests=2) for i in range(1000)
    ]
    requests = {
        s.labels["adapter"]: s.value
        for s in await shown.samples()
        if s.name == "modeldepot_adapter_requests_total"
    }
    assert len(requests) == 101 and requests["a0000"] == 2 and requests["_other"] == 1800
    assert await shown.value("adapter_state", adapter="_other", state="loaded") == 900
