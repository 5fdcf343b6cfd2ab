"""Many tiny models: what scanning, loading, keeping and unloading them costs.

    python -m bench.scale [--models 200] [--folders 1000] [--json bench/out/scale.json]

Needs the development environment. `--folders` are only scanned; `--models` are served by a real
server, all of them, and unloaded again twice: what the first round leaves behind would show in the
second.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

from bench import depot
from bench.depot import Depot, serving
from bench.figures import MIB, Row, quantile, table, write
from repository.folder.scan import Scanner
from tests import models

SCANS = 9
CALLS = 100
IDLE_S = 10.0
FRESH_S = 1.2  # a page of /metrics may be a second old
CALM_S = 3.0  # after the last load, before anything is called idle


def add_models(repo: Path, count: int) -> None:
    """Each a folder of its own with one version, y = x + a number of its own."""
    for number in range(count):
        models.add_onnx(repo / f"m{number:04}" / "1" / "model.onnx", float(number))


def scans(repo: Path) -> tuple[float, float]:
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
    return statistics.median(cold), statistics.median(warm)


def latencies(client: httpx.Client, path: str) -> list[float]:
    taken = []
    for _ in range(CALLS):
        began = time.perf_counter()
        client.get(path).raise_for_status()
        taken.append(time.perf_counter() - began)
    return taken


def idle(server: Depot, seconds: float) -> dict[str, tuple[float, float]]:
    """Per cent of a core and wakeups a second of the whole tree, the front, and the rest."""
    groups = {"front": [server.pid], "others": [p for p in server.tree() if p != server.pid]}
    began = time.perf_counter()
    before = {k: (depot.cpu_s(pids), depot.wakeups(pids)) for k, pids in groups.items()}
    time.sleep(seconds)
    took = time.perf_counter() - began
    found = {}
    for name, pids in groups.items():
        cpu, woken = before[name]
        found[name] = (
            100 * (depot.cpu_s(pids) - cpu) / took,
            (depot.wakeups(pids) - woken) / took,
        )
    return found


def left(server: Depot, client: httpx.Client, workers: list[int]) -> dict[str, Any]:
    """What unload-all has left: every number should be 0."""
    time.sleep(FRESH_S)
    metrics = client.get("/metrics").text.splitlines()
    held = [line for line in metrics if line.startswith("modeldepot_device_memory_reserved_bytes")]
    return {
        "processes": sum(psutil.pid_exists(pid) for pid in workers) + len(server.workers()),
        "segments": len(depot.segments()),
        "snapshots": len(depot.files_in(server.state_dir)),
        "reserved_bytes": sum(float(line.rsplit(" ", 1)[1]) for line in held),
    }


def served(repo: Path, home: Path, count: int) -> tuple[list[Row], dict[str, Any]]:
    with serving(repo, home / "state") as (server, client):
        up = time.perf_counter() - server.began
        server.said(r"ready after")
        all_loaded = time.perf_counter() - server.began
        time.sleep(CALM_S)
        workers = server.workers()
        loaded = client.get("/v1/models/status").json()["loaded"]
        if len(loaded) != count or len(workers) != count:
            raise SystemExit(f"{len(loaded)} models and {len(workers)} workers of {count}")
        shares = [depot.pss(pid) / MIB for pid in workers]
        own = [depot.private(pid) / MIB for pid in workers]
        tree = sum(depot.pss(pid) for pid in server.tree()) / MIB
        front = depot.rss(server.pid) / MIB
        quiet = idle(server, IDLE_S)
        status = latencies(client, "/v1/models/status")
        scrape = latencies(client, "/metrics")
        files = depot.open_files(server.pid)

        began = time.perf_counter()
        freed = client.post("/v1/models/unload-all").json()
        unloaded = time.perf_counter() - began
        left_over = left(server, client, workers)
        resting = sum(depot.pss(pid) for pid in server.tree()) / MIB
        resting_files = depot.open_files(server.pid)
        again = second_round(server, client, loaded)
        code, stopped = server.stop()
    rows = [
        Row("start to serving", up, "s"),
        Row(f"start to all {count} loaded", all_loaded, "s", 15 if count <= 200 else None),
        Row("worker PSS, median", statistics.median(shares), "MiB", 12),
        Row("worker PSS, largest", max(shares), "MiB", 12),
        Row("worker private memory, median", statistics.median(own), "MiB"),
        Row("whole tree, PSS", tree, "MiB"),
        Row("front, RSS", front, "MiB"),
        Row("idle CPU, whole tree", sum(cpu for cpu, _ in quiet.values()), "%", 1),
        Row("idle CPU, front alone", quiet["front"][0], "%"),
        Row("idle wakeups of the front", quiet["front"][1], "/s"),
        Row("idle wakeups of all others", quiet["others"][1], "/s"),
        Row("/v1/models/status, p50", 1000 * quantile(status, 0.5), "ms", 20),
        Row("/v1/models/status, p99", 1000 * quantile(status, 0.99), "ms"),
        Row("/metrics, p50", 1000 * quantile(scrape, 0.5), "ms"),
        Row("unload-all", unloaded, "s"),
        *(Row(f"left after it: {what}", float(n), "", 0) for what, n in left_over.items()),
        Row("whole tree after it, PSS", resting, "MiB"),
        Row("the same after a second round", again[0], "MiB"),
        Row("second round, load all by API", again[2], "s"),
        Row("front's open files: loaded", files, ""),
        Row("front's open files: unloaded", resting_files, ""),
        Row("the same after a second round", again[1], ""),
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", type=int, default=200, help="models that are served")
    parser.add_argument("--folders", type=int, default=1000, help="folders that are only scanned")
    parser.add_argument("--json", type=Path, default=Path("bench/out/scale.json"))
    asked = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="modeldepot-bench-"))
    try:
        rows = []
        for count in sorted({asked.models, asked.folders}):
            aim = 0.5 if count <= 200 else 1.0
            add_models(home / str(count), count)
            cold, warm = scans(home / str(count))
            rows.append(Row(f"scan of {count} folders, cold", cold, "s", aim))
            rows.append(Row(f"scan of {count} folders, nothing new", warm, "s", aim))
        more_rows, more = served(home / str(asked.models), home, asked.models)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    title = f"{asked.models} tiny ONNX models"
    print(table(title, [*rows, *more_rows]))
    write(asked.json, title, [*rows, *more_rows], **more)


if __name__ == "__main__":
    main()
