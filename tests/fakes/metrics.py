"""Metrics over a repository of the test's making, and something of everything to fill it with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from prometheus_client.parser import text_string_to_metric_families as parse
from prometheus_client.samples import Sample

from repository.errors import (
    ConfigError,
)
from repository.lifecycle.generation import Generation, Trigger
from repository.lifecycle.states import Event, State
from repository.reports import AdapterView, CacheReport, Lookups
from repository.repository import DeviceReport
from server.metrics import names
from server.metrics.http import Metrics
from tests.fakes.heart import at, newborn, spec
from tests.fakes.shown import ShownRepository


class Shown:
    """Each `page` is a fresh one."""

    def __init__(self, *, triton: bool = True) -> None:
        self.models = ShownRepository()
        self.now = 0.0
        self.metrics = Metrics(clock=lambda: self.now, triton=triton)
        self.metrics.attach(self.models)

    async def page(self, accept: str = "") -> str:
        self.now += 10
        return (await self.metrics.render(accept))[0].decode()

    async def samples(self) -> list[Sample]:
        return [s for family in parse(await self.page()) for s in family.samples]

    async def value(self, name: str, **labels: str) -> float | None:
        """`name` without our prefix; or one of Triton's."""
        full = name if name.startswith("nv_") else names.PREFIX + name
        found = [
            s.value
            for s in await self.samples()
            if s.name == full and labels.items() <= s.labels.items()
        ]
        assert len(found) <= 1, f"{name} is ambiguous"
        return found[0] if found else None

    def watched(self, gen: Generation) -> Generation:
        """The observer is told of its birth and of every later step, as the reconciler does."""
        self.models.put(gen)
        gen.on_step = self.metrics.observer.stepped
        self.metrics.observer.stepped(gen, State.GONE)
        return gen

    def served(self, gen: Generation, **rest: Any) -> None:
        self.metrics.meter.done(
            gen.spec.model, gen.spec.version, "success", duration_s=0.004, samples=1, **rest
        )


def walk(gen: Generation, *events: Event) -> None:
    for event in events:
        gen.step(event)


def batcher(executions: int, samples: int, waiting: int = 0) -> Any:
    return SimpleNamespace(
        executions=executions, samples=samples, batches={}, queue_length=waiting, in_flight=0
    )


RISE = (Event.ADMIT, Event.LOADED, Event.WARMED)
LEAVE = (Event.RETIRE, Event.DRAINED, Event.STOPPED)


def fill(shown: Shown) -> None:
    """Something of everything."""
    observer, gib = shown.metrics.observer, 2**30
    good = shown.watched(newborn(spec("m")))
    walk(good, *RISE)
    at("cuda:0", good).measured = {"cuda:0": {"weights": 5}}
    good.batcher = batcher(1, 1)
    good.lookups = Lookups(3, 1, 0.003, 0.002)
    shown.models.kept = CacheReport(1000, 100, 1, 2)
    shown.served(good, queue_s=0.001, compute_s=0.002, batch_size=2)
    shown.metrics.meter.wrote("m", 1, prompt_tokens=3, completion_tokens=2, first_s=0.02)
    old = shown.watched(newborn(spec("m"), 2, trigger=Trigger.RESTART))
    old.woken = True
    walk(old, *RISE)
    old.retire("replaced by #1")
    old.leaked = 2
    walk(old, *LEAVE)
    asleep = shown.watched(newborn(spec("sleeper"), 4))
    walk(asleep, *RISE, Event.RETIRE, Event.SLEPT)
    good.pinned = True
    bad = shown.watched(newborn(spec("bad"), 3))
    bad.fault(ConfigError("no"))
    observer.phase(good, "read", 0.1)
    observer.evicted(good, "memory")
    observer.scanned(0.1, 2)
    observer.watched("added", "m")
    observer.watch_lag("m", 1.0)
    observer.watcher(up=True)
    observer.missed()
    observer.illegal_move(good)
    shown.metrics.auth_failed("admin")
    shown.metrics.shed("queue_full")
    shown.models.of_models["m"] = [AdapterView("a", "adapters/a", "loaded")]
    shown.models.reports = [
        DeviceReport("cpu", "host", 2 * gib, gib),
        DeviceReport("host", "host memory", gib, 0),
        DeviceReport(
            "cuda:0",
            "H",
            3 * gib,
            gib,
            4 * gib,
            2 * gib,
            "GPU-1",
            0.5,
            300.0,
            40.0,
            driver="580.1",
            power_limit_w=700.0,
        ),
    ]
