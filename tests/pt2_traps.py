"""Exported programs that somebody has doctored: each would run code, were it simply loaded."""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.export.pt2_archive import PT2ArchiveReader, PT2ArchiveWriter

PROGRAM = "models/model.json"

# what could run code ----------------------------------------------------------------------------------


class Trap:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.marker}",))


def pickled(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def doctored(source: Path, target: Path, changes: dict[str, Any]) -> Path:
    """A copy of the archive with other members, or more. A function gets a member's JSON."""
    reader = PT2ArchiveReader(str(source))
    members = {
        name: reader.read_bytes(name)
        for name in reader.get_file_names()
        if not name.startswith((".data", "byteorder", "archive_format", "version"))
    }
    for name, change in changes.items():
        if isinstance(change, bytes):
            members[name] = change
        else:
            said = json.loads(members[name])
            change(said)
            members[name] = json.dumps(said).encode()
    with PT2ArchiveWriter(str(target)) as writer:
        for name, data in members.items():
            if name != "archive_version":
                writer.write_bytes(name, data)
    return target


def in_graph(*keys: Any, value: Any) -> Callable[[Any], None]:
    def change(program: Any) -> None:
        at = program
        for key in keys[:-1]:
            at = at[key]
        at[keys[-1]] = value

    return change


def payload(**more: Any) -> Callable[[Any], None]:
    def change(said: Any) -> None:
        next(iter(said["config"].values())).update(more)

    return change


GRAPH = ("graph_module", "graph")
SIZE = (*GRAPH, "tensor_values", "x", "sizes", 0, "as_expr", "expr_str")
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
ENUM = '{"__enum__": true, "fqn": "antigravity:a", "name": "b"}'
SIGNATURE = ("graph_module", "module_call_graph", 0, "signature")
STRUCTURE = (*SIGNATURE, "in_spec")


def called_metadata(evil: str) -> Callable[[Any], None]:
    """The tensor x bears the name of what is told of a node, and has a size that is code."""

    def change(program: Any) -> None:
        renamed = json.loads(json.dumps(program).replace('"x"', '"metadata"'))
        program.update(renamed)
        in_graph(*GRAPH, "tensor_values", "metadata", *SIZE[-4:], value=evil)(program)

    return change


def keyword(name: str) -> Callable[[Any], None]:
    """The program has a keyword argument of that name, which becomes a parameter of its code."""
    leaf = {"type": None, "context": None, "children_spec": []}
    args = {"type": "builtins.tuple", "context": "null", "children_spec": []}
    kwargs = {"type": "builtins.dict", "context": json.dumps([name]), "children_spec": [leaf]}
    both = {"type": "builtins.tuple", "context": "null", "children_spec": [args, kwargs]}

    def change(program: Any) -> None:
        in_graph(*STRUCTURE, value=json.dumps([1, both]))(program)
        in_graph(*SIGNATURE, "forward_arg_names", value=None)(program)

    return change


def without(source: Path, target: Path, member: str) -> Path:
    """A copy of the archive that lacks one member."""
    reader = PT2ArchiveReader(str(source))
    own = (".data", "byteorder", "archive_format", "archive_version", "version")
    with PT2ArchiveWriter(str(target)) as writer:
        for name in reader.get_file_names():
            if name != member and not name.startswith(own):
                writer.write_bytes(name, reader.read_bytes(name))
    return target


def traps(marker: Path) -> dict[str, tuple[str, dict[str, Any], str]]:
    """name -> (what is doctored, how, what is said). `marker` is what they would make."""
    shell = f"__import__('os').system('touch {marker}')"
    evil = pickled({"x": Trap(marker)})
    leaf = [1, {"type": "collections.defaultdict", "context": "[]", "children_spec": []}]
    enum = [1, {"type": "builtins.dict", "context": ENUM, "children_spec": []}]
    masked = [1, {**enum[1], "context": ENUM.replace("__enum", "\\u005f_enum")}]
    return {
        "sample inputs": ("mlp", {"data/sample_inputs/model.pt": evil}, "sample_inputs/model.pt"),
        "weights": (
            "mlp",
            {
                WEIGHTS: payload(use_pickle=True, path_name="weight_0"),
                "data/weights/weight_0": evil,
            },
            "weight_0",
        ),
        "old weights": ("mlp", {"data/weights/model.pt": evil}, "weights/model.pt"),
        "an opaque object": (
            "two",
            {
                CONSTANTS: payload(path_name="opaque_obj_0"),
                "data/constants/opaque_obj_0": pickle.dumps(Trap(marker)),
            },
            "opaque_obj_0",
        ),
        "a member elsewhere": ("mlp", {WEIGHTS: payload(path_name="../extra/a")}, "outside"),
        "a function": (
            "mlp",
            {PROGRAM: in_graph(*GRAPH, "nodes", 0, "target", value="torch.os.system")},
            "calls 'torch.os.system'",
        ),
        "a file": (
            "mlp",
            {PROGRAM: in_graph(*GRAPH, "nodes", 0, "target", value="torch.ops.aten.save.default")},
            "calls 'torch.ops.aten.save",
        ),
        "a size": ("mlp", {PROGRAM: in_graph(*SIZE, value=shell)}, "has a size"),
        "a size in disguise": (
            "mlp",
            {PROGRAM: in_graph(*SIZE, value="Symbol('s0').__class__")},
            "more than arithmetic",
        ),
        "a guard": (
            "mlp",
            {PROGRAM: in_graph("guards_code", value=[shell])},
            "has a guard|has a size",
        ),
        "a structure": (
            "mlp",
            {PROGRAM: in_graph(*STRUCTURE, value=json.dumps(leaf))},
            "type 'collections.defaultdict'",
        ),
        "an enumeration": (
            "mlp",
            {PROGRAM: in_graph(*STRUCTURE, value=json.dumps(enum))},
            "imports an enumeration",
        ),
        "an enumeration in disguise": (
            "mlp",
            {PROGRAM: in_graph(*STRUCTURE, value=json.dumps(masked))},
            "imports an enumeration",
        ),
        "a value called metadata": ("mlp", {PROGRAM: called_metadata(shell)}, "has a size"),
        "a keyword": ("mlp", {PROGRAM: keyword(f"x={shell}")}, "a name that is none"),
        "a keyword without a bracket": (
            "mlp",
            {PROGRAM: keyword("x, y: [0 for torch.a in [torch.os.system]]")},
            "a name that is none",
        ),
        "a statement without a bracket": (
            "mlp",
            {
                PROGRAM: in_graph(
                    *GRAPH, "nodes", 0, "name", value="for torch.a in torch.os.system,: b"
                )
            },
            "a name that is none",
        ),
        "a name": (
            "mlp",
            {PROGRAM: in_graph(*GRAPH, "nodes", 0, "name", value=f'x"); {shell}')},
            "a name that is none",
        ),
        "a library": (
            "mlp",
            {"data/aotinductor/model/a.so": b"\x7fELF"},
            "AOTInductor package needs",
        ),
        "a stranger": ("mlp", {"data/whatever/a": b"?"}, "of a kind"),
    }
