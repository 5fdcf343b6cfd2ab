"""Who is compared in `bench.compare`, and how each of them is started.

A *server* is a tree of processes that has every model; a *contender* is a line of the tables: what
is asked of which server, in which dialect. Peers get what serves them best among what their
documentation offers: Triton dynamic batching (twice as fast here as without, also on the tiny
model), MLServer no worker processes (1.7.1's do not start with uvloop 0.23), LitServe its fast queue;
each one instance a model and one thread of onnxruntime, like everybody.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import environment
from bench.depot import Depot
from bench.dialects import BASE64, V2_BINARY, V2_JSON, Dialect
from bench.programs import NotStartedError, Program, free_ports
from bench.subjects import SUBJECTS

HERE = Path(__file__).parent
PEERS = HERE / "peers"

DIRECT = "onnxruntime, no server"
BATCHES = "onnxruntime, batches of 16"
ECHO = "uvicorn, echo"
BARE = "uvicorn + onnxruntime"
ASGI = "Model Depot, ASGI path"
OURS = "Model Depot"
TRITON = "Triton, python backend"
MLSERVER = "MLServer, JSON"
LITSERVE = "LitServe, base64"
LIMITS = {"tiny": ECHO, "large": BARE, "slow": BATCHES}  # 1.00 of each model; see `limit`


@dataclass(frozen=True)
class Place:
    """Where a comparison takes place."""

    home: Path
    repo: Path  # <model>/1/model.onnx and, for ours, config.yaml
    names: tuple[str, ...]  # of the subjects


@dataclass(frozen=True)
class Server:
    url: str
    tree: Callable[[], list[int]]
    direct: Program | None = None  # no server: `bench.direct`, which is asked by its own words


@dataclass(frozen=True)
class Contender:
    name: str
    server: str
    dialect: Dialect
    paths: Mapping[
        str, str
    ]  # by subject; who has none for it takes no part. Without a server: batch
    least: int = 1  # connections with which it takes part; 0: told once, beside those that have any
    most: int = 1 << 16
    peer: bool = False


def _paths(pattern: str, *names: str) -> dict[str, str]:
    return {name: pattern.format(name) for name in names or SUBJECTS}


V2 = "/v2/models/{}/infer"
CONTENDERS = (
    Contender(DIRECT, "direct", V2_BINARY, _paths("1", "tiny", "large"), 0, 0),
    Contender(DIRECT, "direct", V2_BINARY, _paths("1", "slow"), 1, 1),
    Contender(BATCHES, "direct", V2_BINARY, _paths("16", "slow"), 2),
    Contender(ECHO, "echo", V2_BINARY, _paths("/{}", "tiny", "large")),
    Contender(BARE, "bare", V2_BINARY, _paths("/{}")),
    Contender(f"{BARE}, batcher", "bare", V2_BINARY, _paths("/{}/batched", "slow")),
    Contender(ASGI, "asgi", V2_BINARY, _paths(V2)),
    Contender(OURS, "depot", V2_BINARY, _paths(V2)),
    Contender(
        f"{OURS}, not batched", "depot", V2_BINARY, {"tiny": V2.format("tiny_alone")}, most=16
    ),
    Contender(f"{OURS}, JSON", "depot", V2_JSON, _paths(V2, "tiny"), most=16),
    Contender(TRITON, "triton", V2_BINARY, _paths(V2), peer=True),
    Contender(MLSERVER, "mlserver", V2_JSON, _paths(V2), peer=True),
    Contender(LITSERVE, "litserve", BASE64, _paths("/{}"), peer=True),
)


def add_models(repo: Path, names: Sequence[str]) -> None:
    for name in names:
        subject = SUBJECTS[name]
        subject.write(repo / name / "1" / "model.onnx")
        _configure(repo / name, subject.batch)
        if name == "tiny":
            alone = repo / "tiny_alone"
            shutil.copytree(repo / name, alone)
            _configure(alone, 0)


def _configure(folder: Path, batch: int) -> None:
    (folder / "config.yaml").write_text(f"max_batch_size: {batch}\noptions: {{threads: 1}}\n")


# ours and the limits ------------------------------------------------------------------------------


@contextmanager
def _depot(place: Place, name: str, *flags: str) -> Iterator[Server]:
    depot = Depot(place.repo, place.home / name, *flags)
    try:
        try:
            depot.url = depot.said(r"serving (http://\S+)")[1]
            depot.said(r"ready after")
        except SystemExit as error:  # it has ended; what it said last
            raise NotStartedError(str(error).splitlines()[-1]) from error
        yield Server(depot.url, depot.tree)
    finally:
        depot.end()


@contextmanager
def _ours(place: Place) -> Iterator[Server]:
    with _depot(place, "depot") as server:
        yield server


@contextmanager
def _asgi(place: Place) -> Iterator[Server]:
    with _depot(place, "asgi", "--no-fast-path") as server:
        yield server


@contextmanager
def running(
    place: Place, name: str, command: Sequence[str], env: Mapping[str, str] | None = None
) -> Iterator[Program]:
    program = Program(command, place.home / f"{name}.log", env)
    try:
        yield program
    finally:
        program.end()


@contextmanager
def _direct(place: Place) -> Iterator[Server]:
    command = [sys.executable, "-m", "bench.direct", str(place.repo), *place.names]
    with running(place, "direct", command) as program:
        program.line()
        yield Server("", program.tree, program)


@contextmanager
def _uvicorn(place: Place, name: str, kind: str, names: Sequence[str]) -> Iterator[Server]:
    command = [sys.executable, "-m", "bench.bare", kind, str(place.repo), *names]
    with running(place, name, command) as program:
        yield Server(f"http://127.0.0.1:{program.line()}", program.tree)


@contextmanager
def _echo(place: Place) -> Iterator[Server]:
    names = [name for name in place.names if name != "slow"]
    with _uvicorn(place, "echo", "echo", names) as server:
        yield server


@contextmanager
def _bare(place: Place) -> Iterator[Server]:
    with _uvicorn(place, "bare", "thread", place.names) as server:
        yield server


# peers --------------------------------------------------------------------------------------------


def _installed(package: str) -> Path:
    """The folder of the peers' packages, if `package` is among them."""
    for packages in sorted((environment.VENV / "lib").glob("python3*/site-packages")):
        if (packages / package).is_dir():
            return packages
    raise NotStartedError("not installed; make bench-peers")


def _triton_model(name: str, batch: int) -> str:
    """config.pbtxt. Without batching the shape has its batch axis."""
    size = SUBJECTS[name].floats
    dims = f"[ {size} ]" if batch else f"[ 1, {size} ]"
    lines = [
        f'name: "{name}"',
        'backend: "python"',
        f"max_batch_size: {batch}",
        f'input [ {{ name: "x" data_type: TYPE_FP32 dims: {dims} }} ]',
        f'output [ {{ name: "y" data_type: TYPE_FP32 dims: {dims} }} ]',
        "instance_group [ { kind: KIND_CPU count: 1 } ]",
        "dynamic_batching { }" if batch else "",
    ]
    return "\n".join(lines)


@contextmanager
def _triton(place: Place) -> Iterator[Server]:
    """The C++ server, run as it is; its python backend needs the stub of our peers' Python."""
    packages = _installed("pytriton")
    parts = packages / "pytriton" / "tritonserver"
    version = packages.parent.name.removeprefix("python")
    backend = place.home / "triton" / "backends" / "python"
    models = place.home / "triton" / "models"
    backend.mkdir(parents=True)
    stub = parts / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        raise NotStartedError(f"its python backend has no stub for Python {version}")
    for file in (*(parts / "backends" / "python").glob("*.*"), stub):
        (backend / file.name).symlink_to(file)
    for name in place.names:
        folder = models / name / "1"
        folder.mkdir(parents=True)
        (folder / "model.onnx").symlink_to(place.repo / name / "1" / "model.onnx")
        shutil.copy(PEERS / "triton_model.py", folder / "model.py")
        (models / name / "config.pbtxt").write_text(_triton_model(name, SUBJECTS[name].batch))
    (port,) = free_ports(1)
    command = [
        str(parts / "bin" / "tritonserver"),
        f"--model-repository={models}",
        f"--backend-directory={backend.parent}",
        "--http-address=127.0.0.1", f"--http-port={port}",
        "--allow-grpc=false", "--allow-metrics=false", "--log-info=false",
    ]  # fmt: skip
    env = {
        "LD_LIBRARY_PATH": str(packages / "nvidia_pytriton.libs"),
        "PATH": f"{environment.PYTHON.parent}:/usr/bin:/bin",
    }
    with running(place, "triton", command, env) as program:
        url = f"http://127.0.0.1:{port}"
        program.answers(f"{url}/v2/health/ready")
        yield Server(url, program.tree)


@contextmanager
def _mlserver(place: Place) -> Iterator[Server]:
    _installed("mlserver")
    home = place.home / "mlserver"
    http, grpc, metrics = free_ports(3)
    settings = {
        "host": "127.0.0.1", "http_port": http, "grpc_port": grpc, "metrics_port": metrics,
        "metrics_endpoint": None, "debug": False, "parallel_workers": 0, "gzip_enabled": False,
    }  # fmt: skip
    home.mkdir()
    (home / "settings.json").write_text(json.dumps(settings))
    for name in place.names:
        path = place.repo / name / "1" / "model.onnx"
        model: dict[str, Any] = {
            "name": name,
            "implementation": "mlserver_onnx.Onnx",
            "parameters": {"uri": str(path)},
        }
        if name == "slow":  # it waits for company, and must be told how long
            model |= {"max_batch_size": SUBJECTS[name].batch, "max_batch_time": 0.001}
        (home / name).mkdir()
        (home / name / "model-settings.json").write_text(json.dumps(model))
    command = [str(environment.VENV / "bin" / "mlserver"), "start", str(home)]
    with running(place, "mlserver", command, {"PYTHONPATH": str(PEERS)}) as program:
        url = f"http://127.0.0.1:{http}"
        program.answers(f"{url}/v2/health/ready")
        yield Server(url, program.tree)


@contextmanager
def _litserve(place: Place) -> Iterator[Server]:
    _installed("litserve")
    (port,) = free_ports(1)
    # Batches cost it more than they bring where the model costs nothing.
    models = [f"{name}:{SUBJECTS[name].batch if name == 'slow' else 1}" for name in place.names]
    command = [
        str(environment.PYTHON),
        str(PEERS / "litserve_onnx.py"),
        str(port),
        str(place.repo),
        *models,
    ]
    with running(place, "litserve", command) as program:
        url = f"http://127.0.0.1:{port}"
        program.answers(f"{url}/health")
        yield Server(url, program.tree)


STARTERS = {
    "direct": _direct, "echo": _echo, "bare": _bare, "asgi": _asgi, "depot": _ours,
    "triton": _triton, "mlserver": _mlserver, "litserve": _litserve,
}  # fmt: skip


def limit(subject: str, connections: int) -> str:
    """Who is 1.00. One connection makes no batches."""
    name = LIMITS[subject]
    return DIRECT if name == BATCHES and connections == 1 else name


def wanted(only: Sequence[str], peers: bool) -> list[Contender]:
    """Those whose name has one of the words, and the limits, without which nothing is a ratio."""
    words = [word.lower() for word in only]
    return [
        contender
        for contender in CONTENDERS
        if contender.name in (DIRECT, *LIMITS.values())
        or ((peers or not contender.peer) and _named(contender, words))
    ]


def _named(contender: Contender, words: Sequence[str]) -> bool:
    return not words or any(word in contender.name.lower() for word in words)
