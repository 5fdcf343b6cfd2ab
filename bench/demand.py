"""What two models cost that do not fit together: clients that alternate, against one model alone.

    python -m bench.demand [--clients 8] [--seconds 20] [--min-residency 2] [--quick]

Needs the development environment. The same clients ask, without a pause, first one model only, then two
in turns of which one fits: each round has both, because server and clients share the cores and only the
ratio says something. `--quick`: one short round. Also `--rounds` and `--json FILE`.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import httpx

from bench.depot import serving
from bench.figures import Row, quantile, table, write
from tests import models

BODY = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]}
CONFIG = "memory: 62914560\n"
BUDGET = "cpu=100MiB"


class Span(NamedTuple):
    """`took_s`: of each request, sorted. `loads`: in that time."""

    took_s: list[float]
    seconds: float
    loads: int
    failed: int


async def ask(url: str, names: Sequence[str], clients: int, seconds: float) -> Span:
    took: list[float] = []
    failed = 0
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        await client.post(f"/v2/models/{names[0]}/infer", json=BODY)
        before, began = await loads(client), time.perf_counter()

        async def work(turn: int) -> None:
            nonlocal failed
            while time.perf_counter() - began < seconds:
                at = time.perf_counter()
                answer = await client.post(
                    f"/v2/models/{names[turn % len(names)]}/infer", json=BODY
                )
                took.append(time.perf_counter() - at)
                failed += answer.status_code != 200
                turn += 1

        await asyncio.gather(*[work(n) for n in range(clients)])
        spent = time.perf_counter() - began
        return Span(sorted(took), spent, await loads(client) - before, failed)


async def loads(client: httpx.AsyncClient) -> int:
    await asyncio.sleep(1.1)  # a page of metrics is kept for a second
    page = (await client.get("/metrics")).text
    found = re.findall(r'modeldepot_model_load_total\{.*trigger="demand"\} (\S+)', page)
    return int(sum(map(float, found)))


def rows_of(rounds: Sequence[tuple[Span, Span]]) -> list[Row]:
    def typical(what: str, unit: str, values: list[float]) -> Row:
        return Row(what, median(values), unit)

    both = [two for _, two in rounds]
    return [
        typical("loads per second, two models", "1/s", [s.loads / s.seconds for s in both]),
        typical("requests that failed", "", [float(a.failed + b.failed) for a, b in rounds]),
        typical(
            "requests per second, two models / one",
            "ratio",
            [(len(b.took_s) / b.seconds) / (len(a.took_s) / a.seconds) for a, b in rounds],
        ),
        *[
            typical(
                f"p{int(100 * share)} of a request, two models / one",
                "ratio",
                [quantile(b.took_s, share) / quantile(a.took_s, share) for a, b in rounds],
            )
            for share in (0.5, 0.99)
        ],
        typical("p99 of a request, two models", "s", [quantile(s.took_s, 0.99) for s in both]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--min-residency", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.quick:
        args.seconds, args.rounds, args.min_residency = 6.0, 1, 0.5
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        for name in ("a", "b"):
            models.add_onnx(home / "models" / name / "1" / "model.onnx")
            (home / "models" / name / "config.yaml").write_text(CONFIG)
        flags = (
            "--model-control-mode", "explicit", "--enable-inline-model-loading",
            "--memory-budget", BUDGET, "--min-residency", str(args.min_residency),
        )  # fmt: skip
        with serving(home / "models", home / "state", *flags) as (depot, _):
            depot.said("ready after")
            rounds = [
                (
                    asyncio.run(ask(depot.url, "a", args.clients, args.seconds)),
                    asyncio.run(ask(depot.url, "ab", args.clients, args.seconds)),
                )
                for _ in range(args.rounds)
            ]
    rows = rows_of(rounds)
    title = (
        f"two models in turns, {args.clients} clients, turns of {args.min_residency:g} s or more"
    )
    print(table(title, rows))
    if args.json:
        write(args.json, title, rows)


if __name__ == "__main__":
    main()
