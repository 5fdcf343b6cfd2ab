"""Small requests of sequences, and a line before a fake model with a memory, on the loop's clock."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

from repository.batching import Batcher
from repository.config import Batching, Control, ModelConfig, Sequences, State
from repository.messages import InferRequest, InferResponse, Loaded, TensorSpec
from repository.sequences.line import SequenceLine
from repository.sequences.oldest import instances_of
from repository.sequences.strategy import strategy_of, within
from repository.sequences.wiring import zeros
from repository.tensors import Tensor
from tests.fakes.host import FakeHost

CONTROLS = (
    Control(name="START", kind="start", datatype="INT32"),
    Control(name="END", kind="end", datatype="FP32"),
    Control(name="READY", kind="ready", datatype="BOOL"),
    Control(name="CORRID", kind="corrid", datatype="UINT64"),
)
STATE = State(input="SUM_IN", output="SUM_OUT", datatype="FP32", shape=(1,))
KNOWN = (
    TensorSpec("x", "FP32", (-1, 1)),
    TensorSpec("START", "INT32", (-1, 1)),
    TensorSpec("END", "FP32", (-1, 1)),
    TensorSpec("READY", "BOOL", (-1, 1)),
    TensorSpec("CORRID", "UINT64", (-1, 1)),
    TensorSpec("SUM_IN", "FP32", (-1, 1)),
)


def say(
    value: float,
    sequence: int | str,
    *,
    start: bool = False,
    end: bool = False,
    flat: bool = False,
    **more: Any,
) -> InferRequest:
    """One row; `flat`: for a model that does not batch."""
    said = {"sequence_id": sequence, **more}
    said |= {"sequence_start": True} if start else {}
    said |= {"sequence_end": True} if end else {}
    return InferRequest(
        [Tensor.of("x", np.full((1,) if flat else (1, 1), value, "f4"))], parameters=said
    )


def adding(request: InferRequest) -> InferResponse:
    """y = x + what was said before in the sequence, by the state; rows that are not ready say -1."""
    given = {tensor.name: tensor.array() for tensor in request.inputs}
    begun = np.where(given["START"] == 1, 0, given["SUM_IN"])
    total = np.where(given["READY"], begun + given["x"], -1).astype("f4")
    return InferResponse([Tensor.of("y", total), Tensor.of("SUM_OUT", total)])


def column(request: InferRequest, name: str) -> list[Any]:
    found = next(tensor for tensor in request.inputs if tensor.name == name)
    rows: list[Any] = found.array().reshape(-1).tolist()
    return rows


def columns(host: FakeHost, name: str) -> list[list[Any]]:
    """What each call of the host was given."""
    return [column(request, name) for request in host.batches]


def value_of(response: InferResponse) -> float:
    assert [tensor.name for tensor in response.outputs] == ["y"], "states are for nobody"
    return float(response.outputs[0].array().reshape(-1)[0])


def line_of(
    host: FakeHost,
    most: int = 4,
    *,
    batching: Batching | None = None,
    server_queue: int = 1000,
    hold: Any = None,
    **rules: Any,
) -> SequenceLine:
    """`most`: the model's max_batch_size; `rules`: `sequences` of its config."""
    said = {"controls": CONTROLS, "states": (STATE,), **rules}
    config = ModelConfig(sequences=Sequences(**said), batching=batching)
    loaded = Loaded(inputs=KNOWN if most else (), max_batch_size=most)
    clock = asyncio.get_running_loop().time
    initial = {
        s.input: zeros(s.input, s.datatype, (1,) * bool(most) + (1,)) for s in said["states"]
    }

    def strategy(line: SequenceLine) -> Any:
        fronts = [
            Batcher(one, loaded, within(config), max_queue=0, clock=clock)
            for one in instances_of(host)
        ]
        return strategy_of(line, host, config, loaded, fronts, clock)

    return SequenceLine(
        host, "m", config, loaded, strategy,
        max_queue=server_queue, initial=initial, hold=hold, clock=clock,
    )  # fmt: skip
