"""A model's configuration as Triton shows it: ModelConfig in protobuf's JSON, with nothing left unsaid.

What its config.pbtxt says (or the request that stands in its place) is completed as Triton completes it,
from what the model turned out to be; of a model without one the same is said from our own config.
Defaults of numbers, texts and lists are written out, and 64-bit numbers are numbers.

protobuf's classes take a while to import (`message` does it ahead), so it is not done at the start.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from repository.config import (
    Batching,
    Control,
    ModelConfig,
    Sequences,
    State,
    TensorConfig,
)
from repository.errors import ModelNotReadyError
from repository.lifecycle.generation import Generation
from repository.messages import Loaded, TensorSpec
from repository.plain import plain
from repository.repository import Repository
from server.codecs.v2_paths import Route

# Ours -> what Triton calls it: platform, backend.
NAMES = {
    "onnx": ("onnxruntime_onnx", "onnxruntime"),
    "torchscript": ("pytorch_libtorch", "pytorch"),
    "torch_export": ("torch_aoti", "pytorch"),
    "python": ("", "python"),
    "triton_python": ("", "python"),
    "ensemble": ("ensemble", ""),
}
IDLE_US = 1_000_000
# In `Loaded.details`, of a model in Python: its config after it has completed it; and what it may add.
BY_MODEL = "triton_config"
OF_MODELS = ("input", "output", "dynamic_batching", "model_transaction_policy")
SCALARS = "scalars"  # in `Loaded.details`: see `backends.reshaped`


def config_of(models: Repository, route: Route) -> dict[str, Any]:
    """Raises what `lease` raises, and ModelNotReadyError for one that has only just begun."""
    gen = models.lease(*route).generation
    if gen.loaded is None:
        raise ModelNotReadyError(f"model '{gen.spec.model}' has not said yet what it takes")
    return whole_config(gen, gen.loaded)


def whole_config(gen: Generation, loaded: Loaded) -> dict[str, Any]:
    from google.protobuf import json_format

    said = dict(gen.spec.config.triton) or _from_ours(gen.spec.config)
    for key, value in loaded.details.get(BY_MODEL, {}).items():
        if key in OF_MODELS and not said.get(key):
            said[key] = value
    completed = {**said, **_completed(gen, loaded, said)}
    found: Any = json_format.ParseDict(completed, message(), ignore_unknown_fields=True)
    return plain(found, whole=True)


def message() -> Any:
    """An empty ModelConfig."""
    from tritonclient.grpc import model_config_pb2

    return model_config_pb2.ModelConfig()


# what Triton adds ---------------------------------------------------------------------------------


def _completed(gen: Generation, loaded: Loaded, said: Mapping[str, Any]) -> dict[str, Any]:
    spec = gen.spec
    platform, backend = NAMES.get(spec.backend, (loaded.platform, spec.backend))
    optimization = said.get("optimization", {})
    more: dict[str, Any] = {
        "name": spec.model,
        "platform": platform,
        "backend": backend,
        "version_policy": said.get("version_policy") or {"latest": {"num_versions": 1}},
        "max_batch_size": loaded.max_batch_size,
        **_tensors(gen, loaded, said),
        **_scheduling(loaded, said, spec.backend),
    }
    if "decoupled" in loaded.abilities:  # said by the file, or by the model itself
        more["model_transaction_policy"] = {"decoupled": True}
    if spec.backend != "ensemble":
        more["instance_group"] = _groups(gen, said)
        more["default_model_filename"] = spec.model_file
        more["optimization"] = {
            "input_pinned_memory": {"enable": True},
            "output_pinned_memory": {"enable": True},
            **optimization,
        }
    return more


def _tensors(gen: Generation, loaded: Loaded, said: Mapping[str, Any]) -> dict[str, Any]:
    """Those that the config lists, as it lists them; else those of the model."""
    found: dict[str, Any] = {}
    signature = gen.signature
    inputs = signature.inputs if signature is not None else loaded.inputs
    outputs = signature.outputs if signature is not None else loaded.outputs
    scalars = loaded.details.get(SCALARS, ())
    for key, specs in (("input", inputs), ("output", outputs)):
        if not said.get(key):
            batched = loaded.max_batch_size > 0
            found[key] = [_of_spec(s, scalars, batched=batched) for s in specs]
    return found


def _of_spec(spec: TensorSpec, scalars: Iterable[str], *, batched: bool) -> dict[str, Any]:
    made: dict[str, Any] = {
        "name": spec.name,
        "data_type": _type(spec.datatype),
        "dims": list(spec.shape[1:] if batched else spec.shape),
    }
    if spec.optional:
        made["optional"] = True
    if spec.name in scalars:
        made["reshape"] = {}
    return made


def _scheduling(loaded: Loaded, said: Mapping[str, Any], backend: str) -> dict[str, Any]:
    most = loaded.max_batch_size
    if "sequence_batching" in said:
        return {"sequence_batching": _sequences(said["sequence_batching"], most)}
    if "dynamic_batching" in said:
        given = said["dynamic_batching"]
        return {"dynamic_batching": {"preferred_batch_size": [most] if most else [], **given}}
    completed = backend == "onnx" and most > 1 and not said.get("max_batch_size")
    return {"dynamic_batching": {"preferred_batch_size": [most]}} if completed else {}


def _sequences(said: Mapping[str, Any], most: int) -> dict[str, Any]:
    made = {"max_sequence_idle_microseconds": IDLE_US, **said}
    if "oldest" in said:
        made["oldest"] = {"preferred_batch_size": [most] if most else [], **said["oldest"]}
    elif "direct" not in said:
        made["direct"] = {}
    return made


def _groups(gen: Generation, said: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Where the instances are. What the config says of them beside that stays."""
    name = gen.spec.model
    if given := said.get("instance_group"):
        return [
            {"name": f"{name}_{i}", **group, "count": group.get("count") or 1, **_kind(gen, group)}
            for i, group in enumerate(given)
        ]
    counts = Counter(gen.chosen.devices)
    return [
        {
            "name": name if i == 0 else f"{name}_{i}",
            "kind": "KIND_CPU" if device == "cpu" else "KIND_GPU",
            "count": count,
            "gpus": [] if device == "cpu" else [int(device.partition(":")[2] or 0)],
        }
        for i, (device, count) in enumerate(counts.items())
    ]


def _kind(gen: Generation, group: Mapping[str, Any]) -> dict[str, Any]:
    """Where the config leaves it to the server."""
    kind = group.get("kind", "KIND_AUTO")
    if kind not in ("KIND_AUTO", "KIND_GPU") or group.get("gpus"):
        return {"kind": "KIND_GPU" if kind == "KIND_AUTO" else kind}
    gpus = sorted({int(d.partition(":")[2] or 0) for d in gen.chosen.devices if d != "cpu"})
    return {"kind": "KIND_GPU", "gpus": gpus} if gpus else {"kind": "KIND_CPU"}


# what our own config says -------------------------------------------------------------------------


def _from_ours(config: ModelConfig) -> dict[str, Any]:
    made: dict[str, Any] = {"max_batch_size": config.max_batch_size}
    for key, tensors in (("input", config.inputs), ("output", config.outputs)):
        if tensors:
            made[key] = [_of_config(tensor, key) for tensor in tensors]
    policy = config.version_policy
    if policy.specific is not None:
        made["version_policy"] = {"specific": {"versions": list(policy.specific)}}
    elif policy.all:
        made["version_policy"] = {"all": {}}
    else:
        made["version_policy"] = {"latest": {"num_versions": policy.latest or 1}}
    made |= _scheduled(config)
    if config.decoupled:
        made["model_transaction_policy"] = {"decoupled": True}
    if config.response_cache:
        made["response_cache"] = {"enable": True}
    if config.metric_tags:
        made["metric_tags"] = dict(config.metric_tags)
    parameters = config.options.get("parameters", {})
    if isinstance(parameters, dict) and parameters:
        made["parameters"] = {k: {"string_value": str(v)} for k, v in parameters.items()}
    return made


def _scheduled(config: ModelConfig) -> dict[str, Any]:
    """One of the three at most."""
    batching = config.batching or Batching()
    if config.ensemble is not None:
        return {"ensemble_scheduling": _of_ensemble(config)}
    if config.sequences is not None:
        return {"sequence_batching": _of_sequences(config.sequences)}
    if config.max_batch_size > 0 and batching.enabled:
        return {"dynamic_batching": _of_batching(batching)}
    return {}


def _of_config(tensor: TensorConfig, key: str) -> dict[str, Any]:
    made: dict[str, Any] = {
        "name": tensor.name,
        "data_type": _type(tensor.datatype),
        "dims": list(tensor.shape),
    }
    if tensor.reshape is not None:
        made["reshape"] = {"shape": list(tensor.reshape)}
    if tensor.optional and key == "input":
        made["optional"] = True
    if tensor.labels and key == "output":
        made["label_filename"] = tensor.labels
    return made


def _of_batching(batching: Batching) -> dict[str, Any]:
    made: dict[str, Any] = {
        "max_queue_delay_microseconds": batching.max_delay_us,
        "preserve_ordering": batching.preserve_ordering,
        "priority_levels": batching.priorities,
        "default_priority_level": batching.default_priority,
        "default_queue_policy": _of_policy(batching),
        "priority_queue_policy": {
            str(level.priority): _of_policy(batching.policy(level.priority))
            for level in batching.by_priority
        },
    }
    if batching.preferred_sizes:
        made["preferred_batch_size"] = list(batching.preferred_sizes)
    return made


def _of_policy(policy: Any) -> dict[str, Any]:
    """Of a Batching, or a LevelPolicy with nothing left unsaid."""
    return {
        "timeout_action": str(policy.timeout_action).upper(),
        "default_timeout_microseconds": policy.timeout_us,
        "allow_timeout_override": policy.allow_timeout_override,
        "max_queue_size": policy.max_queue,
    }


def _of_sequences(sequences: Sequences) -> dict[str, Any]:
    order: dict[str, Any] = {"max_queue_delay_microseconds": sequences.max_delay_us}
    if sequences.strategy == "oldest":
        order["max_candidate_sequences"] = sequences.max_candidates
        order["preserve_ordering"] = sequences.preserve_ordering
        if sequences.preferred_sizes:
            order["preferred_batch_size"] = list(sequences.preferred_sizes)
    else:
        order["minimum_slot_utilization"] = sequences.min_slots_ratio
    return {
        sequences.strategy: order,
        "max_sequence_idle_microseconds": sequences.idle_us,
        "iterative_sequence": sequences.iterative,
        "control_input": [_of_control(control) for control in sequences.controls],
        "state": [_of_state(state) for state in sequences.states],
    }


def _of_control(control: Control) -> dict[str, Any]:
    kind = {"kind": f"CONTROL_SEQUENCE_{control.kind.upper()}"}
    if control.kind == "corrid":
        return {"name": control.name, "control": [{**kind, "data_type": _type(control.datatype)}]}
    as_said = bool if control.datatype == "BOOL" else int if control.datatype == "INT32" else float
    pair = [as_said(control.off), as_said(control.on)]
    key = f"{control.datatype.lower()}_false_true"
    return {"name": control.name, "control": [{**kind, key: pair}]}


def _of_state(state: State) -> dict[str, Any]:
    made: dict[str, Any] = {
        "input_name": state.input,
        "output_name": state.output,
        "data_type": _type(state.datatype),
        "dims": list(state.shape),
    }
    if state.initial or state.initial_shape is not None:
        first = {"data_file": state.initial} if state.initial else {"zero_data": True}
        dims = list(state.initial_shape or ())
        made["initial_state"] = [{"data_type": made["data_type"], "dims": dims, **first}]
    return made


def _of_ensemble(config: ModelConfig) -> dict[str, Any]:
    assert config.ensemble is not None
    steps = [
        {
            "model_name": step.model,
            "model_version": -1 if step.version is None else step.version,
            "input_map": dict(step.inputs),
            "output_map": dict(step.outputs),
        }
        for step in config.ensemble.steps
    ]
    return {"step": steps, "max_inflight_requests": config.ensemble.max_inflight}


def _type(datatype: str) -> str:
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"
