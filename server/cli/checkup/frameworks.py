"""GPUs as the driver tells them, and whether torch and onnxruntime can really use them.

Pure: what was found out comes in as `Probe`s (`repository.backends.probe` says what is in them).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repository.sizes import human
from server.cli.checkup.finding import Finding, fail, ok, warn
from server.cli.checkup.probing import Probe
from server.settings import Settings

CONTROL = Path("/dev/nvidiactl")  # the driver's own; there where it is loaded and given to us
GIVEN = "NVIDIA_VISIBLE_DEVICES"  # to a container, by NVIDIA's container runtime
CUDA = "CUDAExecutionProvider"
REASON = "Require "  # in what onnxruntime prints when it cannot use CUDA
SUBJECTS = ("nvml", "torch", "onnxruntime")


def frameworks(
    settings: Settings,
    probes: Mapping[str, Probe],
    environ: Mapping[str, str],
    control: Path = CONTROL,
) -> list[Finding]:
    nvml = probes["nvml"]
    expected = control.exists() or environ.get(GIVEN, "") not in ("", "void", "none")
    return [
        gpus(nvml, settings.memory_budget, environ, expected=expected),
        torch(probes["torch"], nvml),
        onnxruntime(probes["onnxruntime"], nvml),
    ]


def gpus(
    nvml: Probe, budget: Mapping[str, int], environ: Mapping[str, str], *, expected: bool
) -> Finding:
    """`expected`: something says that there should be one."""
    name = "gpu"
    devices = devices_of(nvml)
    missing = [device for device in budget if device != "cpu" and device not in devices]
    if missing:
        said = (
            f"--memory-budget names {', '.join(missing)}; NVML shows {', '.join(devices) or 'none'}"
        )
        return fail(
            name, f"{said}{_why(nvml)}", "the server will not start so: mend --memory-budget"
        )
    if nvml.error:
        if not expected:
            return ok(name, f"none (NVML: {nvml.error})")
        todo = (
            "does `nvidia-smi` answer here? A container needs --gpus all and NVIDIA's container "
            "toolkit on the host; after an update of the driver, restart the machine"
        )
        return fail(name, f"there should be one, but NVML: {nvml.error}", todo)
    boards = nvml.said["boards"]
    driver = f"driver {nvml.said['driver']}, CUDA up to {nvml.said['cuda']}"
    if not devices:
        return _hidden(name, driver, boards, environ)
    told = ", ".join(f"{d['device']} {d['name']} {human(d['total'])}" for d in nvml.said["devices"])
    return ok(name, f"{told}; {driver}")


def _hidden(
    name: str, driver: str, boards: list[dict[str, Any]], environ: Mapping[str, str]
) -> Finding:
    if not boards:
        return ok(name, f"none; {driver}")
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        said = f"{len(boards)} of them, but CUDA_VISIBLE_DEVICES='{visible}' shows none"
        return warn(name, f"{said}; {driver}", "unset it, or name indices, or UUIDs of GPUs or MIG")
    said = f"{boards[0]['name']} is in MIG mode without an instance that can be used; {driver}"
    return warn(name, said, "make one (nvidia-smi mig -cgi ... -C), or turn MIG off")


def devices_of(nvml: Probe) -> list[str]:
    return [device["device"] for device in nvml.said.get("devices", ())]


def _mend(found: Probe, package: str) -> str:
    if found.late:
        return "give it longer with --timeout; if it hangs all the same: is it the driver?"
    return f"install it again: pip install -c constraints.txt {package}"


def torch(found: Probe, nvml: Probe) -> Finding:
    name, count = "torch", len(devices_of(nvml))
    if found.error:
        return fail(name, found.error, _mend(found, name))
    said, cuda = found.said["version"], found.said["cuda"]
    if cuda is None:
        if not count:
            return ok(name, f"{said}, for the CPU")
        todo = "for models on GPUs install the CUDA build (the image's target gpu)"
        return warn(name, f"{said} is built for the CPU alone", todo)
    said = f"{said} for CUDA {cuda}"
    if not count:
        return ok(name, f"{said}, with no GPU to use")
    errors = found.said["errors"]
    if errors or len(found.said["devices"]) < count:
        why = "; ".join(f"{device}: {error}" for device, error in errors.items())
        seen = f"uses {len(found.said['devices'])} of {count} GPUs"
        return fail(name, f"{said} {seen}{': ' if why else ''}{why}", _newer(cuda, nvml))
    return ok(name, f"{said}; each of the {count} GPUs has computed something")


def _newer(cuda: str, nvml: Probe) -> str:
    """Within a major version of CUDA an older driver will do; a newer major needs a newer driver."""
    knows = str(nvml.said.get("cuda", ""))
    if _major(cuda) > _major(knows):
        return f"the driver knows CUDA up to {knows}: update it, or install torch for that CUDA"
    return "does `nvidia-smi` show them well, and is this GPU among those that the build is for?"


def _major(version: str) -> int:
    head = version.partition(".")[0]
    return int(head) if head.isdigit() else 0


def onnxruntime(found: Probe, nvml: Probe) -> Finding:
    """Available is what it was built with; used is what a session got that asked for CUDA first."""
    name = "onnxruntime"
    if found.error:
        return fail(name, found.error, _mend(found, name))
    said = found.said["version"]
    if not devices_of(nvml):
        built = "built with CUDA, with no GPU to use" if CUDA in found.said["available"] else ""
        return ok(name, f"{said}, {built or 'for the CPU'}")
    if CUDA in found.said["used"]:
        return ok(name, f"{said} with CUDA")
    if CUDA not in found.said["available"]:
        todo = "for models on GPUs install onnxruntime-gpu in its place (the image's target gpu)"
        return warn(name, f"{said} is built without CUDA", todo)
    wants = [line[line.index(REASON) :] for line in found.noise if REASON in line]
    why = f": {wants[-1].partition('. ')[0]}." if wants else ""
    todo = (
        "install CUDA libraries of that version; torch's CUDA build of constraints.txt brings them"
    )
    return fail(name, f"{said} lists CUDA, but a session falls back to the CPU{why}", todo)


def _why(nvml: Probe) -> str:
    return f" ({nvml.error})" if nvml.error else ""
