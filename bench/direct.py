"""onnxruntime called in a loop: no server at all, so what a model can do at most on one thread.

    python -m bench.direct REPO MODEL...

Prints "ready"; then, for each line "MODEL BATCH SECONDS" that it reads, how it went, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.figures import quantile
from bench.subjects import SUBJECTS


def session_of(repo: Path, name: str) -> Any:
    """As every server in the comparison is to load it."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    path = os.fspath(repo / name / "1" / "model.onnx")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def timed(session: Any, name: str, batch: int, seconds: float) -> dict[str, float]:
    """`rows`: requests that were answered, `batch` by each call. Times in seconds."""
    feeds = {"x": np.concatenate([SUBJECTS[name].question()] * batch)}
    taken: list[float] = []
    cpu = time.process_time()
    began = now = time.perf_counter()
    while now - began < seconds:
        session.run(None, feeds)
        before, now = now, time.perf_counter()
        taken.append(now - before)
    return {
        "rows": len(taken) * batch,
        "seconds": now - began,
        "cpu_s": time.process_time() - cpu,
        "p50_s": quantile(taken, 0.5),
        "p99_s": quantile(taken, 0.99),
    }


def main() -> None:
    repo, *names = sys.argv[1:]
    sessions = {name: session_of(Path(repo), name) for name in names}
    print("ready", flush=True)
    for line in sys.stdin:
        name, batch, seconds = line.split()
        print(json.dumps(timed(sessions[name], name, int(batch), float(seconds))), flush=True)


if __name__ == "__main__":
    main()
