"""How much slower /health answers while models load than while nothing happens.

    python -m bench.health [--rounds 6] [--seconds 2] [--weights 1000] [--json bench/out/health.json]

Needs the development environment. Idle and loading turns follow each other, so that whatever else
the machine does meets both. Three sorts of load, each repeated for as long as its turn lasts:

    parse   an ONNX file of --weights MB, read and parsed by its worker
    busy    a python model that computes while it loads
    burst   forty tiny ONNX models, by eight callers

The client is one process that asks one thing after the other. It runs on the same cores as the
server and the loading workers: with two cores, part of the ratio is their queueing for these. How
much, is told by `bare`: a server beside it that loads nothing and knows nothing but an echo, asked
in turn with the real one.
"""

from __future__ import annotations

import argparse
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from bench.depot import Depot, beside, serving
from bench.figures import Row, quantile, table, write
from bench.loads import MODELS, add_models

PAUSE_S = 0.002  # between two questions: a probe, not a load of its own
EXPLICIT = ("--model-control-mode", "explicit", "--settle", "0")


class Probe:
    """Asks for one path again and again, without a client's own costs."""

    def __init__(self, url: str, path: str) -> None:
        host, port = urlsplit(url).netloc.rsplit(":", 1)
        self._address = host, int(port)
        self._sock = socket.socket()
        self._ask = f"GET {path} HTTP/1.1\r\nHost: bench\r\n\r\n".encode()

    def ask(self) -> float:
        began = time.perf_counter()
        self._sock.sendall(self._ask)
        answer = self._sock.recv(65536)
        while (end := answer.find(b"\r\n\r\n")) < 0:
            answer += self._more()
        length = re.search(rb"content-length: (\d+)", answer[:end], re.I)
        if not answer.startswith(b"HTTP/1.1 200") or length is None:
            raise SystemExit(answer.decode())
        while len(answer) < end + 4 + int(length[1]):
            answer += self._more()
        return time.perf_counter() - began

    def _more(self) -> bytes:
        more = self._sock.recv(65536)
        if not more:
            raise SystemExit("the server closed the connection")
        return more

    @contextmanager
    def connected(self) -> Iterator[None]:
        with socket.create_connection(self._address) as self._sock:
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.ask()  # what a connection costs is not counted
            yield


def turn(probes: Sequence[Probe], seconds: float) -> list[list[float]]:
    """Each of them in turn. What the answers took."""
    taken: list[list[float]] = [[] for _ in probes]
    with ExitStack() as stack:
        for probe in probes:
            stack.enter_context(probe.connected())
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            for probe, times in zip(probes, taken, strict=True):
                times.append(probe.ask())
                time.sleep(PAUSE_S)
    return taken


@contextmanager
def echoing() -> Iterator[str]:
    """A bare server's address."""
    command = [sys.executable, "-m", "bench.echo"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.terminate()
        process.wait()


def measure(server: Depot, bare: str, *, path: str, rounds: int, seconds: float) -> list[Row]:
    probes = [Probe(server.url, path), Probe(bare, path)]
    idle: dict[str, list[list[float]]] = {kind: [[], []] for kind in MODELS}
    loading: dict[str, list[list[float]]] = {kind: [[], []] for kind in MODELS}
    loads: dict[str, list[float]] = {kind: [] for kind in MODELS}
    turn(probes, seconds)
    for _ in range(rounds):
        for kind in MODELS:
            for times, more in zip(idle[kind], turn(probes, seconds), strict=True):
                times += more
            with beside("bench.loads", server.url, kind) as took:
                for times, more in zip(loading[kind], turn(probes, seconds), strict=True):
                    times += more
            loads[kind] += took
    rows = []
    for kind in MODELS:
        rows.append(Row(f"{kind}: one load and unload", statistics.median(loads[kind]), "s"))
        for share, aim in ((0.5, None), (0.99, 1.2)):
            ratios = []
            for at, who in enumerate((path, "bare")):
                quiet = quantile(idle[kind][at], share)
                noisy = quantile(loading[kind][at], share)
                ratios.append(noisy / quiet)
                name = f"{kind}: {who}, p{share * 100:g}"
                rows.append(Row(f"{name}, idle", 1000 * quiet, "ms"))
                rows.append(Row(f"{name}, loading", 1000 * noisy, "ms"))
                rows.append(Row(f"{name}, ratio", noisy / quiet, "x", None if at else aim))
            beyond = f"{kind}: p{share * 100:g}, ratio beyond that of bare"
            rows.append(Row(beyond, ratios[0] / ratios[1], "x"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one turn")
    parser.add_argument("--weights", type=int, default=1000, help="MB of the large ONNX file")
    parser.add_argument("--path", default="/health", help="what is asked for")
    parser.add_argument("--json", type=Path, default=Path("bench/out/health.json"))
    asked = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="modeldepot-bench-"))
    repo = home / "models"
    try:
        add_models(repo, asked.weights)
        with serving(repo, home / "state", *EXPLICIT) as (server, _), echoing() as bare:
            rows = measure(
                server, bare, path=asked.path, rounds=asked.rounds, seconds=asked.seconds
            )
    finally:
        shutil.rmtree(home, ignore_errors=True)
    title = f"{asked.path} while models load"
    print(table(title, rows))
    write(asked.json, title, rows, rounds=asked.rounds, seconds=asked.seconds)


if __name__ == "__main__":
    main()
