"""A transformers model around weights that we have read. transformers knows how a checkpoint's names
map to a model's parts and which are tied; we decide how bytes come into memory.

CPU: transformers is given the tensors, and those of the right datatype become the model's own,
without a copy. GPU: it is given stand-ins of the same shapes (memory that nobody touches), and where
each of them ends up, the tensor that is on the device already takes its place. A checkpoint that it
has to rearrange is read on the CPU and brought over whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from repository.backends.base import Order
from repository.backends.weights import described_weights, read_weights, weight_files
from repository.errors import LoadFailedError

MOST_MADE = 1 << 24  # numbers that transformers may make, for the sake of a report with names


def build(
    kind: Any, config: Any, order: Order, dtype: torch.dtype
) -> tuple[Any, dict[str, Any], int]:
    """The model on its device, what transformers reports of the load, and how many tensors there
    were. Raises what `read_weights` does, and whatever transformers does."""
    files = weight_files(order.path)
    if order.device != "cpu":
        tensors = read_weights(files, device=order.device, dtype=dtype)
        model, report = around_stand_ins(kind, config, tensors, dtype)
        if model is not None:
            return model.to(order.device), report, len(tensors)
        del tensors
    tensors = read_weights(files, private=order.private)
    count = len(tensors)
    model, report = around(kind, config, tensors, dtype)
    return model.to(order.device), report, count


def model_and_report_of(
    kind: Any, config: Any, order: Order, dtype: torch.dtype
) -> tuple[Any, dict[str, Any], int]:
    """As `build`, by the headers of the weights alone: around memory that nobody touches. Raises the
    same."""
    stand_ins = described_weights(weight_files(order.path), dtype=dtype, device="cpu")
    model, report = around(kind, config, stand_ins, dtype)
    return model, report, len(stand_ins)


def around(
    kind: Any, config: Any, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> tuple[Any, dict[str, Any]]:
    _check_size(kind, config, sum(tensor.numel() for tensor in tensors.values()))
    made: tuple[Any, dict[str, Any]] = kind.from_pretrained(
        None,
        config=config,
        state_dict=dict(tensors),
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # told by us, with names
        local_files_only=True,
    )
    return made


def _check_size(kind: Any, config: Any, there: int) -> None:
    """What the files lack, transformers makes: a config that speaks of another model would fill any
    memory, before there is a report that names what is wrong."""
    with torch.device("meta"):
        described = sum(part.numel() for part in kind(config).parameters())
    if described > 2 * there + MOST_MADE:  # twice: tied weights are stored once
        raise LoadFailedError(
            f"config.json describes a model of {described} numbers, its weights have {there}: they do "
            "not belong together, or files are missing"
        )


def around_stand_ins(
    kind: Any, config: Any, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> tuple[Any | None, dict[str, Any]]:
    """None: not every tensor has found one place of its own shape (then a report means little)."""
    stand_ins = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in tensors.items()}
    model, report = around(kind, config, stand_ins, dtype)
    found = {(t.data_ptr(), t.shape, t.stride()): name for name, t in stand_ins.items()}
    places: dict[str, torch.Tensor] = {}
    strange = 0
    for part in (*model.parameters(), *model.buffers()):
        name = found.get((part.data_ptr(), part.shape, part.stride()))
        if name is not None:
            places[name] = part
        elif isinstance(part, torch.nn.Parameter):
            strange += 1
    faults = any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    if not faults and (strange or len(places) != len(tensors)):
        return None, report
    for name, part in places.items():
        part.data = tensors[name]
    return model, report
