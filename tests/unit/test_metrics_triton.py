"""Triton's names: the same truth, in its words and units, while a version serves."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from repository.lifecycle.generation import Trigger
from repository.lifecycle.states import Event
from repository.reports import DeviceReport
from tests.fakes.heart import at, newborn, spec
from tests.fakes.metrics import RISE, Shown, batcher, walk

REASONS = {"REJECTED": 2.0, "CANCELED": 1.0, "BACKEND": 1.0, "OTHER": 1.0}


@pytest.fixture
def shown() -> Shown:
    return Shown()


async def test_durations_are_in_microseconds_and_add_up_over_requests(shown: Shown) -> None:
    gen = shown.watched(newborn(spec("m")))
    walk(gen, *RISE)
    gen.batcher = batcher(2, 7, waiting=3)
    for _ in range(2):
        shown.metrics.meter.done(
            "m", 1, "success", duration_s=0.010, queue_s=0.001, input_s=0.002, compute_s=0.005,
            output_s=0.0005, samples=1,
        )  # fmt: skip
    which = {"model": "m", "version": "1"}
    assert await shown.value("nv_inference_request_success", **which) == 2
    assert await shown.value("nv_inference_request_duration_us", **which) == 20_000
    assert await shown.value("nv_inference_queue_duration_us", **which) == 2_000
    assert await shown.value("nv_inference_compute_input_duration_us", **which) == 4_000
    assert await shown.value("nv_inference_compute_infer_duration_us", **which) == 10_000
    assert await shown.value("nv_inference_compute_output_duration_us", **which) == 1_000
    assert await shown.value("nv_inference_count", **which) == 7
    assert await shown.value("nv_inference_exec_count", **which) == 2
    assert await shown.value("nv_inference_pending_request_count", **which) == 3
    phases = {
        phase: await shown.value("inference_phase_seconds_total", phase=phase, **which)
        for phase in ("queue", "input", "compute", "output")
    }
    assert phases == {"queue": 0.002, "input": 0.004, "compute": 0.01, "output": 0.001}


async def test_all_four_reasons_are_there_from_the_start_and_our_outcomes_fall_into_them(
    shown: Shown,
) -> None:
    gen = shown.watched(newborn(spec("m")))
    walk(gen, *RISE)
    for reason in REASONS:
        assert await shown.value("nv_inference_request_failure", model="m", reason=reason) == 0
    for outcome in ("rejected", "timeout", "canceled", "backend_error", "bad_request"):
        shown.metrics.meter.done("m", 1, outcome, duration_s=0.1)  # type: ignore[arg-type]
    for reason, count in REASONS.items():
        assert await shown.value("nv_inference_request_failure", model="m", reason=reason) == count


async def test_a_model_on_a_gpu_has_its_uuid_and_gpus_have_no_other_label(shown: Shown) -> None:
    gen = at("cuda:1", shown.watched(newborn(spec("m"))))
    walk(gen, *RISE)
    shown.models.reports = [
        DeviceReport(
            "cuda:1", "H", 80, 10, total=100, used=50, uuid="GPU-x", utilization=0.25,
            power_w=300.0, power_limit_w=700.0,
        ),
        DeviceReport("cuda:2", "H", 80, 10, total=100, used=50),  # it does not say who it is
    ]  # fmt: skip
    families = {f.name: f for f in parse(await shown.page()) if f.name.startswith("nv_")}
    (count,) = families["nv_inference_count"].samples
    assert count.labels == {"model": "m", "version": "1", "gpu_uuid": "GPU-x"}
    for name, value in {
        "nv_gpu_utilization": 0.25, "nv_gpu_memory_total_bytes": 100,
        "nv_gpu_memory_used_bytes": 50, "nv_gpu_power_usage": 300, "nv_gpu_power_limit": 700,
    }.items():  # fmt: skip
        (sample,) = families[name].samples
        assert (sample.labels, sample.value) == ({"gpu_uuid": "GPU-x"}, value)
    for name in ("nv_cpu_utilization", "nv_cpu_memory_total_bytes", "nv_cpu_memory_used_bytes"):
        (sample,) = families[name].samples
        assert sample.labels == {}


async def test_series_are_there_while_a_version_serves_and_of_no_known_type(shown: Shown) -> None:
    gen = shown.watched(newborn(spec("m"), trigger=Trigger.API))
    assert await shown.value("nv_inference_count") is None
    walk(gen, *RISE)
    assert await shown.value("nv_inference_count", model="m") == 0
    assert await shown.value("nv_model_load_duration_secs", model="m", version="1") is not None
    assert {f.type for f in parse(await shown.page()) if f.name.startswith("nv_")} == {"unknown"}
    walk(gen, Event.RETIRE)
    assert await shown.value("nv_inference_count") is None


async def test_they_can_be_left_out() -> None:
    shown = Shown(triton=False)
    walk(shown.watched(newborn(spec("m"))), *RISE)
    assert "nv_" not in await shown.page()
    assert await shown.value("model_state", model="m", state="loaded") == 1


async def test_the_tags_of_a_model_are_labels_of_what_has_tritons_names(shown: Shown) -> None:
    for gen in (
        newborn(spec("m", metric_tags={"team": 'the "A" \\1', "Zone": "x{y}"})),
        newborn(spec("plain")),
    ):
        walk(shown.watched(gen), *RISE)
    page = await shown.page("")
    samples = [s for family in parse(page) for s in family.samples if s.name.startswith("nv_inf")]
    tagged = {"_team": 'the "A" \\1', "_Zone": "x{y}"}
    for sample in samples:
        own = {k: v for k, v in sample.labels.items() if k.startswith("_")}
        assert own == (tagged if sample.labels["model"] == "m" else {})
    assert "_team" not in "".join(line for line in page.splitlines() if not line.startswith("nv_"))
    assert 'nv_inference_count{_Zone="x{y}",_team="' in page
