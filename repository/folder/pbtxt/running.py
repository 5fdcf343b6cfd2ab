"""Where a model runs and with what: `instance_group`, `model_warmup`, `parameters`, `optimization`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from repository.folder.pbtxt.page import Page
from repository.folder.pbtxt.tensors import datatype
from repository.names import shown

MOST_INSTANCES = 64
DATA = {"zero_data": "zero", "random_data": "random"}
_ARENAS = re.compile(r"(cpu|gpu):[0-9]{1,3}(;(cpu|gpu):[0-9]{1,3})*")
# `optimization.graph.level` of Triton's ONNX backend -> ours; any other is all.
LEVELS = {-1: "basic", 1: "extended", 2: "none"}
# Parameters of Triton's PyTorch backend that change how fast a model runs, and nothing else.
OF_PYTORCH = frozenset({
    "DISABLE_CUDNN", "DISABLE_OPTIMIZED_EXECUTION", "ENABLE_CACHE_CLEANING", "ENABLE_JIT_EXECUTOR",
    "ENABLE_JIT_PROFILING", "ENABLE_TENSOR_FUSER", "ENABLE_WEIGHT_SHARING", "INFERENCE_MODE",
    "INTER_OP_THREAD_COUNT", "INTRA_OP_THREAD_COUNT",
})  # fmt: skip


# instances ----------------------------------------------------------------------------------------


def read_groups(page: Page) -> None:
    """One group without `gpus` is a number and a sort of device; anything else says of each instance
    where it is to be. "cuda" in that list: on every GPU of the server."""
    groups = list(page.message.instance_group)
    if not groups:
        return
    devices = [d for i, group in enumerate(groups) for d in _devices(page, group, i)]
    if len(devices) > MOST_INSTANCES:
        page.fail(
            "instance_group",
            f"'instance_group' asks for {len(devices)} instances; at most {MOST_INSTANCES} are "
            "allowed",
        )
    kinds = set(devices)
    if len(kinds) == 1 and kinds != {"cuda"}:
        page.set("instances", len(devices), "instance_group.0.count")
        if kinds != {"auto"}:
            page.set("device", devices[0], "instance_group.0.kind")
            page.place("device", "instance_group.0.gpus")
    else:
        page.set("devices", devices, "instance_group")


def _devices(page: Page, group: Any, i: int) -> list[str]:
    at = f"instance_group.{i}"
    count, kind = group.count or 1, type(group).Kind.Name(group.kind)
    if not 0 < count <= MOST_INSTANCES:
        page.fail(
            f"{at}.count",
            f"'instance_group.count' must be 1 to {MOST_INSTANCES}, not {group.count}",
        )
    if kind in ("KIND_CPU", "KIND_MODEL") and group.gpus:
        page.fail(
            f"{at}.gpus",
            f"instance group {group.name or i} of model {page.model} has kind {kind} but specifies "
            "one or more GPUs",
            "remove 'gpus', or write kind: KIND_GPU",
        )
    if kind == "KIND_MODEL":
        page.warn(f"{at}.kind", "KIND_MODEL: the server chooses the device, as for KIND_AUTO", "")
    if group.gpus:
        if min(group.gpus) < 0:
            page.fail(f"{at}.gpus", f"'gpus' holds {min(group.gpus)}, which is no GPU")
        return [f"cuda:{gpu}" for gpu in group.gpus for _ in range(count)]
    return [{"KIND_CPU": "cpu", "KIND_GPU": "cuda"}.get(kind, "auto")] * count


# warm-up ------------------------------------------------------------------------------------------


def read_warmup(page: Page) -> None:
    requests = [_request(page, theirs, i) for i, theirs in enumerate(page.message.model_warmup)]
    if requests:
        page.set("warmup", requests, "model_warmup")


def _request(page: Page, theirs: Any, i: int) -> dict[str, Any]:
    at = f"model_warmup.{i}"
    page.place(f"warmup.{i}", at)
    ours: dict[str, Any] = {"batch_size": theirs.batch_size or 1, "count": theirs.count or 1}
    if theirs.name:
        ours["name"] = theirs.name
    ours["inputs"] = [_input(page, at, n, theirs.inputs[n]) for n in sorted(theirs.inputs)]
    if not ours["inputs"]:
        page.fail(at, f"'model_warmup' {i} needs 'inputs'")
    return ours


def _input(page: Page, at: str, name: str, theirs: Any) -> dict[str, Any]:
    said = theirs.WhichOneof("input_data_type")
    if not datatype(theirs) or said is None:
        page.fail(
            at,
            f"the warm-up input '{shown(name)}' needs a 'data_type' and one of 'zero_data', "
            "'random_data' and 'input_data_file'",
        )
    if -1 in theirs.dims:
        page.fail(at, f"the warm-up input '{shown(name)}' has a -1 in 'dims'; say its size")
    data = DATA.get(said) or theirs.input_data_file
    if said == "input_data_file" and data in DATA.values():
        data = f"./{data}"  # a file, though it is called so
    return {"name": name, "datatype": datatype(theirs), "shape": list(theirs.dims), "data": data}


# parameters ---------------------------------------------------------------------------------------


def read_options(page: Page) -> None:
    backend = page.values.get("backend", "")
    given = {key: value.string_value for key, value in sorted(page.message.parameters.items())}
    options: dict[str, Any] = {}
    if backend == "onnx":
        options = _of_onnx(page, given)
    elif backend in ("triton_python", "python"):
        options = {"parameters": given} if given else {}
        if "EXECUTION_ENV_PATH" in given:
            page.warn(
                "parameters",
                "the parameter 'EXECUTION_ENV_PATH' is not honoured: the model runs in the server's own "
                "Python, which needs what it imports",
            )
    elif backend != "ensemble":
        options = _of_pytorch(page, given)
    if page.message.default_model_filename:
        options["model_file"] = page.message.default_model_filename
        page.place("options.model_file", "default_model_filename")
    if options:
        page.set("options", options, "parameters")


def _of_pytorch(page: Page, given: dict[str, str]) -> dict[str, Any]:
    for key in sorted(given.keys() & OF_PYTORCH):
        page.warn("parameters", f"the parameter '{key}' is not honoured")
    return {key: value for key, value in given.items() if key not in OF_PYTORCH}


def _of_onnx(page: Page, given: dict[str, str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for key, value in given.items():
        if key not in OF_ONNX:
            page.warn("parameters", f"the parameter '{shown(key)}' is not honoured")
            continue
        ours, meaning = OF_ONNX[key]
        try:
            found = meaning(value)
        except ValueError:
            page.fail("parameters", f"the parameter '{key}' cannot be '{shown(value)}'")
        if found is not None:
            options[ours] = found
    level = page.message.optimization.graph.level
    if level in LEVELS:
        options["optimization"] = LEVELS[level]
    return options


def _count(text: str) -> int | None:
    """None for 0: as the server thinks best."""
    if not 0 <= (found := int(text)) < 2**40:
        raise ValueError
    return found or None


def _flag(text: str) -> bool:
    said = {"0": False, "1": True, "false": False, "true": True}.get(text.lower())
    if said is None:
        raise ValueError
    return said


def _arenas(text: str) -> str:
    if not _ARENAS.fullmatch(text):
        raise ValueError
    return text


def _mode(text: str) -> str | None:
    return "parallel" if _flag(text) else None


OF_ONNX: dict[str, tuple[str, Callable[[str], Any]]] = {
    "intra_op_thread_count": ("threads", _count),
    "inter_op_thread_count": ("inter_threads", _count),
    "execution_mode": ("execution", _mode),
    "enable_mem_arena": ("arena", _flag),
    "enable_mem_pattern": ("mem_pattern", _flag),
    "memory.enable_memory_arena_shrinkage": ("arena_shrinkage", _arenas),
    "gpu_mem_limit": ("gpu_mem_limit", _count),
}
