"""A model with sequences as it is itself: with the tensors that clients never see.

Its config names the inputs and outputs of clients; controls and states are said elsewhere in it. Where
it runs, and where it is tried out without a sequence, they are inputs and outputs like any other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import msgspec

from repository.config import TensorConfig
from repository.spec import ModelSpec

Tensors = tuple[TensorConfig, ...] | None


def whole(spec: ModelSpec) -> ModelSpec:
    """For the host. Of a model without sequences: itself."""
    rules = spec.config.sequences
    if rules is None:
        return spec
    controls = [TensorConfig(name=c.name, datatype=c.datatype, shape=(1,)) for c in rules.controls]
    ins = [TensorConfig(name=s.input, datatype=s.datatype, shape=s.shape) for s in rules.states]
    outs = [TensorConfig(name=s.output, datatype=s.datatype, shape=s.shape) for s in rules.states]
    config = msgspec.structs.replace(
        spec.config,
        inputs=_with(spec.config.inputs, [*controls, *ins]),
        outputs=_with(spec.config.outputs, outs),
    )
    return replace(spec, config=config)


def untold(spec: ModelSpec) -> ModelSpec:
    """`whole`, for who tries the model with requests of his own making: there are no sequences."""
    if spec.config.sequences is None:
        return spec
    found = whole(spec)
    return replace(found, config=msgspec.structs.replace(found.config, sequences=None))


def _with(said: Tensors, own: Iterable[TensorConfig]) -> Tensors:
    """Where nothing is said the model speaks for itself, and knows all."""
    if said is None:
        return None
    names: set[str] = {tensor.name for tensor in said}
    return said + tuple([tensor for tensor in own if tensor.name not in names])
