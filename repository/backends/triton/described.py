"""A model's config as its Python code sees it: Triton's ModelConfig as JSON.

What its config.pbtxt said (`ModelConfig.triton`) is completed by what the server made of it, and by the
fields that such models read without asking whether they are there. Numbers of 64 bits are numbers here,
as Triton's JSON has them, where protobuf's own makes them text.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from repository.backends.base import Order
from repository.backends.triton.datatypes import datatype, word
from repository.backends.triton.errors import TritonModelException
from repository.config import TensorConfig
from repository.errors import LoadFailedError
from repository.messages import TensorSpec

# Of 64 bits in model_config.proto.
LONG = frozenset({
    "dims", "shape", "versions", "max_queue_delay_microseconds", "default_timeout_microseconds",
    "max_sequence_idle_microseconds", "priority_levels", "default_priority_level",
    "max_workspace_size_bytes",
})  # fmt: skip
# What people write there is theirs, whatever it is called.
THEIRS = frozenset({"parameters", "metric_tags", "cc_model_filenames", "input_map", "output_map"})


def described(order: Order) -> dict[str, Any]:
    """Of one instance. Fresh: it may be written to."""
    config = order.config
    said = _with_numbers(copy.deepcopy(config.triton))
    found: dict[str, Any] = {
        "name": order.model,
        "platform": "",
        "backend": "python",
        "runtime": "",
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": config.max_batch_size,
        "input": _tensors(config.inputs),
        "output": _tensors(config.outputs),
        "batch_input": [],
        "batch_output": [],
        "instance_group": [_group(order)],
        "default_model_filename": order.model_file or "model.py",
        "cc_model_filenames": {},
        "metric_tags": dict(config.metric_tags),
        "parameters": {},
        "model_warmup": [],
    }
    if config.batching is not None:
        found["dynamic_batching"] = {}
    if config.decoupled:
        found["model_transaction_policy"] = {"decoupled": True}
    found |= said
    for side, tensors in (("input", config.inputs), ("output", config.outputs)):
        found[side] = _merged(said.get(side, []), tensors)
    found["name"] = order.model
    found["max_batch_size"] = config.max_batch_size
    for key, value in config.options.get("parameters", {}).items():
        found["parameters"].setdefault(str(key), {"string_value": str(value)})
    return found


def specs(config: Mapping[str, Any], side: str) -> tuple[TensorSpec, ...]:
    """The tensors of such a config as clients see them. Raises LoadFailedError."""
    batch = (-1,) if config["max_batch_size"] > 0 else ()
    try:
        return tuple(
            TensorSpec(
                str(one["name"]),
                datatype(str(one["data_type"])),
                batch + tuple(int(size) for size in one["dims"]),
                bool(one.get("optional", False)),
            )
            for one in config[side]
        )
    except (KeyError, TypeError, ValueError, TritonModelException) as error:
        raise LoadFailedError(
            f"an {side} of the completed config cannot be used: {error}"
        ) from error


def is_decoupled(config: Mapping[str, Any]) -> bool:
    return bool(config.get("model_transaction_policy", {}).get("decoupled", False))


def arguments(order: Order, config: str) -> dict[str, str]:
    """What `initialize` is given. `config`: JSON. Every value is text."""
    kind, _, number = order.device.partition(":")
    groups = order.config.triton.get("instance_group", ())
    own = bool(groups) and all(group.get("kind") == "KIND_MODEL" for group in groups)
    return {
        "model_config": config,
        "model_instance_kind": "MODEL" if own else "GPU" if kind == "cuda" else "CPU",
        "model_instance_name": f"{order.model}_0_{order.instance}",
        "model_instance_device_id": number or "0",
        "model_repository": str(order.extra.get("folder") or order.path),
        "model_version": str(order.version),
        "model_name": order.model,
    }


def _tensors(tensors: Sequence[TensorConfig] | None) -> list[dict[str, Any]]:
    return [_tensor(tensor) for tensor in tensors or ()]


def _tensor(tensor: TensorConfig) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "data_type": word(tensor.datatype),
        "dims": list(tensor.shape),
        "optional": tensor.optional,
    }


def _merged(
    said: Sequence[dict[str, Any]], tensors: Sequence[TensorConfig] | None
) -> list[dict[str, Any]]:
    """What is served, with what else was said of it; with the clients' dims where it has a reshape."""
    by_name = {one.get("name"): one for one in said}
    found = []
    for tensor in tensors or ():
        more = by_name.get(tensor.name, {})
        found.append({**more, **_tensor(tensor)})
        if "reshape" in more and "dims" in more:
            found[-1]["dims"] = more["dims"]
    return found


def _group(order: Order) -> dict[str, Any]:
    gpu, _, number = order.device.partition(":")
    return {
        "name": f"{order.model}_0",
        "kind": "KIND_GPU" if gpu == "cuda" else "KIND_CPU",
        "count": max(1, order.config.instances),
        "gpus": [int(number or 0)] if gpu == "cuda" else [],
        "secondary_devices": [],
        "profile": [],
        "passive": False,
        "host_policy": "",
    }


def _with_numbers(value: Any, key: str = "") -> Any:
    if key in THEIRS:
        return value
    if isinstance(value, dict):
        return {k: _with_numbers(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [_with_numbers(item, key) for item in value]
    if key in LONG and isinstance(value, str) and value.lstrip("-").isdigit():
        return int(value)
    return value
