"""Large bodies into a server: how many bytes a second, and what keeping freed memory is worth.

    python -m bench.bodies [--rounds 5] [--seconds 1.5] [--json bench/out/bodies.json]

Needs the development environment. Four connections send the same request over and over to a model that
answers with one number, so that only the way in counts. The servers take turns in every round; ratios
are of the same round. "Fresh memory" is the server without its mallopt calls (server/run.py): what it
frees goes back to the kernel, and the next body faults it in again, page by page.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import onnx
from onnx import helper

from bench.depot import Depot, cpu_s, serving
from bench.figures import Row, table, write
from tests import models

CLIENTS = 4
FRESH = """
import server.run
from server.cli import main
server.run._keep_freed_memory = lambda: None
main()
"""
SERVERS: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "protocol path": ((sys.executable, "-m", "server"), ()),
    "ASGI": ((sys.executable, "-m", "server"), ("--no-fast-path",)),
    "ASGI, fresh memory": ((sys.executable, "-c", FRESH), ("--no-fast-path",)),
}
SIZES = {"600 KB": 150_000, "6 MB": 1_500_000}


def request_of(elements: int) -> bytes:
    asked = {
        "inputs": [
            {
                "name": "x",
                "datatype": "FP32",
                "shape": [1, elements],
                "parameters": {"binary_data_size": 4 * elements},
            }
        ]
    }
    header = json.dumps(asked).encode()
    head = (
        f"POST /v2/models/mean{elements}/infer HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        f"Inference-Header-Content-Length: {len(header)}\r\n"
        f"Content-Length: {len(header) + 4 * elements}\r\n\r\n"
    )
    return head.encode() + header + bytes(4 * elements)


def add_model(repo: Path, elements: int) -> None:
    node = helper.make_node("ReduceMean", ["x"], ["y"], axes=[1], keepdims=1)
    path = repo / f"mean{elements}" / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    shapes = ("x", "FP32", (-1, elements)), ("y", "FP32", (-1, 1))
    onnx.save(models.onnx_model([node], [shapes[0]], [shapes[1]]), path)


def send(url: str, request: bytes, until: float, counts: list[int]) -> None:
    address = urlsplit(url)
    sent = 0
    with socket.create_connection((address.hostname or "", address.port or 0)) as sock:
        while time.perf_counter() < until:
            sock.sendall(request)
            answer = sock.recv(65536)
            while not answer.endswith(b"}"):  # the end of a short JSON answer
                answer += sock.recv(65536)
            if not answer.startswith(b"HTTP/1.1 200 "):
                print(f"not an answer: {answer[:300]!r}", file=sys.stderr)
                return
            sent += 1
    counts.append(sent)


def rate(depot: Depot, elements: int, seconds: float) -> tuple[float, float]:
    """GB/s, and milliseconds of the server's processor time per request."""
    request, counts = request_of(elements), list[int]()
    began, cpu = time.perf_counter(), cpu_s(depot.tree())
    clients = [
        threading.Thread(target=send, args=(depot.url, request, began + seconds, counts))
        for _ in range(CLIENTS)
    ]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    took, used = time.perf_counter() - began, cpu_s(depot.tree()) - cpu
    if len(counts) < CLIENTS:
        raise SystemExit("a client has failed")
    return sum(counts) * 4 * elements / took / 1e9, 1000 * used / max(1, sum(counts))


def wait_for(client: httpx.Client) -> None:
    while client.get("/v2/health/ready").status_code != 200:
        time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--json", type=Path, default=Path("bench/out/bodies.json"))
    args = parser.parse_args()
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        repo = Path(folder) / "models"
        for elements in SIZES.values():
            add_model(repo, elements)
        depots = {}
        for i, (name, (program, flags)) in enumerate(SERVERS.items()):
            started = serving(repo, Path(folder) / f"state{i}", *flags, program=program)
            depots[name], client = stack.enter_context(started)
            wait_for(client)
        for turn in range(args.rounds + 1):
            for size, elements in SIZES.items():
                for name, depot in depots.items():
                    figures = rate(depot, elements, args.seconds)
                    if turn:  # the first round warms up
                        found.setdefault((size, name), []).append(figures)
    rows = []
    for (size, name), mine in found.items():
        limit = found[size, "ASGI, fresh memory"]
        ratios = [one[0] / its[0] for one, its in zip(mine, limit, strict=True)]
        rows.append(Row(f"{size}, {name}", statistics.median(one[0] for one in mine), "GB/s"))
        rows.append(Row("  to fresh memory", statistics.median(ratios), "x"))
        rows.append(Row("  processor", statistics.median(one[1] for one in mine), "ms/request"))
    print(table("bodies into a model that answers with one number", rows))
    write(args.json, "large bodies", rows)


if __name__ == "__main__":
    main()
