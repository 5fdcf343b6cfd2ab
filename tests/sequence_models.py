"""ONNX models with a memory, as folders of a repository: OUTPUT is the sum of what a sequence said."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tests.models import onnx_model

CONTROLS = """
  control_input [
    { name: "START" control [{ kind: CONTROL_SEQUENCE_START int32_false_true: [0, 1] }] },
    { name: "READY" control [{ kind: CONTROL_SEQUENCE_READY int32_false_true: [0, 1] }] },
    { name: "CORRID" control [{ kind: CONTROL_SEQUENCE_CORRID data_type: %s }] }
  ]
"""
STATE = """
  state [{ input_name: "SUM_IN" output_name: "SUM_OUT" data_type: TYPE_INT32 dims: [1] %s }]
"""
CONFIG = """
backend: "onnxruntime"
max_batch_size: %d
input [{ name: "INPUT" data_type: TYPE_INT32 dims: [1] }]
output [
  { name: "OUTPUT" data_type: TYPE_INT32 dims: [1] },
  { name: "WHO" data_type: %s dims: [1] }
]
sequence_batching { %s }
"""


def sum_onnx(path: Path, *, rows: bool = True, add: int = 0, ids: str = "UINT64") -> Path:
    """OUTPUT = (INPUT + add + SUM_IN) * READY; the state stays where READY is 0, and START says nothing
    that the state does not say too. WHO is CORRID."""
    shape = (-1, 1) if rows else (1,)
    nodes = [
        helper.make_node("Add", ["INPUT", "SUM_IN"], ["sum"]),
        helper.make_node("Add", ["sum", "add"], ["more"]),
        helper.make_node("Mul", ["START", "zero"], ["begun"]),
        helper.make_node("Add", ["more", "begun"], ["total"]),
        helper.make_node("Mul", ["total", "READY"], ["OUTPUT"]),
        helper.make_node("Identity", ["OUTPUT"], ["SUM_OUT"]),
        helper.make_node("Identity", ["CORRID"], ["WHO"]),
    ]
    numbers = ("INPUT", "SUM_IN", "START", "READY")
    ins = [*[(name, "INT32", shape) for name in numbers], ("CORRID", ids, shape)]
    outs = [("OUTPUT", "INT32", shape), ("SUM_OUT", "INT32", shape), ("WHO", ids, shape)]
    constants = [
        numpy_helper.from_array(np.array(value, np.int32), name)
        for name, value in (("add", add), ("zero", 0))
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(onnx_model(nodes, ins, outs, constants), path)
    return path


def write_sums(
    repo: Path,
    name: str,
    *,
    rows: int = 4,
    strategy: str = "direct {}",
    idle_us: int = 60_000_000,
    ids: str = "UINT64",
    first: Sequence[int] | None = None,
    more: str = "",
) -> Path:
    """The model's folder. `rows`: its max_batch_size; `first`: what the sum of a new sequence is."""
    folder = repo / name
    sum_onnx(folder / "1" / "model.onnx", rows=rows > 0, ids=ids)
    start = ""
    if first is not None:
        file = folder / "initial_state" / "sum"
        file.parent.mkdir()
        file.write_bytes(np.array(first, "<i4").tobytes())
        start = 'initial_state [{ name: "begin" data_type: TYPE_INT32 dims: [1] data_file: "sum" }]'
    said = "TYPE_STRING" if ids == "BYTES" else f"TYPE_{ids}"
    rules = f"{strategy} max_sequence_idle_microseconds: {idle_us}"
    rules += CONTROLS % said + STATE % start
    (folder / "config.pbtxt").write_text(CONFIG % (rows, said, rules) + more)
    return folder
