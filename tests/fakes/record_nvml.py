"""Writes down what NVML says on this machine, for `tests.fakes.nvml.Replayed`.

    python -m tests.fakes.record_nvml tests/data/nvml/h200.jsonl --rounds 20 --every 0.5

Asks what the product asks, through the product. Names and numbers of processes and the serial part of
UUIDs are replaced, so that a recording tells nothing of whose machine it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from repository.devices.nvml import Gpus

MAKERS = {
    "nvmlDeviceGetHandleByIndex": lambda index: f"gpu{index}",
    "nvmlDeviceGetHandleByUUID": lambda uuid: str(uuid),
    "nvmlDeviceGetMigDeviceHandleByIndex": lambda gpu, index: f"{gpu}/mig{index}",
}


class Recorder:
    """Stands before pynvml and notes every question and answer."""

    def __init__(self, nvml: Any) -> None:
        self.NVMLError = nvml.NVMLError
        self.lines: list[str] = []
        self._nvml = nvml
        self._handles: dict[str, Any] = {}  # our name -> NVML's handle

    def __getattr__(self, call: str) -> Callable[..., Any]:
        return lambda *args: self._ask(call, args)

    def _ask(self, call: str, args: tuple[Any, ...]) -> Any:
        real = [self._handles.get(arg, arg) if isinstance(arg, str) else arg for arg in args]
        try:
            answer = getattr(self._nvml, call)(*real)
        except self._nvml.NVMLError as error:
            self._note(call, args, {"error": str(error)})
            raise
        if call in MAKERS:
            name = MAKERS[call](*args)
            self._handles[name] = answer
            answer = name
        said = veiled(call, plain(answer))
        self._note(call, args, {"answer": said})
        return answer if call in MAKERS else said if call.endswith("UUID") else answer

    def _note(self, call: str, args: tuple[Any, ...], outcome: dict[str, Any]) -> None:
        told = [pid_of(arg) if call.endswith("ProcessName") else arg for arg in args]
        self.lines.append(json.dumps({"call": call, "args": told, **outcome}))


def plain(answer: Any) -> Any:
    """As JSON has it: NVML's structures become objects of their numbers."""
    if answer is None or isinstance(answer, (int, str)):
        return answer
    if isinstance(answer, (list, tuple)):
        return [plain(one) for one in answer]
    fields = [name for name, *_ in answer._fields_] if hasattr(answer, "_fields_") else vars(answer)
    return {name: plain(getattr(answer, name)) for name in fields}


def veiled(call: str, said: Any) -> Any:
    if call == "nvmlDeviceGetUUID":
        kind, _, serial = said.partition("-")
        digest = hashlib.sha256(serial.encode()).hexdigest()
        return f"{kind}-{digest[:8]}-{digest[8:12]}-{digest[12:16]}-{digest[16:20]}-{digest[20:32]}"
    if call == "nvmlSystemGetProcessName":
        return "/usr/bin/program"
    if call.endswith("RunningProcesses"):
        return [{"pid": pid_of(one["pid"]), "usedGpuMemory": one["usedGpuMemory"]} for one in said]
    return said


def pid_of(pid: int) -> int:
    """The same process has the same number in the whole recording."""
    return 1000 + int(hashlib.sha256(str(pid).encode()).hexdigest()[:6], 16) % 30_000


def main() -> None:
    import pynvml

    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("out", type=Path)
    asked.add_argument("--rounds", type=int, default=5)
    asked.add_argument("--every", type=float, default=1.0, help="seconds between two rounds")
    options = asked.parse_args()
    recorder = Recorder(pynvml)
    gpus = Gpus(recorder, os.environ.get("CUDA_VISIBLE_DEVICES"))  # type: ignore[arg-type]
    for _ in range(options.rounds):
        for index in range(gpus.count):
            gpus.read(index)
            gpus.processes(index)
        time.sleep(options.every)
    gpus.close()
    options.out.write_text("\n".join(recorder.lines) + "\n")


if __name__ == "__main__":
    main()
