"""Which fields of a ModelConfig we honour. Every other one that is set becomes a warning."""

from __future__ import annotations

import re
from typing import Any

from repository.folder.pbtxt.page import Page

_NUMBER = re.compile(r"\.[0-9]+")
_GROUP = ("name", "kind", "count", "gpus")
_STATE = ("input_name", "output_name", "data_type", "dims", "initial_state")
# A field with all that is in it, or one of its own.
HONOURED = frozenset(
    {
        "name", "platform", "backend", "version_policy", "max_batch_size", "dynamic_batching",
        "default_model_filename", "parameters", "model_warmup", "metric_tags", "batch_input",
        "batch_output", "model_transaction_policy", "ensemble_scheduling.max_inflight_requests",
        "sequence_batching.direct", "sequence_batching.oldest", "sequence_batching.control_input",
        "sequence_batching.max_sequence_idle_microseconds", "sequence_batching.iterative_sequence",
        "output.name", "output.data_type", "output.dims", "output.reshape", "output.label_filename",
        "input.name", "input.data_type", "input.dims", "input.reshape", "input.optional",
        "input.format", "input.allow_ragged_batch", "optimization.graph.level", "response_cache.enable",
    }
    | {f"instance_group.{name}" for name in _GROUP}
    | {f"sequence_batching.state.{name}" for name in _STATE}
    | {f"ensemble_scheduling.step.{n}" for n in ("model_name", "model_version")}
    | {f"ensemble_scheduling.step.{n}" for n in ("input_map", "output_map")}
)  # fmt: skip
# What comes of it instead, where that is worth a word.
INSTEAD = {
    "optimization.execution_accelerators": "onnxruntime runs on CUDA and the CPU here",
    "optimization.input_pinned_memory": "the server manages its own buffers",
    "optimization.output_pinned_memory": "the server manages its own buffers",
    "instance_group.rate_limiter": "memory is planned, execution is not limited",
    "instance_group.passive": "the instance takes requests like the others",
    "cc_model_filenames": "one file serves all GPUs: 'default_model_filename'",
    "model_repository_agents": "files are served as they lie there",
    "model_operations": "the model fails to load if it needs these libraries",
    "model_metrics": "histograms have the server's own buckets",
    "input.is_shape_tensor": "only TensorRT has such tensors",
    "output.is_shape_tensor": "only TensorRT has such tensors",
    "sequence_batching.state.use_same_buffer_for_input_output": "states have a buffer each way",
    "sequence_batching.state.use_growable_memory": "states are as large as the model makes them",
    "ensemble_scheduling.step.model_namespace": "names of models hold in the whole repository",
}


def warn_of_rest(page: Page) -> None:
    """Values that are a field's default do not count as set."""
    _walk(page, page.message, "")


def _walk(page: Page, message: Any, at: str) -> None:
    for field, value in message.ListFields():
        key = f"{at}.{field.name}" if at else field.name
        pattern = _NUMBER.sub("", key)
        if pattern in HONOURED or not _says(field, value):
            continue
        if not any(name.startswith(pattern + ".") for name in HONOURED):
            instead = INSTEAD.get(pattern)
            page.warn(key, f"'{pattern}' is not honoured{f': {instead}' if instead else ''}")
        elif field.is_repeated:
            for i, item in enumerate(value):
                _walk(page, item, f"{key}.{i}")
        else:
            _walk(page, value, key)


def _says(field: Any, value: Any) -> bool:
    """A message in which nothing is set (`response_cache { enable: false }`) asks for nothing."""
    if field.message_type is None or field.is_repeated:
        return True
    return any(_says(f, v) for f, v in value.ListFields())
