"""GET /metrics, and the one object that the rest of the server hands its numbers to.

`Metrics()` exists before the repository, because the repository is born with its observer;
`attach` tells it later what to look at. Nothing that a library registers with prometheus_client is
shown; of it are the figures of the process (`process_*`) alone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from litestar import MediaType, Request, Response, Router, get
from litestar.di import NamedDependency
from prometheus_client import CollectorRegistry, exposition
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from repository.repository import Repository
from server.metrics import names
from server.metrics.observer import MetricsObserver
from server.metrics.page import Page
from server.metrics.reading import Reading, read
from server.metrics.tally import Tallies

PLAIN = exposition.CONTENT_TYPE_PLAIN_0_0_4
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
FRESH_S = 1.0  # two scrapers, or one that is impatient, cost one rendering
SCOPES = ("inference", "admin", "metrics")
SHED = ("queue_full", "deadline", "draining", "rate_limit", "body_size")


class _Rendered(NamedTuple):
    at: float
    page: bytes


class Metrics:
    """observer   for the Repository's constructor
    meter      for the faces (an InferMeter)

    `triton`: the page has Triton's names too.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, triton: bool = True) -> None:
        self.meter = Tallies()
        self.observer = MetricsObserver(self.meter)
        self._triton = triton
        self._page = Page(triton=triton)
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)
        self._models: Repository | None = None
        self._clock = clock
        self._one_at_a_time = asyncio.Lock()
        self._rendered: dict[bool, _Rendered] = {}  # by format: is it OpenMetrics
        self._jobs: dict[bool, asyncio.Task[bytes]] = {}
        for scope in SCOPES:  # what has not happened yet can be seen to have not
            self.observer.server.count(names.AUTH_FAILURES, scope, by=0)
        for reason in SHED:
            self.observer.server.count(names.LOAD_SHED, reason, by=0)

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
        self.observer.server.count(names.AUTH_FAILURES, scope)

    def shed(self, reason: str) -> None:
        """queue_full, deadline, draining, rate_limit or body_size."""
        self.observer.server.count(names.LOAD_SHED, reason)

    async def render(self, accept: str = "") -> tuple[bytes, str]:
        """The page and its content type, at most FRESH_S old. The repository is read here, on the
        loop; the text is made in a thread. Whoever asks meanwhile waits for the same page, and goes on
        waiting if the one who asked first leaves."""
        rich = "application/openmetrics-text" in accept
        kept = self._rendered.get(rich)
        if kept is not None and self._clock() - kept.at < FRESH_S:
            page = kept.page
        else:
            job = self._jobs.get(rich)
            if job is None:
                job = self._jobs[rich] = asyncio.create_task(self._renew(rich), name="metrics")
                job.add_done_callback(lambda job: self._over(rich, job))
            page = await asyncio.shield(job)
        return page, OPENMETRICS if rich else PLAIN

    async def _renew(self, rich: bool) -> bytes:
        async with self._one_at_a_time:
            now, models = self._clock(), self._models
            reading = await read(models, self.observer, self.meter) if models else Reading()
            page = await asyncio.to_thread(self._write, reading, rich)
            self._rendered[rich] = _Rendered(now, page)
        return page

    def _write(self, reading: Reading, rich: bool) -> bytes:
        encode: Callable[[Collector], bytes] = exposition.generate_latest
        if rich:
            encode = openmetrics.generate_latest  # it also writes the end that this format has
        try:
            return self._page.write(reading, openmetrics=rich, end=encode(self._process))
        except BaseException:
            self._page = Page(
                triton=self._triton
            )  # what was half written must not be believed again
            raise

    def _over(self, rich: bool, job: asyncio.Task[bytes]) -> None:
        del self._jobs[rich]
        if not job.cancelled():
            job.exception()  # retrieved: all who waited may have left


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
