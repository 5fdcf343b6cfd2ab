"""What clients notice of reloads: failed requests, and the slowest one against a quiet time.

    python -m bench.reload [--clients 8] [--large 2] [--reloads 10] [--rounds 3] [--json FILE]

Needs the development environment. Clients in processes of their own ask a tiny ONNX model without a
pause: `--clients` with 128 bytes, `--large` with 600 kB. In each round the model is reloaded again and
again, by one kind of change after the other; then it is left alone for as long. Both times are
compared within the round: server and clients share the cores, so the absolute figures say little.
About 10 s a round of ten, never more than --limit.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import httpx
import msgspec
import numpy as np

from bench.depot import Depot, serving
from bench.figures import Row, quantile, table, write
from tests import models
from tests.e2e.load import ROWS, Load

SETTLE_S = 0.2
WARM_UP_S = 2.0
LARGE_ROWS = 37_500  # 600 kB
FILE = Path("1/model.onnx")
Span = tuple[float, float]  # wall seconds


class Changes:
    """The ways in which a model is replaced. What it is replaced by is made beforehand: nobody else
    is to use the cores while clients wait."""

    def __init__(self, home: Path, client: httpx.Client, most: int) -> None:
        self._repo, self._away, self._client = home / "models", home / "away", client
        self._made = [self._away / str(number) for number in range(most)]
        for number, folder in enumerate(self._made):
            models.add_onnx(folder / "1" / "model.onnx", number + 2.0)
        self.ways: dict[str, Callable[[], None]] = {
            "in place": self._in_place,
            "by rename": self._by_rename,
            "whole folder": self._whole_folder,
            "forced by API": self._forced,
        }

    def _in_place(self) -> None:
        shutil.copyfile(self._made.pop() / FILE, self._repo / "m" / FILE)

    def _by_rename(self) -> None:
        part = self._repo / "m" / "1" / ".part"
        shutil.copyfile(self._made.pop() / FILE, part)
        part.replace(self._repo / "m" / FILE)

    def _whole_folder(self) -> None:
        (self._repo / "m").rename(self._away / "old")
        self._made.pop().rename(self._repo / "m")
        shutil.rmtree(self._away / "old")

    def _forced(self) -> None:
        order = {"model_name": "m", "force_reload": True}
        self._client.post("/v1/models/load", json=order).raise_for_status()


@contextmanager
def asking(url: str, clients: int, rows: int = ROWS) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "tests.e2e.load", url, "m", str(clients), "0", str(rows)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        if process.stdout.readline() != b"asking\n":
            raise SystemExit("the clients got no answer")
        yield process
    finally:
        process.kill()
        process.wait()


def reloads(server: Depot, changes: Changes, count: int, ends: float) -> dict[str, list[float]]:
    """Seconds from each change to the new generation serving, by way of changing."""
    took: dict[str, list[float]] = {way: [] for way in changes.ways}
    for number in range(count):
        if time.monotonic() > ends:
            break
        way, change = list(changes.ways.items())[number % len(changes.ways)]
        began = time.perf_counter()
        change()
        server.said(r"model=m .*→ready")
        took[way].append(time.perf_counter() - began)
    return took


def latencies(load: Load, span: Span) -> list[float]:
    """Of the requests that were under way at any time of the span."""
    began, ended = np.array(load.began), np.array(load.ended)
    inside = (ended >= span[0]) & (began <= span[1])
    found: list[float] = (ended - began)[inside].tolist()
    return found


def rows_of(who: str, load: Load, busy: list[Span], quiet: list[Span]) -> list[Row]:
    pairs = [(latencies(load, b), latencies(load, q)) for b, q in zip(busy, quiet, strict=True)]
    some, none = ([x for part in parts for x in part] for parts in zip(*pairs, strict=True))
    seconds = [sum(end - began for began, end in spans) for spans in (busy, quiet)]
    rows = [
        Row(f"{who}: requests", load.count, ""),
        Row(f"{who}: failed", len(load.failed), "", 0),
    ]
    for name, share, aim in (
        ("slowest", 1.0, 2),
        ("p99.9", 0.999, None),
        ("p99", 0.99, None),
        ("p50", 0.5, None),
    ):
        ratios = [quantile(b, share) / quantile(q, share) for b, q in pairs]
        rows.append(
            Row(f"{who}: {name}, reloads / quiet, median of rounds", median(ratios), "x", aim)
        )
        if share == 1.0:
            rows.append(Row(f"{who}: the same, best round", min(ratios), "x"))
            rows.append(Row(f"{who}: the same, worst round", max(ratios), "x"))
    return [
        *rows,
        Row(f"{who}: slowest during reloads", 1000 * max(some), "ms"),
        Row(f"{who}: slowest in quiet", 1000 * max(none), "ms"),
        Row(
            f"{who}: rate, reloads / quiet", len(some) / seconds[0] / (len(none) / seconds[1]), "x"
        ),
    ]


def changes_of(took: dict[str, list[float]]) -> list[Row]:
    return [
        Row("reloads", sum(map(len, took.values())), ""),
        *(
            Row(f"change to serving, {way}, p50", 1000 * quantile(times, 0.5), "ms")
            for way, times in took.items()
            if times
        ),
    ]


def answers(process: subprocess.Popen[bytes]) -> Load:
    """Lets the clients finish; what they saw."""
    out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"the clients ended with {process.returncode}")
    return msgspec.json.decode(out, type=Load)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--large", type=int, default=2, help="clients with 600 kB")
    parser.add_argument("--reloads", type=int, default=10, help="in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for all rounds")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        home = Path(made)
        models.add_onnx(home / "models" / "m" / "1" / "model.onnx")
        flags = ("--settle", str(SETTLE_S))
        busy: list[Span] = []
        quiet: list[Span] = []
        took: dict[str, list[float]] = {}
        with serving(home / "models", home / "state", *flags) as (server, client):
            server.said(r"ready after")
            changes = Changes(home, client, args.rounds * args.reloads)
            ends = time.monotonic() + args.limit
            with (
                asking(server.url, args.clients) as small,
                asking(server.url, args.large, LARGE_ROWS) as large,
            ):
                time.sleep(WARM_UP_S)
                for _ in range(args.rounds):
                    began = time.time()
                    for way, times in reloads(server, changes, args.reloads, ends).items():
                        took.setdefault(way, []).extend(times)
                    done = time.time()
                    time.sleep(done - began)
                    busy.append((began, done))
                    quiet.append((done + 0.1, time.time()))  # the last old generation still leaves
                    if time.monotonic() > ends:
                        break
                loads = {"128 B": answers(small), "600 kB": answers(large)}
    rows = [
        *(row for who, load in loads.items() for row in rows_of(who, load, busy, quiet)),
        *changes_of(took),
    ]
    clients = f"{args.clients} clients with 128 B, {args.large} with 600 kB"
    title = f"{clients}, {len(busy)} rounds of {args.reloads} reloads"
    print(table(title, rows))
    for load in loads.values():
        for text in load.failed[:5]:
            print(text, file=sys.stderr)
    if args.json:
        write(args.json, title, rows, change_to_serving_s=took)


if __name__ == "__main__":
    main()
