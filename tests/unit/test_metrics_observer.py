"""How loads, failures and executions are counted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from repository.errors import (
    CheckFailedError,
    ConfigError,
    FilesChangedError,
    IncompleteFilesError,
    LoadFailedError,
    LoadTimeoutError,
    NoRoomError,
    UntrustedCodeError,
    WorkerDiedError,
)
from repository.lifecycle.generation import Generation, Trigger
from repository.lifecycle.states import Event
from repository.reports import CacheReport, Lookups
from repository.spec import FileStamp
from server.metrics import reading
from server.metrics.observer import reason_of
from tests.fakes.heart import at, newborn, spec
from tests.fakes.metrics import LEAVE, RISE, Shown, batcher, walk


@pytest.fixture
def shown() -> Shown:
    return Shown()


async def test_a_failed_load_is_counted_with_its_reason_and_the_worker_is_down(
    shown: Shown,
) -> None:
    gen = shown.watched(newborn(spec("m"), trigger=Trigger.WATCH))
    walk(gen, Event.ADMIT)
    gen.fault(CheckFailedError("differs"))
    walk(gen, Event.STOPPED)
    assert await shown.value("model_load_total", trigger="watch", outcome="failure") == 1
    assert await shown.value("model_load_failures_total", model="m", reason="check") == 1
    assert await shown.value("worker_up", model="m", device="cpu") == 0


async def test_a_model_that_served_and_then_died_is_no_failed_load(shown: Shown) -> None:
    gen = shown.watched(newborn(spec("m")))
    walk(gen, *RISE)
    gen.fault(WorkerDiedError("killed"))
    walk(gen, Event.STOPPED)
    assert await shown.value("model_load_total", outcome="success") == 1
    assert await shown.value("model_load_total", outcome="failure") is None
    assert await shown.value("model_unload_total") is None


@pytest.mark.parametrize(
    ("end", "outcome"),
    [
        (lambda g: g.retire("overtaken by a newer wish"), "superseded"),
        (lambda g: g.retire("not wanted"), "cancelled"),
        (lambda g: g.fault(FilesChangedError("changed")), "superseded"),
        (lambda g: g.fault(asyncio.CancelledError()), "cancelled"),
    ],
)
async def test_a_load_that_was_given_up_is_no_failure(
    shown: Shown, end: Callable[[Generation], None], outcome: str
) -> None:
    gen = shown.watched(newborn(spec("m")))
    walk(gen, Event.ADMIT)
    end(gen)
    if gen.error is None:
        walk(gen, Event.RETIRE)
    assert await shown.value("model_load_total", outcome=outcome) == 1
    assert await shown.value("model_load_failures_total") is None


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConfigError("x"), "config"),
        (IncompleteFilesError("x"), "incomplete"),
        (UntrustedCodeError("x"), "security"),
        (LoadTimeoutError("x"), "timeout"),
        (NoRoomError("x"), "oom"),
        (LoadFailedError("CUDA out of memory. Tried to allocate"), "oom"),
        (LoadFailedError("bad opset"), "backend"),
        (ValueError("/secret/path"), "backend"),
    ],
)
def test_a_reason_is_one_of_eight_words_whatever_the_error_says(
    error: Exception, reason: str
) -> None:
    assert reason_of(error) == reason


def test_the_cause_of_a_failure_says_more_than_its_wrapping() -> None:
    error = LoadFailedError("could not load")
    error.__cause__ = FileNotFoundError("model.onnx")
    assert reason_of(error) == "missing_file"


async def test_load_durations_are_by_backend_and_the_last_one_by_model(shown: Shown) -> None:
    times = iter((1.0, 1.5, 3.5))  # born, admitted, ready
    gen = shown.watched(newborn(spec("m"), clock=lambda: next(times)))
    walk(gen, *RISE)
    shown.metrics.observer.phase(gen, "warmup", 0.2)
    assert await shown.value("model_last_load_duration_seconds", model="m") == 2.5
    total = await shown.value("model_load_duration_seconds_sum", backend="fake", phase="total")
    assert total == 2.5
    assert await shown.value("model_load_duration_seconds_count", phase="warmup") == 1


async def test_executions_survive_the_generation_that_counted_them(shown: Shown) -> None:
    old = shown.watched(newborn(spec("m"), 1))
    walk(old, *RISE)
    old.batcher = batcher(5, 20, waiting=3)
    assert await shown.value("inference_executions_total", model="m") == 5
    assert await shown.value("inference_queue_length", model="m") == 3
    old.retire("replaced by #2")
    walk(old, *LEAVE)
    new = shown.watched(newborn(spec("m"), 2))
    walk(new, *RISE)
    new.batcher = batcher(1, 2)
    assert await shown.value("inference_executions_total", model="m") == 6
    assert await shown.value("inference_samples_total", model="m") == 22


async def test_answers_that_are_kept_are_counted_where_there_are_any(shown: Shown) -> None:
    old, plain = shown.watched(newborn(spec("m"), 1)), shown.watched(newborn(spec("plain"), 2))
    for gen in (old, plain):
        walk(gen, *RISE)
        gen.batcher = batcher(1, 1)
    old.lookups = Lookups(3, 2, 0.003, 0.002)
    for name in ("response_cache_hits_total", "nv_cache_num_hits_per_model"):
        assert await shown.value(name, model="m") == 3
        assert await shown.value(name, model="plain") is None
    assert await shown.value("response_cache_bytes") is None
    shown.models.kept = CacheReport(1000, 100, 7, 2)
    assert await shown.value("response_cache_limit_bytes") == 1000
    assert await shown.value("response_cache_bytes") == 100
    assert await shown.value("response_cache_entries") == 7
    assert await shown.value("response_cache_evictions_total") == 2
    old.retire("replaced by #3")
    walk(old, *LEAVE)
    new = shown.watched(newborn(spec("m"), 3))
    walk(new, *RISE)
    new.batcher, new.lookups = batcher(1, 1), Lookups(1, 1, 0.001, 0.001)
    assert await shown.value("response_cache_hits_total", model="m") == 4
    assert await shown.value("response_cache_misses_total", model="m") == 3
    assert await shown.value("nv_cache_num_hits_per_model", model="m") == 4
    assert await shown.value("nv_cache_num_misses_per_model", model="m") == 3
    assert await shown.value("nv_cache_hit_duration_per_model", model="m") == 4000
    assert await shown.value("nv_cache_miss_duration_per_model", model="m") == 3000


async def test_the_lag_of_a_watched_change_is_from_its_newest_file_to_ready(shown: Shown) -> None:
    files = tuple(FileStamp("f", 1, 0, int((time.time() - age) * 1e9), 1) for age in (50, 20))
    for trigger in (Trigger.WATCH, Trigger.API):
        gen = shown.watched(newborn(replace(spec("m"), files=files), trigger=trigger))
        walk(gen, *RISE)
    assert await shown.value("watch_lag_seconds_count") == 1
    lag_s = await shown.value("watch_lag_seconds_sum")
    assert lag_s == pytest.approx(20, abs=15)


async def test_an_unload_says_how_much_of_its_memory_came_back(shown: Shown) -> None:
    gen = shown.watched(newborn(spec("m")))
    walk(gen, *RISE)
    gen.measured = {"cuda:0": {"weights": 80}, "cpu": {"workspace": 20}}
    gen.retire("not wanted")
    gen.leaked = 25
    walk(gen, *LEAVE)
    assert await shown.value("model_memory_reclaimed_ratio", model="m") == 0.75
    assert await shown.value("model_memory_leaked_bytes_total", model="m") == 25


@pytest.mark.parametrize(("confirmed", "ratio"), [(True, 1.0), (False, 0.0)])
async def test_memory_of_workers_that_may_still_be_there_has_not_come_back(
    shown: Shown, confirmed: bool, ratio: float
) -> None:
    gen = shown.watched(newborn(spec("m")))
    walk(gen, *RISE)
    gen.measured = {"cpu": {"workspace": 20}}
    gen.retire("not wanted")
    gen.confirmed = confirmed
    walk(gen, *LEAVE)
    assert await shown.value("model_memory_reclaimed_ratio", model="m") == ratio
    assert await shown.value("model_memory_leaked_bytes_total", model="m") is None


async def test_falling_asleep_is_no_unload_and_a_wake_is_counted_where_it_serves(
    shown: Shown,
) -> None:
    old = shown.watched(newborn(spec("m")))
    walk(old, *RISE)
    old.retire("evicted: manual")
    walk(old, Event.RETIRE, Event.SLEPT)
    assert await shown.value("model_sleeps_total", model="m") == 1
    assert await shown.value("model_asleep", model="m") == 1
    assert await shown.value("model_state", model="m", state="unloaded") == 1
    new = shown.watched(newborn(spec("m"), 2, trigger=Trigger.API))
    walk(new, Event.ADMIT)
    old.step(Event.WOKEN)
    new.woken = True
    walk(new, Event.LOADED, Event.WARMED)
    shown.metrics.observer.phase(new, "wake", 0.5)
    assert await shown.value("model_wakes_total", model="m") == 1
    assert await shown.value("model_load_duration_seconds_sum", phase="wake") == 0.5
    assert await shown.value("model_unload_total", model="m") is None
    assert await shown.value("model_memory_reclaimed_ratio", model="m") is None


async def test_memory_is_told_by_device_and_kind_and_what_is_on_the_host_by_worker(
    shown: Shown,
) -> None:
    gen = at("cuda:0", shown.watched(newborn(spec("m"))))
    walk(gen, *RISE)
    gen.measured = {
        "cuda:0": {"weights": 50, "context": 30}, "cuda:1": {"weights": 40},
        "cpu": {"workspace": 7}, "host": {"weights": 3},
    }  # fmt: skip
    size = "model_memory_bytes"
    assert await shown.value(size, device="cuda:0", kind="context") == 30
    assert await shown.value(size, device="cuda:1", kind="weights") == 40
    assert await shown.value("worker_memory_bytes", model="m", device="cuda:0") == 10


async def test_what_has_not_happened_yet_can_be_seen_to_have_not(shown: Shown) -> None:
    shown.metrics.observer.watcher(up=True)
    for reason in ("queue_full", "deadline", "draining", "rate_limit", "body_size"):
        assert await shown.value("load_shed_total", reason=reason) == 0
    for scope in ("inference", "admin", "metrics"):
        assert await shown.value("auth_failures_total", scope=scope) == 0
    assert await shown.value("watch_overflows_total", repository="models") == 0
    assert await shown.value("illegal_moves_total") == 0


async def test_a_request_that_comes_while_the_repository_is_read_is_not_forgotten(
    shown: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading goes in slices: here a model appears, and is asked, between two of them."""
    monkeypatch.setattr(reading, "SLICE_S", 0.0)
    walk(shown.watched(newborn(spec("a"))), *RISE)
    page = asyncio.ensure_future(shown.metrics.render())
    await asyncio.sleep(0)  # the names have been taken
    new = shown.watched(newborn(spec("z"), 2))
    walk(new, *RISE)
    shown.served(new)
    await page
    assert await shown.value("model_load_total", model="z") == 1
    assert await shown.value("inference_requests_total", model="z") == 1
