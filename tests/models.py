"""Tiny models for tests, written when they are needed: ONNX files and folders with a model.py."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from repository.config import ModelConfig
from repository.spec import ModelSpec

IR_VERSION = 10
OPSET = 17
ONNX_TYPES = {
    "BOOL": TensorProto.BOOL, "BYTES": TensorProto.STRING,
    "UINT8": TensorProto.UINT8, "UINT16": TensorProto.UINT16, "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64, "INT8": TensorProto.INT8, "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32, "INT64": TensorProto.INT64, "FP16": TensorProto.FLOAT16,
    "FP32": TensorProto.FLOAT, "FP64": TensorProto.DOUBLE, "BF16": TensorProto.BFLOAT16,
}  # fmt: skip
Dims = Sequence[int]


def add_onnx(path: Path, value: float = 1.0, shape: Dims = (-1, 4)) -> Path:
    """y = x + value, FP32. -1 in the shape is any size."""
    constant = numpy_helper.from_array(np.array(value, np.float32), "value")
    node = helper.make_node("Add", ["x", "value"], ["y"])
    return _write(path, [node], [("x", "FP32", shape)], [("y", "FP32", shape)], [constant])


def identity_onnx(path: Path, datatype: str, shape: Dims = (-1, 4)) -> Path:
    """y = x, of any datatype."""
    node = helper.make_node("Identity", ["x"], ["y"])
    return _write(path, [node], [("x", datatype, shape)], [("y", datatype, shape)])


def two_by_two_onnx(path: Path, shape: Dims = (-1, 4)) -> Path:
    """total = a + b, difference = a - b, FP32."""
    nodes = [
        helper.make_node("Add", ["a", "b"], ["total"]),
        helper.make_node("Sub", ["a", "b"], ["difference"]),
    ]
    ins = [(name, "FP32", shape) for name in ("a", "b")]
    outs = [(name, "FP32", shape) for name in ("total", "difference")]
    return _write(path, nodes, ins, outs)


def reshape_onnx(path: Path) -> Path:
    """y = x reshaped to [-1, 3]: breaks inside the graph unless 3 divides the size of x."""
    target = numpy_helper.from_array(np.array([-1, 3], np.int64), "target")
    node = helper.make_node("Reshape", ["x", "target"], ["y"])
    return _write(path, [node], [("x", "FP32", (-1,))], [("y", "FP32", (-1, 3))], [target])


def external_onnx(path: Path, value: float = 1.0, location: str = "weights.bin") -> Path:
    """y = x + w with w, 4096 times `value`, in the file `location` beside the model."""
    weights = numpy_helper.from_array(np.full(4096, value, np.float32), "w")
    node = helper.make_node("Add", ["x", "w"], ["y"])
    shape = (-1, 4096)
    model = onnx_model([node], [("x", "FP32", shape)], [("y", "FP32", shape)], [weights])
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path, save_as_external_data=True, location=location, size_threshold=0)
    return path


def relocate_external(path: Path, location: str) -> None:
    """Lets the model look for its external data elsewhere. The data itself stays where it is."""
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(model.SerializeToString())


def python_model(folder: Path, source: str, **files: str) -> Path:
    """A folder with a model.py; `files` are other modules: helper="..." becomes helper.py."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {"model": source, **files}.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(text))
    return folder


def spec_of(path: Path, backend: str = "onnx", name: str = "m", **config: Any) -> ModelSpec:
    """A spec for a model's file, or for the folder of a python model."""
    inside = backend == "onnx"
    return ModelSpec(
        model=name,
        version=1,
        fingerprint="f",
        folder=path.parent.parent if inside else path.parent,
        path=path.parent if inside else path,
        config=ModelConfig(backend=backend, **config),
        backend=backend,
        model_file=path.name if inside else "model.py",
    )


def _write(path: Path, *parts: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(onnx_model(*parts), path)
    return path


def onnx_model(
    nodes: list[onnx.NodeProto],
    inputs: list[tuple[str, str, Dims]],
    outputs: list[tuple[str, str, Dims]],
    constants: Sequence[onnx.TensorProto] = (),
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes, "g", [_value(*i) for i in inputs], [_value(*o) for o in outputs], list(constants)
    )
    return helper.make_model(
        graph, ir_version=IR_VERSION, opset_imports=[helper.make_opsetid("", OPSET)]
    )


def _value(name: str, datatype: str, shape: Dims) -> onnx.ValueInfoProto:
    dims = [f"d{i}" if size < 0 else size for i, size in enumerate(shape)]
    return helper.make_tensor_value_info(name, ONNX_TYPES[datatype], dims)
