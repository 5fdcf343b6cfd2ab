"""What /metrics costs: python -m bench.metrics [--models 1000] [--seconds 10] [--json PATH]

Needs the development environment. One process with models that are only shown (no workers): each serves,
batches and has been asked. Prints

    lines      of a model, ours and Triton's (nv_*)
    reading    on the loop: all of it, and the longest time that nobody else was served
    writing    in a thread: everything new, everything changed, a tenth changed, nothing changed; the
               processor's time, without the rests that it takes for others
    encoder    the same page by prometheus_client's own encoder, from samples that are there already
    p99        of a question to the same loop by another process, while a page is made each second or
               each five, against the same without
    counting   one request's numbers

The ratios are within this run.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import uvloop
from prometheus_client import exposition
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from bench.figures import Row, quantile, table, write
from server.metrics import reading
from server.metrics.http import Metrics
from server.metrics.page import Page
from server.metrics.reading import Reading
from tests.fakes.heart import newborn, spec
from tests.fakes.metrics import RISE, Shown, batcher, walk

ROUNDS = 7
TURNS = 3  # of idle and scraping, one after the other
TENTH = 10
EVERY_S = (1, 5)  # between two scrapes
LOOP = asyncio.new_event_loop()


def filled(count: int) -> Shown:
    shown = Shown()
    for number in range(count):
        gen = shown.watched(newborn(spec(f"m{number:04}"), number + 1))
        walk(gen, *RISE)
        gen.held = {"cpu": 10}
        gen.measured = {"cpu": {"weights": 1000, "workspace": number}}
        gen.batcher = batcher(number, number)
    ask(shown)
    return shown


def ask(shown: Shown, every: int = 1) -> None:
    for gens in list(shown.models.generations.values())[::every]:
        shown.served(gens[0], queue_s=0.0001, compute_s=0.002, batch_size=4)


def take(shown: Shown) -> Reading:
    metrics = shown.metrics
    work = reading.read(shown.models, metrics.observer, metrics.meter)
    return LOOP.run_until_complete(work)


class _Given(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families


def median_s(work: Callable[[], object], before: Callable[[], object] = int) -> float:
    """Of the processor's time: on a busy machine the clock tells of others."""
    taken = []
    for _ in range(ROUNDS):
        before()
        began = time.thread_time()
        work()
        taken.append(time.thread_time() - began)
    return statistics.median(taken)


def lines() -> list[Row]:
    """What one model more costs."""
    few, more = (Page().write(take(filled(n))).decode().splitlines() for n in (1, 2))
    nv = [sum(line.startswith("nv_inf") for line in page) for page in (few, more)]
    load = "nv_model_load"
    loads = [sum(line.startswith(load) for line in page) for page in (few, more)]
    triton = nv[1] - nv[0] + loads[1] - loads[0]
    return [
        Row("lines a model that batches, ours", len(more) - len(few) - triton, ""),
        Row("lines a model, Triton's", triton, ""),
    ]


def writing(shown: Shown) -> list[Row]:
    page = Page()
    found = take(shown)
    pages = [Page() for _ in range(ROUNDS)]
    fresh = median_s(lambda: pages.pop().write(found))
    text = page.write(found).decode()
    state = [found]

    def change(every: int) -> None:
        ask(shown, every)
        state[0] = take(shown)

    changed = median_s(lambda: page.write(state[0]), lambda: change(1))
    some = median_s(lambda: page.write(state[0]), lambda: change(TENTH))
    same = median_s(lambda: page.write(state[0]))
    given = _Given(text_string_to_metric_families(text))
    assert exposition.generate_latest(given) == text.encode()
    encoder = median_s(lambda: exposition.generate_latest(given))
    return [
        Row("page", len(text) / 1e6, "MB"),
        Row("writing, everything new", fresh * 1e3, "ms"),
        Row("writing, everything changed", changed * 1e3, "ms", 50),
        Row("writing, a tenth changed", some * 1e3, "ms", 50),
        Row("writing, nothing changed", same * 1e3, "ms"),
        Row("encoder of prometheus_client, alone", encoder * 1e3, "ms"),
        Row("encoder / everything changed", encoder / changed, "x"),
        Row("encoder / a tenth changed", encoder / some, "x"),
    ]


def on_the_loop(shown: Shown) -> list[Row]:
    """The longest slice is the longest that the loop was held."""
    took = median_s(lambda: take(shown), lambda: ask(shown, TENTH))

    async def held() -> float:
        longest = 0.0
        metrics = shown.metrics
        work = asyncio.ensure_future(reading.read(shown.models, metrics.observer, metrics.meter))
        while not work.done():
            began = time.perf_counter()
            await asyncio.sleep(0)
            longest = max(longest, time.perf_counter() - began)
        return longest

    longest = statistics.median(asyncio.run(held()) for _ in range(ROUNDS))
    return [
        Row("reading, on the loop", took * 1e3, "ms"),
        Row("of it, in one go at most", longest * 1e3, "ms"),
    ]


def counting(shown: Shown) -> list[Row]:
    done, n = shown.metrics.meter.done, 200_000

    def many() -> None:
        for _ in range(n):
            done(
                "m0000", 1, "success", duration_s=0.002, queue_s=0.0, input_s=0.0, compute_s=0.001,
                output_s=0.0, samples=1, batch_size=4, trace=None,
            )  # fmt: skip

    return [Row("counting one request", median_s(many) / n * 1e6, "us")]


# what others notice ------------------------------------------------------------------------------


class _Echo(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(data)  # type: ignore[attr-defined]  # it can write


async def noticed(shown: Shown, seconds: float, every: int, each_s: float) -> list[Row]:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(_Echo, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    idle: list[float] = []
    busy: list[float] = []
    for _ in range(TURNS):
        idle += await _asked(port, seconds)
        scraping = asyncio.ensure_future(_scrape(shown, every, each_s))
        busy += await _asked(port, seconds)
        scraping.cancel()
        await asyncio.wait([scraping])
    server.close()
    what = f"{'everything' if every == 1 else 'a tenth'} each {each_s:g} s"
    return [
        Row(f"p99 idle ({what})", quantile(idle, 0.99) * 1e3, "ms"),
        Row(f"p99 scraped ({what})", quantile(busy, 0.99) * 1e3, "ms"),
        Row(f"p99 ratio ({what})", quantile(busy, 0.99) / quantile(idle, 0.99), "x", 1.2),
        Row(f"p99.9 ratio ({what})", quantile(busy, 0.999) / quantile(idle, 0.999), "x"),
    ]


async def _asked(port: int, seconds: float) -> list[float]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.metrics_probe", str(port), str(seconds),
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, _ = await process.communicate()
    found: list[float] = json.loads(out)
    return found


async def _scrape(shown: Shown, every: int, each_s: float) -> None:
    metrics: Metrics = shown.metrics
    while True:
        shown.now += 10
        ask(shown, every)
        await metrics.render()
        await asyncio.sleep(each_s)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    shown = filled(args.models)
    rows = [*lines(), *on_the_loop(shown), *writing(shown), *counting(shown)]
    for every, each_s in itertools.product((TENTH, 1), EVERY_S):
        rows += uvloop.run(noticed(filled(args.models), args.seconds, every, each_s))
    title = f"/metrics with {args.models} models"
    print(table(title, rows))
    if args.json:
        write(args.json, title, rows)


if __name__ == "__main__":
    main()
