"""What the frameworks and the driver say of this machine: `python -P -m repository.backends.probe WHAT`.

WHAT is "nvml", "torch" or "onnxruntime". One JSON object is the last thing on stdout; what libraries
print goes to stderr. `error` is there where even asking failed.

Rule: a process of its own, with a time limit of whoever starts it. A driver that hangs hangs this
process, and a framework that is broken breaks it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from repository.devices.inventory import Devices

Answer = dict[str, Any]
# y = x + x, FP32 [1], as the smallest ONNX file that onnxruntime takes (opset 13).
GRAPH = (
    b'\x08\x08:5\n\x0e\n\x01x\n\x01x\x12\x01y"\x03Add\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04'
    b"\n\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)
CUDA = "CUDAExecutionProvider"


def nvml() -> Answer:
    """{"driver", "cuda" (the newest that the driver knows), "boards": [{"name", "total", "mig"}],
    "devices": [{"device", "name", "total"}] as the server will call them}"""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return {"error": str(error)}
    version = pynvml.nvmlSystemGetCudaDriverVersion_v2()
    boards = []
    for index in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        mig = 0
        with suppress(pynvml.NVMLError):  # a GPU that has no such mode
            mig = pynvml.nvmlDeviceGetMigMode(handle)[0]
        total = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
        boards.append({"name": pynvml.nvmlDeviceGetName(handle), "total": total, "mig": bool(mig)})
    return {
        "driver": pynvml.nvmlSystemGetDriverVersion(),
        "cuda": f"{version // 1000}.{version % 1000 // 10}",
        "boards": boards,
        "devices": _devices(),
    }


def _devices() -> list[Answer]:
    devices = Devices()
    try:
        return [
            {"device": found.device, "name": found.name, "total": found.total}
            for found in devices.devices()
            if found.device != "cpu"
        ]
    finally:
        devices.close()


def torch() -> Answer:
    """{"version", "cuda" (null: built without), "devices": [names], "errors": {"cuda:0": why}}. Each
    device has computed something, so a GPU that this build has no code for is an error here."""
    import torch as it

    answer: Answer = {"version": str(it.__version__), "cuda": it.version.cuda, "errors": {}}
    if it.version.cuda is None:
        return answer | {"devices": []}
    names = []
    try:
        it.cuda.init()  # type: ignore[no-untyped-call]  # torch's
    except Exception as error:  # noqa: BLE001 - the answer is to say it
        answer["errors"]["cuda"] = _first_line(error)
    for index in range(it.cuda.device_count()):
        try:
            names.append(it.cuda.get_device_name(index))
            (it.ones(8, device=f"cuda:{index}") * 2).sum().item()
        except Exception as error:  # noqa: BLE001 - as above
            answer["errors"][f"cuda:{index}"] = _first_line(error)
    return answer | {"devices": names}


def onnxruntime() -> Answer:
    """{"version", "available": [...], "used": [...] by a session that asked for CUDA before the CPU}"""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime as it

    available = list(it.get_available_providers())
    answer: Answer = {"version": str(it.__version__), "available": available}
    if CUDA in available:
        with suppress(Exception):  # as a model's load does; what is missing shows below
            it.preload_dlls()
    wanted = [name for name in (CUDA, "CPUExecutionProvider") if name in available]
    session = it.InferenceSession(GRAPH, providers=wanted)
    return answer | {"used": list(session.get_providers())}


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


KNOWN: dict[str, Callable[[], Answer]] = {"nvml": nvml, "torch": torch, "onnxruntime": onnxruntime}


def main(what: str) -> None:
    out = os.dup(1)
    os.dup2(2, 1)
    try:
        answer = KNOWN[what]()
    except Exception as error:  # noqa: BLE001 - the answer is to say it
        answer = {"error": f"{type(error).__name__}: {_first_line(error)}"}
    with open(out, "w") as file:
        json.dump(answer, file)


if __name__ == "__main__":
    main(sys.argv[1])
