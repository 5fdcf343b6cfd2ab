"""The models that Triton's own client examples ask for, as folders of a Triton repository, made on the
spot:

    simple           OUTPUT0 = INPUT0 + INPUT1, OUTPUT1 = INPUT0 - INPUT1; INT32 [16], batch up to 8
    simple_int8      the same in INT8, which wraps around
    simple_string    the same of numbers written as text: BYTES [16]
    simple_identity  OUTPUT0 = INPUT0; BYTES [-1]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import onnx
from onnx import NodeProto, TensorProto, helper

from tests.models import onnx_model

MOST_ROWS = 8
ELEMENTS = 16
LABELS = tuple(f"label{n}" for n in range(ELEMENTS))
TYPES = {"INT32": "TYPE_INT32", "INT8": "TYPE_INT8", "BYTES": "TYPE_STRING", "FP32": "TYPE_FP32"}


def write_simple(repo: Path, name: str = "simple", *, labels: Sequence[str] = ()) -> Path:
    """`labels`: of the elements of OUTPUT0, in the file labels.txt."""
    nodes = [
        helper.make_node("Add", ["INPUT0", "INPUT1"], ["OUTPUT0"]),
        helper.make_node("Sub", ["INPUT0", "INPUT1"], ["OUTPUT1"]),
    ]
    folder = _two_by_two(repo / name, "INT32", nodes, labelled=bool(labels))
    if labels:
        (folder / "labels.txt").write_text("".join(f"{label}\n" for label in labels))
    return folder


def write_simple_int8(repo: Path, name: str = "simple_int8") -> Path:
    return _two_by_two(repo / name, "INT8", _through_int32(TensorProto.INT8))


def write_simple_string(repo: Path, name: str = "simple_string") -> Path:
    return _two_by_two(repo / name, "BYTES", _through_int32(TensorProto.STRING))


def write_simple_identity(repo: Path, name: str = "simple_identity") -> Path:
    node = helper.make_node("Identity", ["INPUT0"], ["OUTPUT0"])
    return write_model(
        repo / name, [node], {"INPUT0": ("BYTES", (-1,))}, {"OUTPUT0": ("BYTES", (-1,))}
    )


WRITERS: tuple[Callable[[Path], Path], ...] = (
    write_simple,
    write_simple_int8,
    write_simple_string,
    write_simple_identity,
)


def write_all(repo: Path) -> None:
    """Each of the four, under its own name."""
    for write in WRITERS:
        write(repo)


def write_model(
    folder: Path,
    nodes: Sequence[NodeProto],
    inputs: dict[str, tuple[str, tuple[int, ...]]],
    outputs: dict[str, tuple[str, tuple[int, ...]]],
    *,
    most_rows: int = MOST_ROWS,
    version: int = 1,
    more: str = "",
    labels: dict[str, str] | None = None,
) -> Path:
    """Any ONNX model with its config.pbtxt. Tensors: name -> datatype and dims without the batch axis,
    which both files get where `most_rows` is not 0. `more`: further text of config.pbtxt; `labels`:
    output -> file."""
    axis = (-1,) if most_rows else ()
    model = onnx_model(
        list(nodes),
        [(name, datatype, axis + dims) for name, (datatype, dims) in inputs.items()],
        [(name, datatype, axis + dims) for name, (datatype, dims) in outputs.items()],
    )
    place = folder / str(version)
    place.mkdir(parents=True, exist_ok=True)
    onnx.save(model, place / "model.onnx")
    lines = [
        f'name: "{folder.name}"',
        'platform: "onnxruntime_onnx"',
        f"max_batch_size: {most_rows}",
        *[_tensor_text("input", name, *said) for name, said in inputs.items()],
        *[_tensor_text("output", name, *said, (labels or {}).get(name, ""))
          for name, said in outputs.items()],
        more,
    ]  # fmt: skip
    (folder / "config.pbtxt").write_text("\n".join(lines) + "\n")
    return folder


def _two_by_two(
    folder: Path, datatype: str, nodes: Sequence[NodeProto], *, labelled: bool = False
) -> Path:
    said = (datatype, (ELEMENTS,))
    return write_model(
        folder,
        nodes,
        {"INPUT0": said, "INPUT1": said},
        {"OUTPUT0": said, "OUTPUT1": said},
        labels={"OUTPUT0": "labels.txt"} if labelled else None,
    )


def _through_int32(kind: int) -> list[NodeProto]:
    """Sum and difference of what onnxruntime cannot add as it is."""
    return [
        helper.make_node("Cast", ["INPUT0"], ["a"], to=TensorProto.INT32),
        helper.make_node("Cast", ["INPUT1"], ["b"], to=TensorProto.INT32),
        helper.make_node("Add", ["a", "b"], ["sum"]),
        helper.make_node("Sub", ["a", "b"], ["difference"]),
        helper.make_node("Cast", ["sum"], ["OUTPUT0"], to=kind),
        helper.make_node("Cast", ["difference"], ["OUTPUT1"], to=kind),
    ]


def _tensor_text(
    kind: str, name: str, datatype: str, dims: tuple[int, ...], labels: str = ""
) -> str:
    file = f' label_filename: "{labels}"' if labels else ""
    shape = ", ".join(map(str, dims))
    return f'{kind} [ {{ name: "{name}" data_type: {TYPES[datatype]} dims: [ {shape} ]{file} }} ]'
