"""Triton's statistics: what was counted, by version, and what became of ended generations' counts."""

from __future__ import annotations

from typing import Any

import pytest

from repository.errors import InvalidRequestError
from repository.reports import Lookups
from server.codecs.v2_paths import Route
from server.metrics.tally import MOST_ANSWERS, Tallies
from server.triton.stats import NOTHING, stats_of
from tests.fakes.repository import FakeRepository


class Line:
    """What a generation's line has counted."""

    def __init__(self, batches: dict[int, list[float]]) -> None:
        self.batches = batches
        self.executions = int(sum(count for count, _ in batches.values()))
        self.samples = int(sum(rows * count for rows, (count, _) in batches.items()))
        self.queue_length = self.in_flight = 0


class Scene:
    def __init__(self) -> None:
        self.models = FakeRepository()
        self.tallies = Tallies()
        self.models.add("m", 1, 2)
        for version in (1, 2):
            self.models.bring_up("m", version)
        self.models.add("asleep", 1)

    def count(self, model: str, batches: dict[int, list[float]]) -> None:
        (gen,) = [g for g in self.models.generations[model] if g.spec.version == 2]
        line: Any = Line(batches)
        gen.batcher = line

    def stats(self, route: Route | None = None) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = stats_of(self.models, self.tallies, route)["model_stats"]
        return found


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_each_version_that_serves_has_an_entry_and_no_other(scene: Scene) -> None:
    assert [(one["name"], one["version"]) for one in scene.stats()] == [("m", "1"), ("m", "2")]
    assert [one["version"] for one in scene.stats(Route("m", 2))] == ["2"]


@pytest.mark.parametrize("route", [Route("asleep", None), Route("no", None), Route("m", 3)])
def test_what_does_not_serve_is_refused_by_name(scene: Scene, route: Route) -> None:
    with pytest.raises(
        InvalidRequestError, match=f"requested model '{route.model}'.*not available"
    ):
        scene.stats(route)


def test_times_are_nanoseconds_of_the_requests_that_succeeded(scene: Scene) -> None:
    for _ in range(2):
        scene.tallies.done(
            "m", 2, "success",
            duration_s=0.5, queue_s=0.1, input_s=0.05, compute_s=0.25, output_s=0.01,
        )  # fmt: skip
    scene.tallies.done("m", 2, "bad_request", duration_s=0.125)
    (found,) = scene.stats(Route("m", 2))
    told = found["inference_stats"]
    assert told["success"] == {"count": 2, "ns": 10**9}
    assert told["fail"] == {"count": 1, "ns": 125_000_000}
    assert told["queue"] == {"count": 2, "ns": 200_000_000}
    assert told["compute_infer"] == {"count": 2, "ns": 500_000_000}
    assert told["compute_input"]["count"] == told["compute_output"]["count"] == 2
    assert told["cache_hit"] == told["cache_miss"] == NOTHING
    assert found["last_inference"] > 1_700_000_000_000


def test_who_was_answered_without_the_model_counts_as_success_and_not_as_computed(
    scene: Scene,
) -> None:
    scene.tallies.done("m", 2, "success", duration_s=0.5, input_s=0.125, output_s=0.125)
    scene.tallies.done(
        "m", 2, "success", duration_s=0.5, input_s=0.25, compute_s=0.125, output_s=0.5
    )
    scene.count("m", {1: [1, 0.125]})
    (gen,) = [g for g in scene.models.generations["m"] if g.spec.version == 2]
    gen.lookups = Lookups(1, 1, 0.25, 0.5)
    scene.tallies.ran("m", 2, 2, 2, lookups=Lookups(2, 0, 0.5, 0.0))
    (found,) = scene.stats(Route("m", 2))
    told = found["inference_stats"]
    assert told["success"]["count"] == told["queue"]["count"] == 2
    assert told["compute_input"] == {"count": 1, "ns": 250_000_000}
    assert told["compute_infer"] == {"count": 1, "ns": 125_000_000}
    assert told["compute_output"] == {"count": 1, "ns": 500_000_000}
    assert told["cache_hit"] == {"count": 3, "ns": 750_000_000}
    assert told["cache_miss"] == {"count": 1, "ns": 500_000_000}
    assert found["inference_count"] == 3


def test_executions_are_told_by_their_rows_those_of_ended_generations_too(scene: Scene) -> None:
    scene.tallies.ran("m", 2, 2, 8, {4: [2, 0.5]})
    scene.count("m", {1: [3, 0.25], 4: [1, 0.25]})
    (found,) = scene.stats(Route("m", 2))
    assert found["execution_count"] == 2 + 4
    assert found["inference_count"] == 8 + 3 + 4
    assert [(one["batch_size"], one["compute_infer"]) for one in found["batch_stats"]] == [
        (1, {"count": 3, "ns": 250_000_000}),
        (4, {"count": 3, "ns": 750_000_000}),
    ]


def test_answers_of_a_model_with_many_are_counted_by_their_place(scene: Scene) -> None:
    for index in (0, 1, 0, 500, 501):
        scene.tallies.answered("m", 2, index, good=True, empty=index == 1, took_s=0.5)
    (found,) = scene.stats(Route("m", 2))
    assert sorted(found["response_stats"], key=int) == ["0", "1", str(MOST_ANSWERS)]
    assert found["response_stats"]["0"]["success"]["count"] == 2
    assert found["response_stats"]["0"]["compute_infer"] == {"count": 2, "ns": 10**9}
    assert found["response_stats"]["1"]["empty_response"]["count"] == 1
    assert found["response_stats"][str(MOST_ANSWERS)]["success"]["count"] == 2


def test_memory_is_that_of_the_devices_it_is_on(scene: Scene) -> None:
    scene.count("m", {})
    (gen,) = [g for g in scene.models.generations["m"] if g.spec.version == 2]
    gen.measured = {
        "cpu": {"weights": 5, "workspace": 2},
        "cuda:1": {"weights": 9},
        "host": {"w": 3},
    }
    (found,) = scene.stats(Route("m", 2))
    assert found["memory_usage"] == [
        {"type": "CPU", "id": 0, "byte_size": 7},
        {"type": "GPU", "id": 1, "byte_size": 9},
    ]
