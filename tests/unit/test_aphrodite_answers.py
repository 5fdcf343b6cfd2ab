"""What Aphrodite's face says of times and memory: only what is known, and it adds up."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from repository.errors import (
    ConfigError,
    LoadFailedError,
    ModelNotFoundError,
    ModelNotReadyError,
    NoRoomError,
    NotKeptError,
    OutOfBoundsError,
    RepositoryError,
    SupersededError,
)
from repository.reports import LoadReport, UnloadReport
from server.codecs.aphrodite_answers import Gpus, UnloadedReply, loaded, unloaded
from server.codecs.aphrodite_body import Order
from server.shapes import shape

ON_GPU = Gpus(frozenset({"m"}), frozenset())
ON_CPU = Gpus(frozenset(), frozenset())
ALL_FREED = "All GPU memory has been freed."


def gone(**more: Any) -> UnloadReport:
    return UnloadReport("m", 1, **{"bytes_freed": 3 << 20, "took_s": 1.28, **more})


def told(report: UnloadReport, gpus: Gpus = ON_CPU) -> UnloadedReply:
    return unloaded([report], report.took_s, gpus)


def test_an_unload_from_a_gpu_reads_as_aphrodites_did() -> None:
    found = msgspec.to_builtins(told(gone(), ON_GPU))
    assert found == {
        "status": "success",
        "message": f"Model unloaded successfully in 1.28s. {ALL_FREED}",
        "drain_time_s": 0.0,
        "shutdown_time_s": 1.28,
        "total_time_s": 1.28,
        "freed_bytes": 3 << 20,
        "unloaded_models": ["m"],
    }


@pytest.mark.parametrize(
    "gpus",
    [ON_CPU, Gpus(frozenset({"m"}), frozenset({"other"})), Gpus(frozenset({"x"}), frozenset())],
)
def test_that_all_gpu_memory_is_free_is_said_only_where_it_was_used_and_no_model_has_any(
    gpus: Gpus,
) -> None:
    assert told(gone(), gpus).message.endswith("in 1.28s. 3MiB of memory came back.")


@pytest.mark.parametrize("gpus", [ON_CPU, ON_GPU])
def test_what_is_not_confirmed_is_not_claimed(gpus: Gpus) -> None:
    message = told(gone(confirmed=False), gpus).message
    assert ALL_FREED not in message and "3MiB of memory came back; whether that is all" in message


@pytest.mark.parametrize("confirmed", [True, False])
def test_what_has_not_come_back_is_said_with_its_size(confirmed: bool) -> None:
    message = told(gone(leaked_bytes=1 << 20, confirmed=confirmed), ON_GPU).message
    assert message.endswith("3MiB of memory came back; 1MiB had not yet.")


@given(st.floats(0, 1000), st.floats(0, 1))
def test_the_parts_of_an_unload_add_up_to_the_whole(took_s: float, part: float) -> None:
    found = told(gone(took_s=took_s, drain_s=took_s * part))
    assert found.drain_time_s >= 0 and found.shutdown_time_s >= 0
    whole = found.drain_time_s + found.shutdown_time_s
    assert round(whole, 2) == found.total_time_s == round(took_s, 2)


def test_several_models_are_told_together() -> None:
    both = [gone(drain_s=0.5), UnloadReport("a", 1, 5, 1.0, drain_s=0.25)]
    found = unloaded(both, 1.3, ON_CPU)
    assert found.unloaded_models == ["a", "m"] and found.freed_bytes == (3 << 20) + 5
    assert (found.drain_time_s, found.shutdown_time_s) == (0.5, 0.8)


def report(already: bool = False, **applied: tuple[Any, str]) -> LoadReport:
    return LoadReport("m", (1,), already, 0.0, applied)


def test_a_bare_load_says_when_it_was_over_and_of_which_model() -> None:
    assert msgspec.to_builtins(loaded(Order(), report(), 97.0961)) == {
        "status": "success",
        "message": "Model loaded successfully in 97.10s.",
        "load_time_s": 97.1,
        "model": "m",
    }


def test_a_load_that_said_something_shows_every_value_and_who_said_it() -> None:
    order = Order("/models/m", {"max_model_len": 8}, "request")
    found = loaded(order, report(max_model_len=(8, "uploaded"), dtype=("auto", "server")), 1.0)
    shown = msgspec.to_builtins(found)
    assert shown["model"] == "/models/m"
    assert shown["config_applied"] == {
        "model": {"value": "/models/m", "source": "request"},
        "max_model_len": {"value": 8, "source": "uploaded"},
        "dtype": {"value": "auto", "source": "server"},
    }
    assert list(shown["config_applied"]) == ["model", "max_model_len", "dtype"]


def test_nothing_to_change_is_news_and_no_error() -> None:
    assert msgspec.to_builtins(loaded(Order("M"), report(already=True), 0.0)) == {
        "status": "info",
        "message": "Model 'M' is already loaded in the registry.",
    }


@pytest.mark.parametrize(
    ("error", "status", "phrase"),
    [
        (ConfigError("no"), 400, "Bad Request"),
        (OutOfBoundsError("no"), 403, "Forbidden"),
        (ModelNotFoundError("no"), 404, "Not Found"),
        (SupersededError("no"), 409, "Conflict"),
        (LoadFailedError("no"), 500, "Internal Server Error"),
        (ModelNotReadyError("no"), 503, "Service Unavailable"),
        (NoRoomError("no"), 507, "Insufficient Storage"),
        (NotKeptError("no"), 507, "Insufficient Storage"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/load_model", "/v1/unload_model"])
def test_every_error_keeps_its_number_and_has_its_words_for_a_type(
    error: RepositoryError, status: int, phrase: str, path: str
) -> None:
    found, body = shape(path, error)
    inner = {"message": "no", "type": phrase, "param": None, "code": status}
    assert (found, msgspec.json.decode(body)) == (status, {"error": inner})


def test_what_is_wrong_with_a_config_is_told_with_what_to_do_once() -> None:
    told = [
        ConfigError("unknown key 'x'", where="request", hint="known keys: a, b"),
        ConfigError("unknown key 'x'; known keys: a, b", where="request", hint="known keys: a, b"),
    ]
    for error in told:
        message = msgspec.json.decode(shape("/v1/load_model", error)[1])["error"]["message"]
        assert message == "request: unknown key 'x'; known keys: a, b"
