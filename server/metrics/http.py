"""GET /metrics, and the one object that the rest of the server hands its numbers to.

`Metrics()` exists before the repository, because the repository is born with its observer;
`attach` tells it later what to look at. It has its own registry: nothing that a library registers
with prometheus_client's global one is shown.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from litestar import MediaType, Request, Response, Router, get
from litestar.di import NamedDependency
from prometheus_client import CollectorRegistry, Counter, disable_created_metrics, exposition
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from repository.repository import Repository
from server.metrics import names
from server.metrics.collector import Reading, SnapshotCollector, read
from server.metrics.observer import MetricsObserver
from server.metrics.tally import Tallies

OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
FRESH_S = 1.0  # two scrapers, or one that is impatient, cost one rendering


class Metrics:
    """observer   for the Repository's constructor
    meter      for the faces (an InferMeter)
    registry   what `/metrics` shows
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self.meter = Tallies()
        self.observer = MetricsObserver(self.registry, self.meter)
        self._snapshot = SnapshotCollector()
        self.registry.register(self._snapshot)
        ProcessCollector(registry=self.registry)
        self._auth_failures = self._counter(names.AUTH_FAILURES)
        self._shed = self._counter(names.LOAD_SHED)
        self._models: Repository | None = None
        self._clock = clock
        self._rendering = asyncio.Lock()
        self._rendered: dict[str, tuple[float, bytes]] = {}  # content type -> when, what

    def _counter(self, family: names.Family) -> Counter:
        return Counter(family.full, family.help, family.labels, registry=self.registry)

    def attach(self, models: Repository) -> None:
        """The repository whose truth is shown from now on."""
        self._models = models
        self.observer.repository = models.root.name or self.observer.repository
        known = models.status

        def knows(model: str) -> bool:
            try:
                known(model)
            except Exception:  # noqa: BLE001 - a label is no reason to fail a request
                return False
            return True

        self.meter.knows = knows

    def auth_failed(self, scope: str) -> None:
        """Somebody without the key for `scope` (inference, admin, metrics) was refused."""
        self._auth_failures.labels(scope).inc()

    def shed(self, reason: str) -> None:
        """queue_full, deadline, draining, rate_limit or body_size."""
        self._shed.labels(reason).inc()

    async def render(self, accept: str = "") -> tuple[bytes, str]:
        """The page and its content type, at most FRESH_S old. The repository is read here, on the
        loop; the text is made in a thread."""
        encoder, content_type = encoder_for(accept)
        async with self._rendering:
            at, page = self._rendered.get(content_type, (float("-inf"), b""))
            if self._clock() - at >= FRESH_S:
                now = self._clock()
                models = self._models
                self._snapshot.reading = read(models, self.meter) if models else Reading()
                self.observer.keep({m.name for m in self._snapshot.reading.models})
                page = await asyncio.to_thread(encoder, self.registry)
                self._rendered[content_type] = (now, page)
        return page, content_type


def encoder_for(accept: str) -> tuple[Callable[[Collector], bytes], str]:
    """Two formats, whatever versions a client names: each one is kept for a while."""
    if "application/openmetrics-text" in accept:
        return openmetrics.generate_latest, OPENMETRICS
    return exposition.generate_latest, exposition.CONTENT_TYPE_PLAIN_0_0_4


def build_metrics(models: Repository) -> Metrics:
    """For a repository that exists already and whose observer is nobody's (tests, tools)."""
    metrics = Metrics()
    metrics.attach(models)
    return metrics


@get("/metrics", media_type=MediaType.TEXT)
async def show_metrics(
    request: Request[Any, Any, Any], metrics: NamedDependency[Metrics]
) -> Response[bytes]:
    page, content_type = await metrics.render(request.headers.get("accept", ""))
    return Response(page, headers={"content-type": content_type, "cache-control": "no-store"})


router = Router("/", route_handlers=[show_metrics])
