"""What is said to a model and what it answers. Plain data, the same for every face and host."""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec

from repository.forms import Form
from repository.tensors import Tensor

Parameters: TypeAlias = dict[str, Any]


class TensorSpec(msgspec.Struct, frozen=True, gc=False):
    """An input or output as clients see it: full shape with the batch axis, -1 is any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = False


class Loaded(msgspec.Struct, frozen=True):
    """What a host reports once its model is in memory.

    inputs, outputs   as the model itself (or its config) says; empty means: anything goes
    max_batch_size    0: the host takes requests one by one, shapes are exact
    platform          KServe V2 platform name, such as "onnxruntime_onnx"
    memory            bytes by kind (weights, workspace, context) that the backend knows of, summed
                      over the workers; what a worker really has is what `Host.memory` measures
    details           for people: providers, threads, pids; `build_s`: what of the load came after
                      reading (making the model of it), where the backend can tell
    abilities         what it can do beside `infer`: "generate" (see `repository.generate`), "chat"
                      (it has a template for conversations), "embed" (texts in, vectors out),
                      "adapt" (it takes adapters), "sleep" (it can leave its device and come back),
                      "ask" (it takes several requests as they are and answers each on its own:
                      `Host.ask`), "decoupled" (such a request may have any number of answers)
    """

    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    max_batch_size: int = 0
    platform: str = ""
    memory: dict[str, int] = msgspec.field(default_factory=dict)
    details: dict[str, Any] = msgspec.field(default_factory=dict)
    abilities: tuple[str, ...] = ()


class InferRequest(msgspec.Struct, gc=False):
    """`outputs` empty means all of them. `parameters` are the request's own (KServe V2), read only.

    `form`, where it is known: all of this but the bytes, shared by the requests that say the same.
    """

    inputs: list[Tensor]
    outputs: tuple[str, ...] = ()
    id: str = ""
    parameters: Parameters = msgspec.field(default_factory=dict)
    form: Form | None = None


class InferResponse(msgspec.Struct, gc=False):
    """`queue_s` waiting for its batch, `compute_s` inside the backend, `batch_size` of the whole batch
    that it was part of (0 where the model does not batch). `form` as in a request."""

    outputs: list[Tensor]
    parameters: Parameters = msgspec.field(default_factory=dict)
    queue_s: float = 0.0
    compute_s: float = 0.0
    batch_size: int = 0
    form: Form | None = None
