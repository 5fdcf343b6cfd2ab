"""Triton's faces beside our own: python -m bench.triton [--rounds 5] [--seconds 2]

One server, one kind of request under load at a time, in shuffled order; h2load with 16 connections on
the same cores, for HTTP/1.1 and gRPC alike. The model adds and subtracts two rows of 16 integers:

    http          ONNX, binary tensors, KServe V2 over HTTP
    grpc          the same over gRPC
    ours          in Python, as a model.py of ours (one batch at a time)
    triton        in Python, as Triton's python backend has it (each request on its own)
    ensemble      the ONNX model behind itself, as an ensemble of two steps
    sequence      the ONNX model as a sequence's, one request each (START and END)

Ratios are of rates within a round: grpc, ensemble and sequence to http, triton to ours. They say
something, rates only of this machine.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np

from bench.depot import Depot, cpu_s, serving
from bench.figures import Row, table, write
from tests.triton_models import ELEMENTS, write_simple

CONNECTIONS = 16
ADD_SUB = """
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            a = pb_utils.get_input_tensor_by_name(request, "INPUT0").as_numpy()
            b = pb_utils.get_input_tensor_by_name(request, "INPUT1").as_numpy()
            outputs = [pb_utils.Tensor("OUTPUT0", a + b), pb_utils.Tensor("OUTPUT1", a - b)]
            answers.append(pb_utils.InferenceResponse(output_tensors=outputs))
        return answers
"""
OURS = """
class Model:
    def infer(self, inputs):
        a, b = inputs["INPUT0"], inputs["INPUT1"]
        return {"OUTPUT0": a + b, "OUTPUT1": a - b}
"""
CONFIG = """
backend: "python"
max_batch_size: 8
input [ { name: "INPUT0" data_type: TYPE_INT32 dims: [ 16 ] },
        { name: "INPUT1" data_type: TYPE_INT32 dims: [ 16 ] } ]
output [ { name: "OUTPUT0" data_type: TYPE_INT32 dims: [ 16 ] },
         { name: "OUTPUT1" data_type: TYPE_INT32 dims: [ 16 ] } ]
"""
STEP = """
    {{ model_name: "simple" model_version: -1
      input_map [ {{ key: "INPUT0" value: "{0}" }}, {{ key: "INPUT1" value: "{1}" }} ]
      output_map [ {{ key: "OUTPUT0" value: "{2}" }}, {{ key: "OUTPUT1" value: "{3}" }} ] }}"""


def write_models(repo: Path) -> None:
    write_simple(repo)
    sequence = write_simple(repo, "sequence")
    with open(sequence / "config.pbtxt", "a") as file:
        file.write("\nsequence_batching { oldest { max_candidate_sequences: 64 } }\n")
    for name, source in (("ours", OURS), ("triton", ADD_SUB)):
        (repo / name / "1").mkdir(parents=True)
        (repo / name / "1" / "model.py").write_text(source)
        (repo / name / "config.pbtxt").write_text(CONFIG + "dynamic_batching {}\n")
    steps = STEP.format("INPUT0", "INPUT1", "a", "b"), STEP.format("a", "b", "OUTPUT0", "OUTPUT1")
    (repo / "ensemble" / "1").mkdir(parents=True)
    scheduled = f"ensemble_scheduling {{ step [{','.join(steps)} ] }}\n"
    text = CONFIG.replace('backend: "python"', 'platform: "ensemble"') + scheduled
    (repo / "ensemble" / "config.pbtxt").write_text(text)


class Question(NamedTuple):
    """What h2load sends, and where to."""

    url: str
    body: Path
    headers: Sequence[str]
    http1: bool


def http_question(depot: Depot, home: Path, model: str, parameters: dict[str, Any]) -> Question:
    size = 4 * ELEMENTS
    inputs = [
        {"name": name, "shape": [1, ELEMENTS], "datatype": "INT32",
         "parameters": {"binary_data_size": size}}
        for name in ("INPUT0", "INPUT1")
    ]  # fmt: skip
    asked = {"inputs": inputs, "parameters": {"binary_data_output": True, **parameters}}
    head = json.dumps(asked, separators=(",", ":")).encode()
    body = home / f"{model}.http"
    body.write_bytes(head + np.arange(2 * ELEMENTS, dtype=np.int32).tobytes())
    length = f"inference-header-content-length: {len(head)}"
    return Question(f"{depot.url}/v2/models/{model}/infer", body, [length], http1=True)


def grpc_question(port: int, home: Path) -> Question:
    from tritonclient.grpc import service_pb2 as pb

    request = pb.ModelInferRequest(model_name="simple")
    for n, name in enumerate(("INPUT0", "INPUT1")):
        request.inputs.add(name=name, datatype="INT32", shape=[1, ELEMENTS])
        values = np.arange(n * ELEMENTS, (n + 1) * ELEMENTS, dtype=np.int32)
        request.raw_input_contents.append(values.tobytes())
    message = request.SerializeToString()
    body = home / "simple.grpc"
    body.write_bytes(b"\0" + len(message).to_bytes(4, "big") + message)
    at = f"http://127.0.0.1:{port}/inference.GRPCInferenceService/ModelInfer"
    return Question(at, body, ["content-type: application/grpc", "te: trailers"], http1=False)


def verify(client: httpx.Client, model: str, question: Question, port: int) -> None:
    """A server that answers something else is not measured."""
    if question.http1:
        head, _, length = question.headers[0].partition(": ")
        got = client.post(question.url, content=question.body.read_bytes(), headers={head: length})
        assert got.status_code == 200, f"{model}: {got.text}"
        return
    import tritonclient.grpc as triton

    inputs = []
    for n, name in enumerate(("INPUT0", "INPUT1")):
        each = triton.InferInput(name, [1, ELEMENTS], "INT32")
        each.set_data_from_numpy(np.full((1, ELEMENTS), n, np.int32))
        inputs.append(each)
    with triton.InferenceServerClient(f"127.0.0.1:{port}") as asked:
        assert (asked.infer("simple", inputs).as_numpy("OUTPUT0") == 1).all()


def rate(depot: Depot, question: Question, seconds: float) -> tuple[float, float]:
    """Requests per second, and microseconds of the server's processor time for each."""
    headers = [part for header in question.headers for part in ("-H", header)]
    before = cpu_s(depot.tree())
    found = subprocess.run(
        ["h2load", *(["--h1"] if question.http1 else []), "-c", str(CONNECTIONS), "-t", "1",
         "-D", str(seconds), "-d", str(question.body), *headers, question.url],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    used = cpu_s(depot.tree()) - before
    speed = re.search(r"finished in [\d.]+\w+, ([\d.]+) req/s", found)
    good = re.search(r"status codes: (\d+) 2xx, 0 3xx, 0 4xx, 0 5xx", found)
    if speed is None or good is None:
        raise SystemExit(f"h2load ended without a good result: {found[-500:]}")
    return float(speed[1]), 1e6 * used / max(1, int(good[1]))


RATIOS = {"grpc": "http", "ensemble": "http", "sequence": "http", "triton": "ours"}


def measure(depot: Depot, client: httpx.Client, home: Path, args: Any) -> list[Row]:
    port = int(next(line for line in depot.log if "serving grpc" in line).rsplit(":", 1)[1])
    once = {"sequence_id": 7, "sequence_start": True, "sequence_end": True}
    questions = {
        "http": http_question(depot, home, "simple", {}),
        "grpc": grpc_question(port, home),
        **{name: http_question(depot, home, name, {}) for name in ("ours", "triton", "ensemble")},
        "sequence": http_question(depot, home, "sequence", once),
    }
    for name, question in questions.items():
        verify(client, name, question, port)
        rate(depot, question, 1)  # warm
    rates: dict[str, list[float]] = {name: [] for name in questions}
    used: dict[str, list[float]] = {name: [] for name in questions}
    for _ in range(args.rounds):
        for name in random.sample(list(questions), len(questions)):
            speed, cpu_us = rate(depot, questions[name], args.seconds)
            rates[name].append(speed)
            used[name].append(cpu_us)
    rows = []
    for name in questions:
        rows.append(Row(f"{name}, c={CONNECTIONS}", statistics.median(rates[name]), "req/s"))
        rows.append(Row(f"{name}, processor time", statistics.median(used[name]), "us"))
    for name, other in RATIOS.items():
        ratios = [a / b for a, b in zip(rates[name], rates[other], strict=True)]
        rows.append(Row(f"{name} to {other}", statistics.median(ratios), "x"))
        rows.append(Row(f"{name} to {other}, least", min(ratios), "x"))
        rows.append(Row(f"{name} to {other}, most", max(ratios), "x"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path("bench/out/triton.json"))
    args = parser.parse_args()
    if shutil.which("h2load") is None:
        raise SystemExit("h2load is missing; on Debian and Ubuntu: apt install nghttp2-client")
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        write_models(home / "models")
        flags = ("--settle", "0.2", "--allow-grpc", "--grpc-port", "0")
        with serving(home / "models", home / "state", *flags) as (depot, client):
            while client.get("/v2/health/ready").status_code != 200:
                time.sleep(0.05)
            rows = measure(depot, client, home, args)
    title = f"Triton's faces, median of {args.rounds} rounds of {args.seconds} s"
    print(table(title, rows))
    write(args.json, title, rows)


if __name__ == "__main__":
    main()
