"""What each version has done, as Triton's statistics count it: counts and nanoseconds since the start.

    requests     success and fail; of those that succeeded also queue, and the three parts of compute
                 where the model was run; those that were looked up among the answers that are kept
    executions   batch_stats, by their rows; only the time inside the model is known of one
    answers      response_stats, of models with any number of answers

A time that is not measured is left at count 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from repository.errors import InvalidRequestError, RepositoryError
from repository.lifecycle.generation import Generation
from repository.lifecycle.placement import HOST
from repository.lifecycle.states import State
from repository.reports import Lookups
from repository.repository import Repository
from server.codecs.v2_paths import Route
from server.metrics.tally import Answers, Tallies, Tally

NS = 10**9
NOTHING = {"count": 0, "ns": 0}
_NO_TALLY = Tally()


def stats_of(models: Repository, tallies: Tallies, route: Route | None) -> dict[str, Any]:
    """{"model_stats": [...]} of the versions that serve: all models' or one's. Raises
    InvalidRequestError (Triton's number) where it does not serve."""
    found = _serving(models, route)
    if route is not None and not found:
        raise _not_available(route)
    return {"model_stats": [_of(gens, tallies) for gens in found]}


def _not_available(route: Route) -> InvalidRequestError:
    version = "" if route.version is None else f" version {route.version}"
    return InvalidRequestError(f"requested model '{route.model}'{version} is not available")


def _serving(models: Repository, route: Route | None) -> list[list[Generation]]:
    """The generations of each version that serves, newest first, by name and version."""
    try:
        statuses = models.statuses() if route is None else [models.status(route.model)]
    except RepositoryError as error:
        assert route is not None
        raise _not_available(route) from error
    found = []
    for status in statuses:
        versions: dict[int, list[Generation]] = {}
        for gen in status.generations:
            versions.setdefault(gen.spec.version, []).append(gen)
        for version, gens in sorted(versions.items()):
            if route is not None and route.version not in (None, version):
                continue
            if any(gen.state is State.READY for gen in gens):
                found.append(gens)
    return found


def _of(gens: list[Generation], tallies: Tallies) -> dict[str, Any]:
    model, version = gens[0].spec.key
    tally = tallies.find(model, version) or _NO_TALLY
    alive = [gen for gen in gens if gen.batcher is not None and gen.ended_at is None]
    return {
        "name": model,
        "version": str(version),
        "last_inference": int(tally.last_at * 1000),
        "inference_count": tally.samples + sum(gen.work.samples for gen in alive),
        "execution_count": tally.executions + sum(gen.work.executions for gen in alive),
        "inference_stats": _requests(tally, alive),
        "response_stats": {str(at): _answers(one) for at, one in sorted(tally.answers.items())},
        "batch_stats": _batches(tally, alive),
        "memory_usage": _memory(alive),
    }


def _requests(tally: Tally, alive: Iterable[Generation]) -> dict[str, Any]:
    good = sum(n for (_, outcome), n in tally.requests.items() if outcome == "success")
    bad = sum(tally.requests.values()) - good
    ran = good - tally.idle
    lookups = tally.all_lookups(gen.lookups for gen in alive) or Lookups()
    return {
        "success": _told(good, tally.duration.total),
        "fail": _told(bad, tally.failed_s),
        "queue": _told(good, tally.queue_s),
        "compute_input": _told(ran, tally.input_s - tally.idle_input_s),
        "compute_infer": _told(ran, tally.compute_s),
        "compute_output": _told(ran, tally.output_s - tally.idle_output_s),
        "cache_hit": _told(lookups.hits, lookups.hit_s),
        "cache_miss": _told(lookups.misses, lookups.miss_s),
    }


def _answers(of: Answers) -> dict[str, Any]:
    all_of_them = of.success + of.empty + of.fail
    return {
        "compute_infer": _told(all_of_them, of.took_s),
        "compute_output": NOTHING,
        "success": _told(of.success, 0.0),
        "fail": _told(of.fail, 0.0),
        "empty_response": _told(of.empty, 0.0),
        "cancel": NOTHING,
    }


def _batches(tally: Tally, alive: Iterable[Generation]) -> list[dict[str, Any]]:
    total = {rows: list(of) for rows, of in tally.batches.items()}
    for gen in alive:
        assert gen.batcher is not None
        for rows, (count, seconds) in gen.batcher.batches.items():
            mine = total.setdefault(rows, [0, 0.0])
            mine[0] += count
            mine[1] += seconds
    return [
        {
            "batch_size": rows,
            "compute_input": NOTHING,
            "compute_infer": _told(int(count), seconds),
            "compute_output": NOTHING,
        }
        for rows, (count, seconds) in sorted(total.items())
    ]


def _memory(alive: Iterable[Generation]) -> list[dict[str, Any]]:
    """By device, as the workers measured it last."""
    held: dict[str, int] = {}
    for gen in alive:
        for device, kinds in gen.measured.items():
            held[device] = held.get(device, 0) + sum(kinds.values())
    return [
        {
            "type": "GPU" if device.startswith("cuda") else "CPU",
            "id": int(number) if (number := device.rpartition(":")[2]).isdigit() else 0,
            "byte_size": size,
        }
        for device, size in sorted(held.items())
        if device != HOST
    ]


def _told(count: int, seconds: float) -> dict[str, int]:
    return {"count": count, "ns": int(seconds * NS)}
