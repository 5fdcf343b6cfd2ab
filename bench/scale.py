"""Many tiny models: what scanning, loading, keeping, asking and unloading them costs.

    python -m bench.scale [--models 1,100,1000] [--quick] [--json bench/out/scale.json]

Needs the development environment. Each number of models is served by a server of its own, all of them
loaded, and unloaded again twice: what the first round leaves behind would show in the second. Requests
to one model are timed in turn against a second server with a single model, since a ratio within one
run means more than milliseconds. A thousand models take 6 GiB and three minutes; `--quick` is 1 and 50.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

from bench import depot
from bench.columns import columns
from bench.depot import Depot, serving
from bench.figures import MIB, Row, quantile, write
from repository.folder.scan import Scanner
from tests import models

COUNTS = "1,100,1000"
QUICK = "1,50"
SCANS = 9
CALLS = 200
REQUESTS = 1000  # to one model on each server, in turns
TURN = 100
IDLE_S = 10.0
FRESH_S = 1.2  # a page of /metrics may be a second old
SCRAPES = 5
CALM_S = 3.0  # after the last load, before anything is called idle
MANY = 50
TREE_GIB = 12.0  # aim for a thousand loaded models
SCAN_S = {200: 0.5, 1000: 1.0}  # aims, by number of folders
ASKED = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]}


def add_models(repo: Path, count: int) -> None:
    """Each a folder of its own with one version, y = x + a number of its own."""
    for number in range(count):
        models.add_onnx(repo / f"m{number:04}" / "1" / "model.onnx", float(number))


def scans(repo: Path, count: int) -> list[Row]:
    """One scan by somebody who knows nothing yet, and one where nothing has changed: medians."""
    cold: list[float] = []
    warm: list[float] = []
    time.sleep(0.2)  # a file that is younger than a tick of the clock is looked into once more
    for _ in range(SCANS):
        scanner = Scanner(repo, trust_code=False)
        for taken in (cold, warm):
            began = time.perf_counter()
            scanner.scan()
            taken.append(time.perf_counter() - began)
    aim = next(limit for most, limit in SCAN_S.items() if count <= most or most == max(SCAN_S))
    return [
        Row("scan, cold", statistics.median(cold), "s", aim),
        Row("scan, nothing new", statistics.median(warm), "s", aim),
    ]


# what it takes -----------------------------------------------------------------------------------


def memory(server: Depot, workers: list[int], count: int) -> list[Row]:
    shares = [depot.pss(pid) / MIB for pid in workers]
    own = [depot.private(pid) / MIB for pid in workers]
    tree = sum(depot.pss(pid) for pid in server.tree()) / MIB
    aim = 12 if count >= MANY else None  # few bear the share of what all have in common
    return [
        Row("worker PSS, median", statistics.median(shares), "MiB", aim),
        Row("worker PSS, largest", max(shares), "MiB", aim),
        Row("worker private memory, median", statistics.median(own), "MiB"),
        Row("whole tree, PSS", tree, "MiB", 1024 * TREE_GIB if count >= 1000 else None),
        Row("front, RSS", depot.rss(server.pid) / MIB, "MiB"),
    ]


def idle(server: Depot, seconds: float) -> list[Row]:
    """Per cent of a core, and wakeups a second."""
    groups = {"front": [server.pid], "others": [p for p in server.tree() if p != server.pid]}
    began = time.perf_counter()
    before = {k: (depot.cpu_s(pids), depot.wakeups(pids)) for k, pids in groups.items()}
    time.sleep(seconds)
    took = time.perf_counter() - began
    cpu, woken = {}, {}
    for name, pids in groups.items():
        cpu[name] = 100 * (depot.cpu_s(pids) - before[name][0]) / took
        woken[name] = (depot.wakeups(pids) - before[name][1]) / took
    return [
        Row("idle CPU, whole tree", sum(cpu.values()), "%", 1),
        Row("idle CPU, front alone", cpu["front"], "%"),
        Row("idle wakeups of the front", woken["front"], "/s"),
        Row("idle wakeups of all others", woken["others"], "/s"),
    ]


def left(server: Depot, client: httpx.Client, workers: list[int]) -> list[Row]:
    """What unload-all has left."""
    time.sleep(FRESH_S)
    metrics = client.get("/metrics").text.splitlines()
    held = [line for line in metrics if line.startswith("modeldepot_device_memory_reserved_bytes")]
    found = {
        "processes": sum(psutil.pid_exists(pid) for pid in workers) + len(server.workers()),
        "segments": len(depot.segments()),
        "snapshots": len(depot.files_in(server.state_dir)),
        "reserved bytes": sum(float(line.rsplit(" ", 1)[1]) for line in held),
    }
    return [Row(f"left after unload-all: {what}", float(n), "", 0) for what, n in found.items()]


# what it answers ---------------------------------------------------------------------------------


def timed(client: httpx.Client, path: str, **asked: Any) -> float:
    began = time.perf_counter()
    client.request("POST" if asked else "GET", path, **asked).raise_for_status()
    return time.perf_counter() - began


def pages(client: httpx.Client) -> list[Row]:
    status = [timed(client, "/v1/models/status") for _ in range(CALLS)]
    kept = [timed(client, "/metrics") for _ in range(CALLS)]
    made = []
    for _ in range(SCRAPES):
        time.sleep(FRESH_S)
        made.append(timed(client, "/metrics"))
    return [
        Row("/v1/models/status, p50", 1000 * quantile(status, 0.5), "ms", 20),
        Row("/v1/models/status, p99", 1000 * quantile(status, 0.99), "ms", 20),
        Row("/metrics, p50", 1000 * quantile(kept, 0.5), "ms"),
        Row("/metrics, made anew, median", 1000 * statistics.median(made), "ms"),
    ]


def requests(home: Path, client: httpx.Client) -> list[Row]:
    """To one of the loaded models, and to the only one of a server beside it."""
    repo = home / "lone"
    add_models(repo, 1)
    path, body = "/v2/models/m0000/infer", json.dumps(ASKED).encode()
    taken: tuple[list[float], list[float]] = [], []
    with serving(repo, home / "lone-state") as (server, lone):
        server.said(r"ready after")
        for number in range(2 * REQUESTS // TURN):
            for times, one in zip(taken, (client, lone), strict=True):
                turn = [timed(one, path, content=body) for _ in range(TURN)]
                if number >= 2:  # the first turns warm up
                    times += turn
    shutil.rmtree(repo)
    many, single = taken
    return [
        Row("request to one model, p50", 1000 * quantile(many, 0.5), "ms"),
        Row("the same / a server with one model", quantile(many, 0.5) / quantile(single, 0.5), "x"),
        Row("the same, p99", quantile(many, 0.99) / quantile(single, 0.99), "x"),
    ]


# all of it ---------------------------------------------------------------------------------------


def served(repo: Path, home: Path, count: int) -> tuple[list[Row], dict[str, Any]]:
    with serving(repo, home / f"state-{count}") as (server, client):
        up = time.perf_counter() - server.began
        server.said(r"ready after")
        all_loaded = time.perf_counter() - server.began
        time.sleep(CALM_S)
        workers = server.workers()
        loaded = client.get("/v1/models/status").json()["loaded"]
        if len(loaded) != count or len(workers) != count:
            raise SystemExit(f"{len(loaded)} models and {len(workers)} workers of {count}")
        rows = [
            Row("start to serving", up, "s"),
            Row("start to all loaded", all_loaded, "s", 15 if count <= 200 else None),
            *memory(server, workers, count),
            *idle(server, IDLE_S),
            *pages(client),
            *requests(home, client),
        ]
        files = depot.open_files(server.pid)
        began = time.perf_counter()
        freed = client.post("/v1/models/unload-all").json()
        rows.append(Row("unload-all", time.perf_counter() - began, "s"))
        rows += left(server, client, workers)
        resting = sum(depot.pss(pid) for pid in server.tree()) / MIB
        resting_files = depot.open_files(server.pid)
        again = second_round(server, client, loaded)
        code, stopped = server.stop()
    rows += [
        Row("whole tree after it, PSS", resting, "MiB"),
        Row("whole tree after a second round, PSS", again[0], "MiB"),
        Row("second round, one load by API", 1000 * again[2] / count, "ms"),
        Row("front's open files: loaded", files, ""),
        Row("front's open files: unloaded", resting_files, ""),
        Row("open files after a second round", again[1], ""),
        Row("SIGTERM to exit", stopped, "s"),
        Row("exit code", code, "", 0),
    ]
    return rows, {"freed_bytes": freed["freed_bytes"], "unloaded": freed["total_unloaded"]}


def second_round(
    server: Depot, client: httpx.Client, names: list[str]
) -> tuple[float, float, float]:
    """Everything again, by the API. MiB of the tree, open files, seconds for the loads."""
    began = time.perf_counter()
    for name in names:
        client.post("/v1/models/load", json={"model_name": name}).raise_for_status()
    took = time.perf_counter() - began
    client.post("/v1/models/unload-all").raise_for_status()
    tree = sum(depot.pss(pid) for pid in server.tree()) / MIB
    return tree, depot.open_files(server.pid), took


def numbers(text: str) -> list[int]:
    return sorted({int(part) for part in text.split(",")})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", type=numbers, help=f"how many, default {COUNTS}")
    parser.add_argument("--quick", action="store_true", help=f"the same as --models {QUICK}")
    parser.add_argument("--json", type=Path, default=Path("bench/out/scale.json"))
    asked = parser.parse_args()
    counts = asked.models or numbers(QUICK if asked.quick else COUNTS)
    found: dict[str, list[Row]] = {}
    more: dict[str, Any] = {}
    for count in counts:
        home = Path(tempfile.mkdtemp(prefix="modeldepot-bench-"))
        try:
            add_models(home / "models", count)
            rows = scans(home / "models", count)
            more_rows, more[f"with_{count}"] = served(home / "models", home, count)
        finally:
            shutil.rmtree(home, ignore_errors=True)
        found[str(count)] = rows + more_rows
    title = "tiny ONNX models, all loaded"
    print(columns(title, found))
    every = [
        Row(f"{name}: {row.what}", row.value, row.unit, row.aim)
        for name, rows in found.items()
        for row in rows
    ]
    write(asked.json, title, every, **more)


if __name__ == "__main__":
    main()
