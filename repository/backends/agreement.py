"""What a model has, against what its config says that it has.

`model` shapes are whole, as clients see them. The config's shapes lack the batch axis where
max_batch_size > 0; it is put in front here. -1 in either is any size: the stricter one is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from repository.config import ModelConfig, Sequences, TensorConfig
from repository.errors import LoadFailedError
from repository.messages import TensorSpec

MOST_ROWS = 4  # of a batch, where nobody says: Triton's default-max-batch-size


def configured(
    tensors: Sequence[TensorConfig] | None, max_batch_size: int
) -> tuple[TensorSpec, ...]:
    """The config's own words as whole shapes."""
    batch = (-1,) if max_batch_size > 0 else ()
    return tuple(
        TensorSpec(t.name, t.datatype, batch + tuple(t.shape), t.optional) for t in tensors or ()
    )


def completed(
    config: ModelConfig, model: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> ModelConfig:
    """A config in Triton's form that leaves inputs or outputs out, as its ONNX backend completes it:
    a model all of whose tensors begin with a free axis batches, `MOST_ROWS` at the most. Any other
    config says what it means. Raises LoadFailedError.

    Where one side is written with max_batch_size 0, its shapes are whole: they would have one axis too
    many if the model were to batch, so it does not.
    """
    if not config.triton or (config.inputs is not None and config.outputs is not None):
        return config
    batches = all(spec.shape and spec.shape[0] == -1 for spec in (*inputs, *outputs))
    if config.max_batch_size and not batches:
        raise LoadFailedError(
            f"autofill failed for model '{model}': model does not support batching while non-zero "
            "max_batch_size is specified; set max_batch_size to 0, or export the model so that the "
            "first axis of every input and output is dynamic"
        )
    silent = config.inputs is None and config.outputs is None
    if config.max_batch_size or not (batches and silent):
        return config
    return msgspec.structs.replace(config, max_batch_size=MOST_ROWS)


def reconcile(
    config: ModelConfig, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """(inputs, outputs) to be shown and checked against. Raises LoadFailedError.

    The config must name every input, and may name some of the outputs. What the server itself gives a
    model that takes sequences, and takes from it, it need not name.
    """
    ins, outs = tuple(inputs), tuple(outputs)
    sequences = config.sequences or Sequences()
    if config.inputs is not None:
        asked = configured(config.inputs, config.max_batch_size)
        given = {spec.name for spec in asked}
        own_inputs = {s.name: s for s in inputs if s.name in sequences.own_inputs}
        merged = {s.name: own_inputs.get(s.name) or _merge("input", s, inputs) for s in asked}
        for spec in inputs:
            if spec.optional or spec.name in sequences.own_inputs:
                merged.setdefault(spec.name, spec)
            elif spec.name not in given:
                raise LoadFailedError(
                    f"the config lists inputs, but not '{spec.name}', which the model needs; "
                    f"the model has {_list(inputs)}"
                )
        ins = tuple(merged[spec.name] for spec in inputs)
    if config.outputs is not None:
        outs = tuple(
            _merge("output", spec, outputs)
            for spec in configured(config.outputs, config.max_batch_size)
        )
        listed = {spec.name for spec in outs}
        own = sequences.own_outputs - listed
        outs += tuple(spec for spec in outputs if spec.name in own)
    if config.max_batch_size > 0:
        _check_batch_axis("input", ins, config.max_batch_size)
        _check_batch_axis("output", outs, config.max_batch_size)
    return ins, outs


def _merge(
    side: Literal["input", "output"], asked: TensorSpec, have: Sequence[TensorSpec]
) -> TensorSpec:
    found = next((spec for spec in have if spec.name == asked.name), None)
    if found is None:
        raise LoadFailedError(
            f"the config lists {side} '{asked.name}'; the model has {_list(have)}"
        )
    if found.datatype != asked.datatype:
        raise LoadFailedError(
            f"{side} '{asked.name}' is {asked.datatype} in the config; "
            f"in the model it is {found.datatype}"
        )
    fits = len(found.shape) == len(asked.shape) and all(
        a == b or -1 in (a, b) for a, b in zip(asked.shape, found.shape, strict=True)
    )
    if not fits:
        raise LoadFailedError(
            f"{side} '{asked.name}' has shape {list(asked.shape)} by the config; "
            f"in the model it is {list(found.shape)}"
        )
    shape = tuple(max(a, b) for a, b in zip(asked.shape, found.shape, strict=True))
    return TensorSpec(asked.name, asked.datatype, shape, asked.optional or found.optional)


def _check_batch_axis(side: str, specs: Sequence[TensorSpec], max_batch_size: int) -> None:
    for spec in specs:
        if not spec.shape or spec.shape[0] != -1:
            raise LoadFailedError(
                f"max_batch_size is {max_batch_size}, but {side} '{spec.name}' has shape "
                f"{list(spec.shape)} in the model: its first axis must be dynamic (-1); "
                "export it so, or set max_batch_size to 0"
            )


def _list(specs: Sequence[TensorSpec]) -> str:
    shown = [f"'{s.name}' ({s.datatype} {list(s.shape)})" for s in specs]
    return ", ".join(shown) if shown else "none"
