"""Lets a server load and unload models again and again, from a process of its own.

    python -m bench.loads URL parse|busy|burst

Goes on until its standard input ends; prints how long each turn took, in seconds.
"""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests import models

BURST = 40
CALLERS = 8
MODELS = {
    "parse": ["large"],
    "busy": ["busy"],
    "burst": [f"tiny{number:02}" for number in range(BURST)],
}
BUSY = """
import time
class Model:
    def load(self, *_):
        until = time.monotonic() + 3
        while time.monotonic() < until:
            sum(range(1000))
    def infer(self, inputs):
        return inputs
"""


def add_models(repo: Path, megabytes: int) -> None:
    """All that the three sorts of load need."""
    add_large(repo / "large" / "1" / "model.onnx", megabytes)
    models.python_model(repo / "busy", BUSY)
    for number, name in enumerate(MODELS["burst"]):
        models.add_onnx(repo / name / "1" / "model.onnx", float(number))


def add_large(path: Path, megabytes: int) -> None:
    """y = x + w, with w in the file itself."""
    weights = np.random.default_rng(0).standard_normal(megabytes * 250_000, np.float32)
    part = numpy_helper.from_array(weights, "w")
    shape: list[str | int | None] = ["b", int(weights.size)]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", [x], [y], [part])
    opset = [helper.make_opsetid("", models.OPSET)]
    path.parent.mkdir(parents=True)
    onnx.save(helper.make_model(graph, ir_version=models.IR_VERSION, opset_imports=opset), path)


def load_and_unload(client: httpx.Client, callers: ThreadPoolExecutor, names: list[str]) -> None:
    def ask(verb: str, name: str) -> None:
        client.post(f"/v1/models/{verb}", json={"model_name": name}).raise_for_status()

    for verb in ("load", "unload"):
        list(callers.map(ask, [verb] * len(names), names))


def main() -> None:
    url, kind = sys.argv[1:]
    stop = threading.Event()

    def wait() -> None:
        sys.stdin.read()
        stop.set()

    threading.Thread(target=wait, daemon=True).start()
    with httpx.Client(base_url=url, timeout=300) as client, ThreadPoolExecutor(CALLERS) as callers:
        while not stop.is_set():
            began = time.perf_counter()
            load_and_unload(client, callers, MODELS[kind])
            print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main()
