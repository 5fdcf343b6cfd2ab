"""Imports a model's own Python file. Whoever calls this has been told that the folder is trusted.

What is imported from the model's own folder belongs to this model alone; its folder is only read
(no bytecode is written), its module has a name that nobody else has.
"""

from __future__ import annotations

import ast
import importlib.util
import itertools
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from repository.errors import IncompleteFilesError, LoadFailedError

_numbers = itertools.count(1)
_importing = threading.Lock()  # inline models share sys.path and sys.modules while they import


def load_file(path: Path, *, private: bool) -> ModuleType:
    """Runs the file as a module. `private`: other models live in this process.

    Raises IncompleteFilesError, LoadFailedError, and whatever the file does.
    """
    if not path.is_file():
        raise IncompleteFilesError(f"{path.name} is missing")
    name = f"modeldepot_model_{next(_numbers)}"
    spec = importlib.util.spec_from_file_location(
        name, path, submodule_search_locations=[str(path.parent)]
    )
    if spec is None or spec.loader is None:
        raise LoadFailedError(f"'{path.name}' is not a Python file")
    module = importlib.util.module_from_spec(spec)
    with _own_folder_first(path.parent, private=private):
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            forget(module)
            raise
    return module


def class_of(module: ModuleType, name: str) -> type:
    """Raises LoadFailedError."""
    kind = getattr(module, name, None)
    if not isinstance(kind, type):
        file = Path(module.__file__ or "").name
        raise LoadFailedError(f"{file} has no class '{name}'; write one, or set options.class")
    return kind


def check_file(path: Path, name: str) -> None:
    """Without running it: the file compiles, and binds `name` at its top, as far as that can be seen.

    Raises IncompleteFilesError, LoadFailedError, SyntaxError.
    """
    if not path.is_file():
        raise IncompleteFilesError(f"{path.name} is missing")
    tree = ast.parse(path.read_bytes(), path.name)
    compile(tree, path.name, "exec")
    bound = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            bound.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {alias.asname or alias.name for alias in node.names}
    if name not in bound and not {"*", "globals"} & bound:
        raise LoadFailedError(f"{path.name} has no class '{name}'; write one, or set options.class")


def forget(module: ModuleType) -> None:
    """The module, and what it imported from its folder relatively."""
    name = module.__name__
    for each in [n for n in sys.modules if n == name or n.startswith(f"{name}.")]:
        del sys.modules[each]


@contextmanager
def _own_folder_first(folder: Path, *, private: bool) -> Iterator[None]:
    """Files beside the module can be imported by name.

    In a worker it stays so. In a process with other models (`private`) only while the file is
    being imported, and what came from the folder is forgotten afterwards, or the next generation
    would get the old one's modules.
    """
    if not private:
        sys.path.insert(0, str(folder))
        yield
        return
    with _importing:
        before = set(sys.modules)
        written = sys.dont_write_bytecode
        sys.dont_write_bytecode = True
        sys.path.insert(0, str(folder))
        try:
            yield
        finally:
            sys.path.remove(str(folder))
            sys.dont_write_bytecode = written
            for name in set(sys.modules) - before:
                file = getattr(sys.modules[name], "__file__", None)
                if file and Path(file).is_relative_to(folder) and not _is_ours(name):
                    del sys.modules[name]


def _is_ours(name: str) -> bool:
    return name.startswith("modeldepot_model_")
