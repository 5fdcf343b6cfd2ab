"""Small requests for a batcher, and a batcher in front of a fake host, on the loop's own clock."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

from repository.batching import Batcher
from repository.config import Batching, ModelConfig
from repository.messages import InferRequest, InferResponse, Loaded
from repository.tensors import Tensor
from tests.fakes.host import FakeHost


def ask(*values: float, datatype: str = "FP32", width: int = 1, **parameters: int) -> InferRequest:
    """One row per value."""
    rows = np.repeat(np.array(values, dtype=object)[:, None], width, axis=1)
    if datatype != "BYTES":
        rows = rows.astype("f4" if datatype == "FP32" else "i4")
    return InferRequest([Tensor.of("x", rows)], parameters=dict(parameters))


def rows_of(response: InferResponse) -> list[float]:
    return [float(row[0]) for row in response.outputs[0].array()]


def values_of(host: FakeHost) -> list[list[float]]:
    """What each call of the host was given, one number per row."""
    return [request.inputs[0].array()[:, 0].tolist() for request in host.batches]


def sizes(host: FakeHost) -> list[int]:
    return [request.inputs[0].shape[0] for request in host.batches]


def batcher(host: FakeHost, most: int = 8, *, server_queue: int = 1000, **batching: Any) -> Batcher:
    """`most`: the model's max_batch_size; `batching`: as in a model's config."""
    return Batcher(
        host,
        Loaded(max_batch_size=most),
        ModelConfig(batching=Batching(**batching)),
        max_queue=server_queue,
        clock=asyncio.get_running_loop().time,
    )
