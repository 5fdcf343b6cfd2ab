"""What in a .pt2 could run code, found before torch loads it.

`torch.export.load` believes its archive: where a pickle does not load safely it loads it unsafely, and
the graph beside it may name any function below `torch.` (so `torch.os.system`), shapes that are
evaluated as Python, classes whose modules are imported, libraries. So each member is looked at, by
the reader that torch itself uses:

    pickles      must load with weights_only=True
    the graph    calls operators of aten, prims and a few more; its shapes are plain arithmetic; its
                 structures are tuples, lists and dicts; its names are plain words
    all else     a package of compiled code (AOTInductor), pickled or scripted objects, members that we
                 do not know

What is found is an UntrustedCodeError that names the member; with `trust_code` nobody looks.
"""

from __future__ import annotations

import ast
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch

from repository.errors import IncompleteFilesError, UntrustedCodeError

MAX_JSON = 256 << 20  # bytes
# Names become Python, word for word. Without brackets, blanks and quotes it is a variable at worst:
# `for torch.a in torch.os.system,: b` needs no bracket, and makes of any sum a call.
PLAIN = re.compile(r"[^\s\"'`()\[\]\\;={}\0]*")
KNOWN = re.compile(
    r"models/[^/]+\.json|data/(weights|constants|sample_inputs)/[^/]+|extra/.*"
    r"|archive_(format|version)|byteorder|\.data/(version|serialization_id)|version|\.format_version"
    r"|\.storage_alignment"
)
COMPILED = ("data/aotinductor/", "data/executorch/", "data/mtia")
BINARY = (".so", ".o", ".a", ".cubin", ".ptx", ".cpp", ".cu", ".py", ".pyc")
OBJECTS = ("custom_obj_", "opaque_obj_")
OPERATOR = re.compile(
    r"torch\.ops\.(aten|prims|quantized_decomposed)\.(?!save\.|from_file\.|__)\w+\.(?!__)\w+"
    r"|torch\.ops\.higher_order\."
    r"(cond|while_loop|scan|map_impl|associative_scan|wrap_with_set_grad_enabled|wrap_with_autocast)"
    r"|torch\.(_sym|sym)_[a-z_]+"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge"
    r"|and_|or_|not_|xor|lshift|rshift|getitem)"
    r"|math\.[a-z][a-z0-9]*"
)
STRUCTURES = frozenset(
    {None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"}
)
FUNCTIONS = {
    "Abs", "Add", "And", "CeilDiv", "CeilToInt", "CleanDiv", "Eq", "Equality", "Float",
    "FloatPow", "FloatTrueDiv", "FloorDiv", "FloorToInt", "GreaterThan", "Ge", "Gt", "Identity",
    "IntTrueDiv", "Integer", "IsNonOverlappingAndDenseIndicator", "LShift", "Le", "LessThan",
    "Lt", "Max", "Min", "Mod", "ModularIndexing", "Mul", "Ne", "Not", "Or", "Piecewise", "Pow",
    "PowByNatural", "PythonMod", "RShift", "Rational", "RoundDecimal", "RoundToInt",
    "StrictGreaterThan", "StrictLessThan", "Symbol", "ToFloat", "TruncToFloat", "TruncToInt",
    "Unequality", "Where", "ceiling", "floor",
}  # fmt: skip
QUESTIONS = {"size", "stride", "storage_offset", "dim", "numel"}  # to a tensor, in a guard
WORD = re.compile(r"[A-Za-z_]\w*")
# Where a node came from: told to people, never run.
METADATA = frozenset(
    {"stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "custom", "from_node"}
)
ARITHMETIC = (
    ast.Expression, ast.Call, ast.keyword, ast.Name, ast.Load, ast.Constant, ast.BinOp, ast.UnaryOp,
    ast.BoolOp, ast.Compare, ast.Tuple, ast.operator, ast.unaryop, ast.boolop, ast.cmpop,
)  # fmt: skip


class Reader(Protocol):
    """`torch.export.pt2_archive.PT2ArchiveReader`."""

    def get_file_names(self) -> list[str]: ...

    def read_bytes(self, name: str) -> bytes: ...


class _Suspicion(Exception):  # noqa: N818 - it never leaves this file
    """What could run code, in words."""


def compiled(names: Iterable[str]) -> str:
    """The first member that is of compiled code; "" if there is none."""
    return next((n for n in names if n.startswith(COMPILED) or n.endswith(BINARY)), "")


def check(reader: Reader, file: str) -> None:
    """Raises UntrustedCodeError, IncompleteFilesError. `file`: for texts."""
    names = reader.get_file_names()
    member = compiled(names)
    if member:
        raise UntrustedCodeError(
            f"{file} holds compiled code ('{member}'): an AOTInductor package needs trust_code; "
            "export the model without compiling it, or start the server with --trust-code"
        )
    if len({name.lower() for name in names}) < len(names):
        raise UntrustedCodeError(
            f"{file} has two members of one name, of which nobody knows which one is read: export the "
            "model again, or start the server with --trust-code"
        )
    for name in names:
        try:
            _check_member(reader, name)
        except _Suspicion as found:
            raise UntrustedCodeError(
                f"'{name}' in {file} {found}; that could run code: export the model again without it, "
                "or start the server with --trust-code"
            ) from found


def _check_member(reader: Reader, name: str) -> None:
    if not KNOWN.fullmatch(name):
        raise _Suspicion("is of a kind that an exported program does not have")
    kind = name.lower()  # torch's reader finds members whatever the case of their letters
    if kind.startswith("models/"):
        _check_program(_json(reader, name))
    elif kind.startswith(("data/weights/", "data/constants/")) and kind.endswith("_config.json"):
        _check_payloads(reader, name)
    elif kind.startswith("data/") and kind.endswith((".pt", ".pkl", ".pickle")):
        _check_pickle(reader, name)


def _json(reader: Reader, name: str) -> Any:
    raw = reader.read_bytes(name)
    if len(raw) > MAX_JSON:
        raise IncompleteFilesError(f"'{name}' is {len(raw)} bytes; at most {MAX_JSON} are read")
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise IncompleteFilesError(f"'{name}' in the archive is not JSON") from error


def _check_payloads(reader: Reader, name: str) -> None:
    """Where the weights lie: as plain bytes, or (some dtypes) as the pickle of a tensor."""
    folder = name.rpartition("/")[0]
    config = _json(reader, name)
    payloads = config.get("config") if isinstance(config, Mapping) else None
    if not isinstance(payloads, Mapping):
        raise IncompleteFilesError(f"'{name}' in the archive names no weights")
    for payload in payloads.values():
        path = payload.get("path_name") if isinstance(payload, Mapping) else None
        if not isinstance(path, str) or "/" in path or path.startswith("."):
            raise _Suspicion("names a member outside of its folder")
        if path.startswith(OBJECTS):
            raise _Suspicion(f"holds a pickled object ('{path}')")
        if payload.get("use_pickle"):
            _check_pickle(reader, f"{folder}/{path}")


def _check_pickle(reader: Reader, name: str) -> None:
    raw = reader.read_bytes(name)
    if not raw:
        return
    try:
        torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except Exception as error:
        raise _Suspicion(
            f"is a pickle of more than tensors ('{name.rpartition('/')[2]}')"
        ) from error


# the graph --------------------------------------------------------------------------------------


def _check_program(program: Any) -> None:
    try:
        _walk(program)
    except RecursionError as error:
        raise _Suspicion("is nested too deeply") from error


def _walk(value: Any) -> None:
    if isinstance(value, str):
        if not PLAIN.fullmatch(value):
            raise _Suspicion(f"has a name that is none ('{value[:40]}')")
    elif isinstance(value, list):
        for each in value:
            _walk(each)
    elif isinstance(value, dict):
        for key, each in value.items():
            _walk(key)
            judge = JUDGES.get(key)
            if each and judge is not None:
                judge(each)
            elif each:
                _walk(each)


def _check_operator(target: Any) -> None:
    if not isinstance(target, str) or not OPERATOR.fullmatch(target):
        raise _Suspicion(f"calls '{str(target)[:60]}', which is no operator of torch's own")


def _check_structure(said: Any) -> None:
    """How inputs and outputs are nested: JSON inside a string."""
    try:
        _, spec = json.loads(said)
    except (TypeError, ValueError) as error:
        raise _Suspicion("has a structure of inputs or outputs that is none") from error
    _check_structure_node(spec)


def _check_inputs(said: Any) -> None:
    """The keys of keyword arguments become parameters."""
    _check_structure(said)
    _walk_contexts(json.loads(said)[1])


def _walk_contexts(node: Any) -> None:
    context = node.get("context")
    _walk(json.loads(context) if isinstance(context, str) else context)
    for child in node.get("children_spec") or ():
        _walk_contexts(child)


def _check_structure_node(node: Any) -> None:
    kind = node.get("type") if isinstance(node, dict) else "?"
    if kind not in STRUCTURES:
        raise _Suspicion(f"has a structure of type '{str(kind)[:60]}'")
    _check_context(node.get("context"))
    for child in node.get("children_spec") or ():
        _check_structure_node(child)


def _check_context(said: Any) -> None:
    """Keys of a dict, as JSON inside the JSON."""
    try:
        keys = json.loads(said) if isinstance(said, str) else said
    except ValueError as error:
        raise _Suspicion("has a structure of inputs or outputs that is none") from error
    if "__enum__" in json.dumps(keys):  # not in `said`, which may write its letters as \\u005f
        raise _Suspicion("imports an enumeration")


def _check_size(said: Any) -> None:
    """A size of a shape, which torch evaluates as Python: Add(Symbol('s0', integer=True), 1)."""
    tree = _parsed(said)
    symbols: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id == "Symbol":
                symbols |= {id(arg) for arg in node.args}
            elif node.func.id not in FUNCTIONS:
                raise _Suspicion(f"has a size that calls '{node.func.id[:40]}'")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and not isinstance(node.func, ast.Name):
            raise _Suspicion(f"has a size '{str(said)[:40]}' that is more than arithmetic")
        _check_node(node, said, texts=id(node) in symbols)


def _check_guards(said: Any) -> None:
    """What must hold of the inputs, which torch runs as Python: L['x'].size()[0] <= 8."""
    for guard in said if isinstance(said, list) else [said]:
        tree = _parsed(guard)
        texts = {id(n.slice) for n in ast.walk(tree) if isinstance(n, ast.Subscript)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in QUESTIONS:
                continue
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                if node.func.id not in ("max", "min", "abs", "len"):
                    raise _Suspicion(f"has a guard that calls '{node.func.id[:40]}'")
            elif not isinstance(node, ast.Subscript):
                _check_node(node, guard, texts=id(node) in texts)


def _parsed(said: Any) -> ast.AST:
    try:
        return ast.parse(str(said).strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise _Suspicion(f"has a size '{str(said)[:40]}' that is none") from error


def _check_node(node: ast.AST, said: Any, *, texts: bool) -> None:
    if isinstance(node, ast.Name):
        plain = "__" not in node.id
    elif isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
        plain = texts and isinstance(node.value, str) and bool(WORD.fullmatch(node.value))
    else:
        plain = isinstance(node, ARITHMETIC)
    if not plain:
        raise _Suspicion(f"has a size '{str(said)[:40]}' that is more than arithmetic")


def _check_text(said: Any) -> None:
    """What an operator is given: it is quoted in the code."""
    if not isinstance(said, str) and not (
        isinstance(said, list) and all(isinstance(each, str) for each in said)
    ):
        _walk(said)


def _refuse_object(said: Any) -> None:
    raise _Suspicion("holds a custom object")


def _check_metadata(said: Any) -> None:
    """What else has that name, a tensor of the graph for example, is looked at like anything."""
    if isinstance(said, dict):
        said = {k: v for k, v in said.items() if k not in METADATA or not isinstance(v, str)}
    _walk(said)


JUDGES: dict[str, Callable[[Any], None]] = {
    "metadata": _check_metadata,
    "target": _check_operator,
    "as_operator": _check_operator,
    "as_string": _check_text,
    "as_strings": _check_text,
    "in_spec": _check_inputs,
    "out_spec": _check_structure,
    "expr_str": _check_size,
    "guards_code": _check_guards,
    "as_custom_obj": _refuse_object,
    "custom_obj": _refuse_object,
    "custom_obj_values": _refuse_object,
}
