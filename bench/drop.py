"""From a folder that was just copied in to its first answer.

    python -m bench.drop [--drops 20] [--settle 1] [--watch notify|poll] [--json bench/out/drop.json]

Needs the development environment. Each drop is a `cp -r` of a tiny ONNX model into the repository of
a real server. The clock starts when `cp` has ended, and stops with the first inference that succeeds;
the settle time, which the server is told to wait, is taken off. Takes (settle + 0.2 s) a drop.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import time
from datetime import datetime
from pathlib import Path

import httpx

from bench.depot import PATIENCE_S, serving
from bench.figures import Row, quantile, table, write
from tests import models

LOOK_S = 0.002  # between two tries; also what a figure may be too large by
X = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [0, 1, 2, 3]}


def drop(client: httpx.Client, source: Path, repo: Path, name: str) -> float:
    """Seconds from the end of the copy to the first answer."""
    subprocess.run(["cp", "-r", str(source), str(repo / name)], check=True)
    copied = time.perf_counter()
    while time.perf_counter() < copied + PATIENCE_S:
        if client.post(f"/v2/models/{name}/infer", json={"inputs": [X]}).status_code == 200:
            return time.perf_counter() - copied
        time.sleep(LOOK_S)
    raise SystemExit(f"{name} was not served within {PATIENCE_S:g} s")


def load_s(client: httpx.Client, name: str) -> float:
    """From the decision to load it until it served, as the server tells it."""
    (generation,) = client.get(f"/v1/models/{name}").json()["generations"]
    at = {step["state"]: datetime.fromisoformat(step["at"]) for step in generation["story"]}
    return (at["ready"] - at["queued"]).total_seconds()


def rows_of(after_s: list[float], loads_s: list[float], watch: str) -> list[Row]:
    aim = 100 if watch == "notify" else None
    return [
        Row("cp done to first answer, less settle, p50", 1000 * quantile(after_s, 0.5), "ms", aim),
        Row("the same, p95", 1000 * quantile(after_s, 0.95), "ms"),
        Row("the same, slowest", 1000 * max(after_s), "ms", 1000),
        Row("load alone, p50", 1000 * quantile(loads_s, 0.5), "ms", 30),
        Row("load alone, p95", 1000 * quantile(loads_s, 0.95), "ms"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--drops", type=int, default=20)
    parser.add_argument("--settle", type=float, default=1.0)
    parser.add_argument("--watch", choices=("notify", "poll"), default="notify")
    parser.add_argument("--poll-secs", type=float, default=2.0, help="with --watch poll")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        home = Path(made)
        repo, source = home / "models", home / "source"
        repo.mkdir()
        models.add_onnx(source / "1" / "model.onnx")
        flags = ["--settle", args.settle, "--watch", args.watch, "--poll-secs", args.poll_secs]
        with serving(repo, home / "state", *map(str, flags)) as (server, client):
            server.said(r"ready after")
            drop(client, source, repo, "first")  # it also starts the process that workers come from
            names = [f"m{number}" for number in range(args.drops)]
            after_s = [drop(client, source, repo, name) - args.settle for name in names]
            loads_s = [load_s(client, name) for name in names]
    rows = rows_of(after_s, loads_s, args.watch)
    title = f"{args.drops} drops, settle {args.settle:g} s, --watch {args.watch}"
    print(table(title, rows))
    if args.json:
        write(args.json, title, rows, after_settle_s=after_s, load_s=loads_s)


if __name__ == "__main__":
    main()
