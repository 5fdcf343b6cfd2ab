"""How long a model takes to load, by size and backend, against the least that it can take.

    python -m bench.load [--sizes tiny,1MB,10MB,100MB,1GB,python] [--rounds 5] [--quick] [--json FILE]

Needs the development environment. In every round each model is, one after the other: read from the
page cache; loaded by onnxruntime itself in a fork of a warm process, with one run (`bench.warm`: the
limit); loaded by POST /v1/models/load in a server that does nothing else; and copied into the folder of
a second server, which finds it, until its first answer (less the settle time). Ratios are of the same
round. `--quick` leaves out what is larger than 10 MB. All of it needs 6 GB of memory and 4 of disk.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
from onnx import helper, numpy_helper

from bench.columns import columns
from bench.depot import PATIENCE_S, cpu_s, serving
from bench.drop import load_s
from bench.figures import Row, write
from tests import models

SIZES = {"tiny": 1_000, "1MB": 10**6, "10MB": 10**7, "100MB": 10**8, "1GB": 10**9}  # bytes
ALL = (*SIZES, "python")
QUICK = ("tiny", "1MB", "10MB", "python")
TINY_MS = 30  # aim for a load alone
DROP_MS = 100  # aim for a drop, beyond the settle time
SETTLE_S = 0.2
LOOK_S = 0.002
BURST = 40  # loads that the time of the front is taken from
EXPLICIT = ("--model-control-mode", "explicit", "--settle", "0")
ASKED = {"inputs": [{"name": "x", "datatype": "INT64", "shape": [1], "data": [0]}]}
PYTHON = """
    class Model:
        def infer(self, inputs):
            return {"y": inputs["x"]}
"""
CONFIG = """
backend: python
inputs: [{name: x, datatype: INT64, shape: [-1]}]
outputs: [{name: y, datatype: INT64, shape: [-1]}]
"""


def add_model(repo: Path, size: str) -> None:
    if size == "python":
        models.python_model(repo / size, PYTHON)
        (repo / size / "config.yaml").write_text(CONFIG)
        return
    rows = SIZES[size] // 16
    weights = np.random.default_rng(0).standard_normal((rows, 4), np.float32)
    node = helper.make_node("Gather", ["w", "x"], ["y"])  # nothing to compute: only to load
    weight = numpy_helper.from_array(weights, "w")
    made = models.onnx_model([node], [("x", "INT64", (-1,))], [("y", "FP32", (-1, 4))], [weight])
    path = file_of(repo, size)
    path.parent.mkdir(parents=True)
    onnx.save(made, path)


def file_of(repo: Path, size: str) -> Path:
    return repo / size / ("model.py" if size == "python" else "1/model.onnx")


class Warm:
    """A process that has imported all that a load needs."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, what: str, path: Path) -> float:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{what} {path}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())


@contextmanager
def warm() -> Iterator[Warm]:
    command = [sys.executable, "-m", "bench.warm"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Warm(process)
    finally:
        process.kill()
        process.wait()


def asked_for(client: httpx.Client, name: str) -> tuple[float, float]:
    """Seconds from the order to its answer, and of these as the server tells it of itself."""
    order = {"model_name": name}
    began = time.perf_counter()
    client.post("/v1/models/load", json=order).raise_for_status()
    took = time.perf_counter() - began
    told = load_s(client, name)
    client.post("/v1/models/unload", json=order).raise_for_status()
    return took, told


def dropped(client: httpx.Client, source: Path, repo: Path) -> float:
    """Seconds from the end of the copy to the first answer, less the settle time."""
    name = source.name
    subprocess.run(["cp", "-r", str(source), str(repo / name)], check=True)
    copied = time.perf_counter()
    wait_for(client, f"/v2/models/{name}/ready", 200)
    client.post(f"/v2/models/{name}/infer", json=ASKED).raise_for_status()
    took = time.perf_counter() - copied - SETTLE_S
    shutil.rmtree(repo / name)
    wait_for(client, f"/v1/models/{name}", 404)
    return took


def wait_for(client: httpx.Client, path: str, status: int) -> None:
    until = time.perf_counter() + PATIENCE_S
    while client.get(path).status_code != status:
        if time.perf_counter() > until:
            raise SystemExit(f"{path} did not become {status} within {PATIENCE_S:g} s")
        time.sleep(LOOK_S)


Times = dict[str, list[float]]  # by what was done; seconds, one of each round


def rounds(home: Path, sizes: list[str], count: int) -> tuple[dict[str, Times], float]:
    """What everything took, by size, and the front's CPU seconds for a load and an unload."""
    source, repo = home / "models", home / "dropped"
    repo.mkdir()
    found: dict[str, Times] = {size: {} for size in sizes}
    with (
        warm() as direct,
        serving(source, home / "state", *EXPLICIT) as (asked, client),
        serving(repo, home / "more-state", "--settle", str(SETTLE_S)) as (watching, watcher),
    ):
        watching.said(r"ready after")
        for number in range(count + 1):
            for size in sizes:
                file = file_of(source, size)
                load, told = asked_for(client, size)
                took = {
                    "read": direct.ask("read", file),
                    "direct": direct.ask("python" if size == "python" else "onnx", file),
                    "load": load,
                    "told": told,
                    "drop": dropped(watcher, source / size, repo),
                }
                if number:  # the first round starts the processes that workers come from
                    for what, seconds in took.items():
                        found[size].setdefault(what, []).append(seconds)
        before = cpu_s([asked.pid])
        for _ in range(BURST):
            asked_for(client, sizes[0])
        front = (cpu_s([asked.pid]) - before) / BURST
    return found, front


def rows_of(size: str, times: Times) -> list[Row]:
    ms = {what: 1000 * statistics.median(took) for what, took in times.items()}
    over = [load / least for load, least in zip(times["load"], times["direct"], strict=True)]
    aim, drop_aim = (TINY_MS, DROP_MS) if size == "tiny" else (None, None)
    return [
        Row("the file read from the page cache", ms["read"], "ms"),
        Row("loaded directly, in a warm fork", ms["direct"], "ms"),
        Row("loaded by an order over HTTP", ms["load"], "ms", aim),
        Row("of this, from queued to ready", ms["told"], "ms"),
        Row("HTTP / directly, median", statistics.median(over), "x"),
        Row("the same, best round", min(over), "x"),
        Row("the same, worst round", max(over), "x"),
        Row("HTTP - directly", ms["load"] - ms["direct"], "ms"),
        Row("copied to first answer, less settle", ms["drop"], "ms", drop_aim),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", default=",".join(ALL))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, default=Path("bench/out/load.json"))
    asked = parser.parse_args()
    sizes = list(QUICK) if asked.quick else asked.sizes.split(",")
    if unknown := set(sizes) - set(ALL):
        parser.error(f"--sizes: {', '.join(unknown)} is none of {', '.join(ALL)}")
    home = Path(tempfile.mkdtemp(prefix="modeldepot-bench-"))
    try:
        for size in sizes:
            add_model(home / "models", size)
        times, front = rounds(home, sizes, asked.rounds)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    found = {size: rows_of(size, times[size]) for size in sizes}
    title = f"loads, medians of {asked.rounds} rounds"
    print(columns(title, found))
    spent = Row(f"front's CPU for a load and an unload of {sizes[0]}", 1000 * front, "ms")
    print(f"{spent.what}: {spent.value:.3g} {spent.unit}")
    every: list[Row] = [
        Row(f"{size}: {row.what}", row.value, row.unit, row.aim)
        for size, rows in found.items()
        for row in rows
    ]
    more: dict[str, Any] = {"seconds": times}
    write(asked.json, title, [*every, spent], **more)


if __name__ == "__main__":
    main()
