"""What `modeldepot doctor` makes of what driver, torch and onnxruntime answer, and of versions."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from server.cli.checkup import frameworks
from server.cli.checkup.finding import Finding, Level
from server.cli.checkup.probing import Probe, probe
from server.cli.checkup.versions import versions

OK, WARN, FAIL = Level.OK, Level.WARN, Level.FAIL
H200 = {"device": "cuda:0", "name": "NVIDIA H200", "total": 141 << 30}


def nvml(*devices: dict[str, Any], cuda: str = "13.0", mig: bool = False, boards: int = 1) -> Probe:
    found = [{"name": "NVIDIA H200", "total": 141 << 30, "mig": mig}] * boards
    said = {"driver": "580.95.05", "cuda": cuda, "boards": found, "devices": list(devices)}
    return Probe(said)


def torch(cuda: str | None = "13.0", devices: int = 1, error: str = "") -> Probe:
    said = {"version": "2.13.0", "cuda": cuda, "devices": ["NVIDIA H200"] * devices}
    return Probe(said | {"errors": {"cuda:0": error} if error else {}})


def ort(*used: str, built: bool = True, noise: str = "") -> Probe:
    have = ["CUDAExecutionProvider"] * built + ["CPUExecutionProvider"]
    said = {"version": "1.31.1", "available": have, "used": [*used, "CPUExecutionProvider"]}
    return Probe(said, noise=(noise,) if noise else ())


def well(one: Finding) -> bool:
    assert bool(one.todo) is (one.level is not OK)
    return one.level is OK


# GPUs ---------------------------------------------------------------------------------------------


def gpus(found: Probe, *, expected: bool = False, budget: Any = None, **environ: str) -> Finding:
    return frameworks.gpus(found, budget or {}, environ, expected=expected)


def test_a_gpu_with_its_driver() -> None:
    one = gpus(nvml(H200))
    assert well(one) and "cuda:0 NVIDIA H200 141GiB" in one.said and "580.95.05" in one.said


def test_no_gpu_is_fine_unless_there_should_be_one() -> None:
    missing = Probe(error="NVML Shared Library Not Found")
    assert well(gpus(missing))
    one = gpus(missing, expected=True)
    assert one.level is FAIL and "--gpus all" in one.todo


@pytest.mark.parametrize(
    ("given", "there", "level"),
    [("all", False, FAIL), ("void", False, OK), ("", False, OK), ("", True, FAIL)],
)
def test_what_says_that_there_should_be_a_gpu(
    tmp_path: Path, given: str, there: bool, level: Level
) -> None:
    from server.settings import Settings

    if there:
        (tmp_path / "nvidiactl").touch()
    probes = {"nvml": Probe(error="Driver Not Loaded"), "torch": torch(), "onnxruntime": ort()}
    environ = {"NVIDIA_VISIBLE_DEVICES": given}
    found = frameworks.frameworks(Settings(), probes, environ, tmp_path / "nvidiactl")
    assert [one.level for one in found] == [level, OK, OK]


def test_gpus_that_are_hidden_or_in_mig_mode_without_instances() -> None:
    one = gpus(nvml(boards=2), CUDA_VISIBLE_DEVICES="9")
    assert one.level is WARN and "CUDA_VISIBLE_DEVICES='9'" in one.said
    one = gpus(nvml(mig=True))
    assert one.level is WARN and "MIG" in one.said
    assert well(gpus(nvml(boards=0)))


def test_a_budget_for_a_gpu_that_is_not_there() -> None:
    one = gpus(nvml(H200), budget={"cpu": 1, "cuda:0": 1, "cuda:1": 1})
    assert one.level is FAIL and "cuda:1;" in one.said
    assert gpus(Probe(error="Not Found"), budget={"cuda:0": 1}).level is FAIL


# torch --------------------------------------------------------------------------------------------


def test_torch_that_can_use_the_gpu_and_torch_without_one() -> None:
    assert well(frameworks.torch(torch(), nvml(H200)))
    assert well(frameworks.torch(torch(), nvml(boards=0)))
    assert well(frameworks.torch(torch(None, 0), nvml(boards=0)))


def test_torch_built_for_the_cpu_beside_a_gpu() -> None:
    assert frameworks.torch(torch(None, 0), nvml(H200)).level is WARN


def test_torch_for_a_newer_cuda_than_the_driver_knows() -> None:
    one = frameworks.torch(torch("13.0", 0, "driver too old"), nvml(H200, cuda="12.8"))
    assert one.level is FAIL and "CUDA up to 12.8: update it" in one.todo


def test_torch_that_cannot_compute_on_a_gpu() -> None:
    one = frameworks.torch(torch(error="no kernel image"), nvml(H200))
    assert one.level is FAIL and "no kernel image" in one.said
    assert frameworks.torch(torch(devices=1), nvml(H200, H200 | {"device": "cuda:1"})).level is FAIL


def test_torch_that_cannot_be_imported() -> None:
    assert frameworks.torch(Probe(error="ImportError: libtorch"), nvml(H200)).level is FAIL


def test_a_framework_that_is_slow_is_not_called_broken() -> None:
    (late,) = probe(["torch"], 0.1, python("import time; time.sleep(600)")).values()
    for check, name in ((frameworks.torch, "torch"), (frameworks.onnxruntime, "onnxruntime")):
        one = check(late, nvml(boards=0))
        assert one.level is FAIL and "--timeout" in one.todo and "install" not in one.todo
        assert f"install -c constraints.txt {name}" in check(Probe(error="no"), nvml(H200)).todo


# onnxruntime --------------------------------------------------------------------------------------


def test_onnxruntime_that_lists_cuda_and_falls_back_is_told_with_what_it_wants() -> None:
    noise = "[W:onnxruntime] Failed to create CUDA. Require cuDNN 9.* and CUDA 13.*. Please install"
    one = frameworks.onnxruntime(ort(noise=noise), nvml(H200))
    assert one.level is FAIL and "Require cuDNN 9.* and CUDA 13.*" in one.said
    assert frameworks.onnxruntime(ort(), nvml(H200)).level is FAIL


def test_onnxruntime_with_and_without_cuda() -> None:
    assert well(frameworks.onnxruntime(ort("CUDAExecutionProvider"), nvml(H200)))
    assert frameworks.onnxruntime(ort(built=False), nvml(H200)).level is WARN
    assert well(frameworks.onnxruntime(ort(built=False), nvml(boards=0)))
    assert frameworks.onnxruntime(Probe(error="ImportError"), nvml(H200)).level is FAIL


# asking another process ---------------------------------------------------------------------------


def python(source: str) -> list[str]:
    return [sys.executable, "-c", source]


def test_a_process_that_hangs_is_killed_with_all_that_it_started() -> None:
    source = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if os.fork() == 0: time.sleep(600)\n"
        "time.sleep(600)"
    )
    began = time.monotonic()
    found = probe(["nvml", "torch"], 0.3, python(source))
    assert [one.error for one in found.values()] == ["no answer within 0.3 s"] * 2
    assert time.monotonic() - began < 20


def test_a_process_that_dies_is_told_with_its_last_words() -> None:
    source = "import os, sys; print('\\x1b[31mbad library\\x1b[m', file=sys.stderr); os.abort()"
    one = probe(["torch"], 30, python(source))["torch"]
    assert "SIGABRT" in one.error and one.error.endswith(": bad library")


def test_what_cannot_even_be_asked_is_an_error_of_the_answer() -> None:
    one = probe(["x"], 30, python('print(\'{"error": "no driver", "left": 1}\')'))["x"]
    assert (one.said, one.error) == ({"left": 1}, "no driver")


def test_this_machine_answers_for_each_framework() -> None:
    found = probe(frameworks.SUBJECTS, 60)
    assert found["torch"].said["version"] and found["onnxruntime"].said["used"]
    assert "CPUExecutionProvider" in found["onnxruntime"].said["used"]
    assert not found["nvml"].said or found["nvml"].said["driver"]


def test_the_graph_that_onnxruntime_is_asked_with_is_what_its_comment_says() -> None:
    import onnx

    from repository.backends.probe import GRAPH

    model = onnx.load_from_string(GRAPH)
    onnx.checker.check_model(model)
    (node,) = model.graph.node
    assert (node.op_type, list(node.input), list(node.output)) == ("Add", ["x", "x"], ["y"])


# versions -----------------------------------------------------------------------------------------

WANTED = [
    "torch>=2.9",
    "onnxruntime-gpu>=1.22; sys_platform == 'linux'",
    'pytest>=9; extra == "dev"',
]


def lock(tmp_path: Path, **pins: str) -> Path:
    path = tmp_path / "constraints.txt"
    path.write_text("# a comment\n" + "".join(f"{n}=={v}\n" for n, v in pins.items()))
    return path


def test_what_was_tested_together(tmp_path: Path) -> None:
    have = {"torch": "2.13.0+cpu", "onnxruntime": "1.31.1"}
    (one,) = versions(WANTED, lock(tmp_path, torch="2.13.0", other="1"), have.get)
    assert well(one) and "as in constraints.txt" in one.said


def test_other_versions_than_were_tested(tmp_path: Path) -> None:
    have = {"torch": "2.14.0", "onnxruntime-gpu": "1.31.1"}
    (one,) = versions(WANTED, lock(tmp_path, torch="2.13.0"), have.get)
    assert one.level is WARN and "torch 2.14.0 (tested 2.13.0)" in one.said


@pytest.mark.parametrize(
    ("have", "said"),
    [
        ({"torch": "2.5.0", "onnxruntime": "1.31.1"}, "torch>=2.9 (2.5.0)"),
        ({"torch": "2.13.0"}, "onnxruntime-gpu>=1.22 (missing)"),
        ({"torch": "2.13.0", "onnxruntime": "1.31", "onnxruntime-gpu": "1.31"}, "both"),
    ],
)
def test_what_is_missing_too_old_or_there_twice(
    tmp_path: Path, have: dict[str, str], said: str
) -> None:
    (one,) = versions(WANTED, lock(tmp_path), have.get)
    assert one.level is FAIL and said in one.said and one.todo
