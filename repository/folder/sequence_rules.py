"""What `sequences` of a config may say, beyond what its types allow (`repository.folder.schema`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from repository.tensors import DATATYPES

IDS = ("UINT64", "INT64", "UINT32", "INT32", "BYTES")
NO_FLAG = ("BYTES", "BF16")
Fail = Callable[[str, str], NoReturn]  # the dotted key, and what is wrong with it


def spell_out(written: Any) -> Any:
    """`sequences: oldest` and `sequences: true` are shorthands."""
    if written is True:
        return {}
    return {"strategy": written} if isinstance(written, str) else written


def check(rules: Mapping[str, Any], fail: Fail) -> None:
    """Of `sequences`, whose keys and types are right."""
    names: dict[str, str] = {}
    kinds: set[str] = set()
    for i, control in enumerate(rules.get("controls") or ()):
        key = f"sequences.controls.{i}"
        _new(control["name"], f"{key}.name", names, fail)
        _check_control(control, key, fail)
        if control["kind"] in kinds:
            fail(f"{key}.kind", f"two of 'sequences.controls' are of the kind '{control['kind']}'")
        kinds.add(control["kind"])
    outputs: dict[str, str] = {}
    for i, state in enumerate(rules.get("states") or ()):
        key = f"sequences.states.{i}"
        _new(state["input"], f"{key}.input", names, fail)
        _new(state["output"], f"{key}.output", outputs, fail)
        _check_state(state, key, fail)


def _new(name: str, key: str, names: dict[str, str], fail: Fail) -> None:
    if not name:
        fail(key, f"'{key}' is empty")
    if name in names:
        fail(key, f"'{key}' is '{name}', and so is '{names[name]}'; they need different names")
    names[name] = key


def _check_control(control: Mapping[str, Any], key: str, fail: Fail) -> None:
    datatype, kind = control["datatype"], control["kind"]
    known = IDS if kind == "corrid" else [d for d in DATATYPES if d not in NO_FLAG]
    if datatype not in known:
        fail(
            f"{key}.datatype",
            f"a control of the kind '{kind}' cannot be '{datatype}'; it can be {', '.join(known)}",
        )


def _check_state(state: Mapping[str, Any], key: str, fail: Fail) -> None:
    if state["datatype"] not in DATATYPES:
        fail(
            f"{key}.datatype",
            f"unknown datatype '{state['datatype']}' of a state; known datatypes: "
            f"{', '.join(DATATYPES)}",
        )
    file = state.get("initial") or ""
    if file.startswith("/") or "\0" in file or ".." in file.split("/"):
        fail(f"{key}.initial", f"'{key}.initial' must lie in the model's folder initial_state")


def not_honoured(rules: Mapping[str, Any] | None) -> tuple[str, str] | None:
    """What is said and nothing comes of it, and what to do; None: all is honoured."""
    if not rules or not rules.get("iterative"):
        return None
    return (
        "'sequences.iterative' is honoured in part: a request without an id is a sequence of its own, "
        "but a model cannot ask to be called again for the same request",
        "let the model do all of its steps in one call, or answer them one by one (decoupled)",
    )
