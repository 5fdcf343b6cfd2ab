"""The limit of a load: the framework called directly, in a fork of a process that has imported it.

    python -m bench.warm

Reads lines `onnx FILE`, `python FILE` or `read FILE` from stdin and prints seconds for each: until a
fork has made a session and run it once on zeros; until a fork has made the Model of a model.py; for
reading the file alone, into memory that is there already. With the session options of the server, a
load there can only be slower.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime

CHUNK = 16 << 20
ERRORS_ONLY = 3
KINDS = {"tensor(float)": np.float32, "tensor(int64)": np.int64}


def session(path: str) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    options.inter_op_num_threads = 1
    options.log_severity_level = ERRORS_ONLY
    for pool in ("intra", "inter"):
        options.add_session_config_entry(f"session.{pool}_op.allow_spinning", "0")
    made = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    zeros = {
        node.name: np.zeros([d if isinstance(d, int) else 1 for d in node.shape], KINDS[node.type])
        for node in made.get_inputs()
    }
    made.run(None, zeros)


def module(path: str) -> None:
    runpy.run_path(path)["Model"]()


def forked(work: Callable[[str], None], path: str) -> float:
    """From before the fork until the work is done."""
    ours, theirs = os.pipe()
    began = time.perf_counter()
    child = os.fork()
    if not child:
        try:
            work(path)
            os.write(theirs, b".")
        finally:
            os._exit(0)
    os.close(theirs)
    done = os.read(ours, 1)
    took = time.perf_counter() - began
    os.close(ours)
    os.waitpid(child, 0)
    if not done:
        raise SystemExit(f"{work.__name__} failed")
    return took


def read(path: str) -> float:
    place = bytearray(b"\1" * CHUNK)  # touched: no page of it is faulted in while we count
    began = time.perf_counter()
    with Path(path).open("rb", buffering=0) as file:
        while file.readinto(place):
            pass
    return time.perf_counter() - began


def main() -> None:
    for line in sys.stdin:
        what, path = line.rstrip("\n").split(" ", 1)
        took = (
            read(path)
            if what == "read"
            else forked({"onnx": session, "python": module}[what], path)
        )
        print(took, flush=True)


if __name__ == "__main__":
    main()
