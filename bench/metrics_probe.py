"""Asks an echo again and again, and prints what each answer took: PORT SECONDS.

A process of its own, for `bench.metrics`: a thread would wait for the interpreter that it measures.
"""

from __future__ import annotations

import json
import socket
import sys
import time

PAUSE_S = 0.001  # between two questions


def main(port: int, seconds: float) -> None:
    taken = []
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            began = time.perf_counter()
            sock.sendall(b"?")
            sock.recv(1)
            taken.append(time.perf_counter() - began)
            time.sleep(PAUSE_S)
    print(json.dumps(taken))


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
