"""Asks another process, with a limit of time: a driver may hang, a framework may die at its import."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from repository import children, linux

MODULE = "repository.backends.probe"
COMMAND = (sys.executable, "-P", "-m", MODULE)
SETTINGS = {
    "ORT_DISABLE_TELEMETRY": "1",  # importing onnxruntime would start a thread that calls home
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # as NVML counts
}
KILLED_S = 2.0  # until a killed process is gone; one that is deep in a driver never is
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True, slots=True)
class Probe:
    """`said`: what it answered, empty where it did not; `error`: then why, in words; `late`: because
    the time was over. `noise`: what was printed besides."""

    said: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    noise: tuple[str, ...] = ()
    late: bool = False


def probe(
    subjects: Sequence[str], within_s: float, command: Sequence[str] = COMMAND
) -> dict[str, Probe]:
    """All of them at once. Returns in time, whatever they do."""
    deadline = time.monotonic() + within_s
    running = {subject: _start([*command, subject]) for subject in subjects}
    return {subject: _end(process, deadline, within_s) for subject, process in running.items()}


def _start(command: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=children.environment(SETTINGS),
        process_group=0,
    )


def _end(process: subprocess.Popen[str], deadline: float, within_s: float) -> Probe:
    try:
        out, noise = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=KILLED_S)
        return Probe(error=f"no answer within {within_s:g} s", late=True)
    lines = tuple(_COLOURS.sub("", line).strip() for line in noise.splitlines() if line.strip())
    try:
        said = json.loads(out)
    except ValueError:
        code = process.returncode
        how = linux.how_it_ended(-code if code < 0 else code << 8)
        last = f": {lines[-1]}" if lines else ""
        return Probe(error=f"asking it ended with {how}{last}", noise=lines)
    error = said.pop("error", "")
    return Probe(said, error, lines)
