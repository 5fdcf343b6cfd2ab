"""How long large JSON takes, and how much slower /health answers meanwhile.

    python -m bench.json_bodies [--mib 64] [--seconds 10] [--program "python -m server"]

Needs the development environment. Bodies of numbers are sent one after the other by a process of its
own, to a model that gives back what it gets: as JSON with a binary answer (`read`), and in binary form
with the answer as JSON (`written`). `--program` runs another server, such as an older one:
"env -C OTHER-TREE python -m server".

What the same text costs the codec in this process is told beside it: for so long the loop would be
held if it did the work itself.
"""

from __future__ import annotations

import argparse
import http.client
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from bench.depot import PROGRAM, Depot, beside, rss, serving
from bench.figures import MIB, Row, quantile, table, write
from bench.health import EXPLICIT, PAUSE_S, Probe, turn
from repository.messages import InferResponse
from repository.tensors import Tensor
from server.codecs.v2_binary import encode
from server.codecs.v2_plan import plan_of
from tests.models import identity_onnx

PATH = "/v2/models/echo/infer"
KINDS = ("read", "written")
MIXED = {"name": "y", "parameters": {"binary_data": True}}


def values_of(mib: float) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """As many as make so much text."""
    return np.random.default_rng(0).standard_normal(int(mib * MIB / 19.4)).astype("f4")


def body_of(kind: str, mib: float) -> tuple[bytes, dict[str, str]]:
    values = values_of(mib)
    x = {"name": "x", "shape": [1, len(values)], "datatype": "FP32"}
    if kind == "read":
        data = {"inputs": [{**x, "data": values.tolist()}], "outputs": [MIXED]}
        return json.dumps(data, separators=(",", ":")).encode(), {}
    header = json.dumps({"inputs": [{**x, "parameters": {"binary_data_size": values.nbytes}}]})
    length = {"Inference-Header-Content-Length": str(len(header))}
    return header.encode() + values.tobytes(), length


def post(url: str, kind: str, mib: float) -> None:
    """Bodies until the standard input ends; then what each took."""
    body, headers = body_of(kind, mib)
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=300)
    took = []
    with tempfile.TemporaryFile("w+") as done:
        waiting = subprocess.Popen(["cat"], stdin=sys.stdin, stdout=done)
        print("ready", flush=True)
        while waiting.poll() is None or not took:
            began = time.perf_counter()
            connection.request("POST", PATH, body, headers)
            answer = connection.getresponse()
            told = answer.read()
            took.append(time.perf_counter() - began)
            if answer.status != 200:
                raise SystemExit(told[:500].decode())
    print(*took, sep="\n")


def alone(kind: str, mib: float) -> float:
    """Seconds for the codec, in this process."""
    if kind == "read":
        text = body_of(kind, mib)[0]
        began = time.perf_counter()
        plan_of(text)
        return time.perf_counter() - began
    plan = plan_of(b'{"inputs":[]}')
    response = InferResponse([Tensor.of("y", values_of(mib))])
    began = time.perf_counter()
    encode(plan, response, "echo", 1)
    return time.perf_counter() - began


def _shares(name: str, times: list[float]) -> list[Row]:
    """As if somebody had asked every PAUSE_S: who asks while the loop is held waits for the rest, but
    the probe, waiting itself, could not ask."""
    due = [taken - late * PAUSE_S for taken in times for late in range(int(taken / PAUSE_S) + 1)]
    return [
        Row(f"{name}: /health p{share * 100:g}", 1000 * quantile(due, share), "ms")
        for share in (0.5, 0.99, 1.0)
    ]


def measure(server: Depot, sizes: list[float], seconds: float) -> list[Row]:
    probe = Probe(server.url, "/health")
    (idle,) = turn([probe], seconds)
    rows = _shares("idle", idle)
    for mib in sizes:
        for kind in KINDS:
            name = f"{mib:g} MiB {kind}"
            with beside("bench.json_bodies", "--post", server.url, kind, "--mib", str(mib)) as took:
                (busy,) = turn([probe], seconds)
            rows.append(Row(f"{name}: one body", 1000 * statistics.median(took), "ms"))
            rows.append(Row(f"{name}: the codec alone", 1000 * alone(kind, mib), "ms"))
            rows += _shares(name, busy)
    rows.append(Row("memory of the server's process", rss(server.pid) / MIB, "MiB"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--mib", type=float, default=63.0, help="of JSON; 1 MiB is measured too")
    parser.add_argument("--seconds", type=float, default=10.0, help="of one turn")
    parser.add_argument("--program", default=shlex.join(PROGRAM), help="what to run")
    parser.add_argument("--json", type=Path, default=Path("bench/out/json_bodies.json"))
    parser.add_argument("--post", nargs=2, metavar=("URL", "KIND"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.post:
        post(*asked.post, asked.mib)
        return
    home = Path(tempfile.mkdtemp(prefix="modeldepot-bench-"))
    try:
        identity_onnx(home / "models" / "echo" / "1" / "model.onnx", "FP32", (1, -1))
        flags = [*EXPLICIT, "--load-model", "echo"]
        program = shlex.split(asked.program)
        with serving(home / "models", home / "state", *flags, program=program) as (server, _):
            server.said("ready after")
            rows = measure(server, [1.0, asked.mib], asked.seconds)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    title = "large JSON"
    print(table(title, rows))
    write(asked.json, title, rows, seconds=asked.seconds, program=asked.program)


if __name__ == "__main__":
    main()
