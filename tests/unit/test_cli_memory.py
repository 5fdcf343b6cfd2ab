"""What `modeldepot` tells of memory: plans, what sleeps and is pinned, devices."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.cli import model, run
from tests.fakes.depot import FakeDepot, depot


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDepot]:
    with depot() as fake:
        monkeypatch.setenv("MODELDEPOT_URL", fake.url)
        monkeypatch.delenv("MODELDEPOT_API_KEY", raising=False)
        yield fake


def test_a_dry_run_is_a_plan_that_can_be_read(server: FakeDepot) -> None:
    said = {
        "message": "Model m would be loaded", "would_load": True, "bytes_needed": 2048,
        "bytes_free": 1024, "device": "cuda:0", "would_evict": ["a", "b"], "source": "measured",
        "needs": {"cuda:0": 2048, "cuda:1": 1024}, "would_replace": True, "would_wake": True,
        "would_wait": True,
    }  # fmt: skip
    server.say("POST", "/v1/models/load", said)
    assert run("load", "m", "--dry-run").stdout.splitlines() == [
        "Model m would be loaded",
        "  needs 2KiB on cuda:0 and 1KiB on cuda:1 (as measured at an earlier load)",
        "  free: 1KiB on cuda:0",
        "  would make room: a, b",
        "  a gap: what serves of it now would leave before the new one has loaded",
        "  it sleeps, and would be woken",
        "  it would have to wait: others are busy, or leaving",
    ]


@pytest.mark.parametrize(("needed", "code"), [(2048, 1), (0, 0)], ids=["refused", "loaded already"])
def test_a_dry_run_fails_where_the_load_would_be_refused(
    server: FakeDepot, needed: int, code: int
) -> None:
    said = {
        "message": "no", "would_load": False, "bytes_needed": needed, "bytes_free": 9999,
        "device": "cpu", "would_evict": [],
    }  # fmt: skip
    server.say("POST", "/v1/models/load", said)
    assert run("load", "m", "--dry-run").exit_code == code


def test_what_did_not_come_back_is_said_beside_the_result(server: FakeDepot) -> None:
    said = {"message": "gone", "freed_bytes": 3 * 2**20, "leaked_bytes": 2**20}
    server.say("POST", "/v1/models/unload", said)
    result = run("unload", "m")
    assert result.exit_code == 0 and "1MiB have not come back" in result.stderr


def test_sleep_and_wake_say_what_the_server_says_and_how_long_it_took(server: FakeDepot) -> None:
    for verb in ("sleep", "wake"):
        said = {"message": f"Model m: {verb}", "took_s": 0.126}
        server.say("POST", f"/v1/models/{verb}", said)
        result = run(verb, "m")
        assert (result.exit_code, result.stdout) == (0, f"Model m: {verb} (0.13 s)\n")
        assert server.of(f"/v1/models/{verb}")[0].json == {"model_name": "m"}


def test_pin_and_unpin_say_which_and_a_pin_that_is_not_honoured_fails(server: FakeDepot) -> None:
    said = {"message": "Model m is pinned", "honoured": True}
    refused = {"message": "Model m is to be pinned, but is not: the cap", "honoured": False}
    server.say("POST", "/v1/models/pin", said, then=refused)
    assert run("pin", "m").stdout == "Model m is pinned\n"
    result = run("pin", "m")
    assert result.exit_code == 1 and "the cap" in result.stderr and "--pin-cap" in result.stderr
    assert run("unpin", "m").exit_code == 0
    assert [a.json["pinned"] for a in server.asked] == [True, True, False]


def test_the_exit_codes_of_memory_calls_are_those_of_the_others(server: FakeDepot) -> None:
    for verb in ("sleep", "wake", "pin"):
        for status, code in ((404, 3), (403, 4), (507, 1)):
            error = {"error": {"message": "no", "code": "x"}}
            server.say("POST", f"/v1/models/{verb}", error, status)
            assert run(verb, "m").exit_code == code


def test_devices_are_a_table_of_bytes(server: FakeDepot) -> None:
    gpu = {
        "device": "cuda:0", "name": "NVIDIA H200", "budget": 2**30, "reserved": 2**20,
        "free": 2**30 - 2**20, "used": 2**21, "total": 2**31, "attributed": 2**20,
        "unattributed": None,
    }  # fmt: skip
    server.say("GET", "/v1/devices", {"devices": [gpu]})
    head, row = run("devices").stdout.splitlines()
    assert head.split() == [
        "DEVICE",
        "NAME",
        "BUDGET",
        "RESERVED",
        "FREE",
        "USED",
        "OF",
        "OURS",
        "OTHERS",
    ]
    assert row.split()[0] == "cuda:0" and row.split()[3:] == [
        "1GiB", "1MiB", "1023MiB", "2MiB", "2GiB", "1MiB", "-",
    ]  # fmt: skip
    assert json.loads(run("devices", "--json").stdout) == {"devices": [gpu]}


def test_status_shows_who_sleeps_who_is_pinned_and_what_lies_where(server: FakeDepot) -> None:
    devices = {"cpu": {"reserved": 2**20, "measured": {"weights": 2**19, "workspace": 2**10}}}
    memory = {"estimated": 2**20, "reserved": 2**20, "measured": {}, "devices": devices}
    said = model(asleep=True, pinned=True, memory=memory, pin_refused="the cap", leaked_bytes=1024)
    server.say("GET", "/v1/models/m", said)
    told = run("status", "m").stdout
    assert "loaded (asleep, pinned)" in told
    assert "weights 512KiB, workspace 1KiB" in told
    assert "It is to be pinned, but is not: the cap" in told and "1KiB did not come back" in told
