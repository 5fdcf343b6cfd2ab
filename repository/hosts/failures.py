"""What an error becomes on its way from a model to whoever asked.

The same rules hold on both sides of a process border: errors of ours keep their class; whatever
else a model raises is named by its type and text. No text carries an absolute path of this machine.
The traceback goes to the log of the process that ran the model, never to a client.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import cache

import msgspec

from repository.errors import (
    FailedError,
    InferenceFailedError,
    LoadFailedError,
    NoDiskError,
    RepositoryError,
    UnavailableError,
    WorkerDiedError,
    retold,
)

TEXT_LIMIT = 4000  # characters of an error's text that travel
_ABSOLUTE = re.compile(r"(?<![\w./])/([\w.@+~-]+)(?:/[\w.@+~-]+)*/?")


class Failure(msgspec.Struct, array_like=True, gc=False):
    """An error in the channel. `code` is the class's, as in `repository.errors`."""

    code: str
    text: str
    retryable: bool = False


def without_paths(text: str, *roots: str) -> str:
    """`roots` vanish ("/srv/models/m/1/model.onnx" becomes "model.onnx"); of any other absolute
    path whose first folder exists here only the last part stays. (Node names such as "/layer1/Conv"
    look like paths and are not.)"""
    for root in sorted((r for r in roots if len(r) > 1), key=len, reverse=True):
        text = text.replace(root.rstrip("/") + "/", "").replace(root.rstrip("/"), ".")
    return _ABSOLUTE.sub(_last_part, text)


def _last_part(found: re.Match[str]) -> str:
    whole = found.group(0)
    if not os.path.isdir("/" + found.group(1)):
        return whole
    return whole.rstrip("/").rsplit("/", 1)[1]


def in_words(error: BaseException, *roots: str) -> str:
    """ "ValueError: too short", one text for all foreign errors."""
    text = str(error).strip()
    named = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return without_paths(named, *roots)[:TEXT_LIMIT]


def of_load(error: BaseException, *roots: str) -> RepositoryError:
    """The error that a failed load shows. Those of its family and of the disk keep their class."""
    if isinstance(error, (LoadFailedError, NoDiskError)):
        return type(error)(without_paths(str(error), *roots)[:TEXT_LIMIT])
    if isinstance(error, RepositoryError):
        return LoadFailedError(without_paths(str(error), *roots)[:TEXT_LIMIT])
    return LoadFailedError(in_words(error, *roots))


def of_infer(error: BaseException, *roots: str) -> RepositoryError:
    """The error that a failed inference shows. One of ours may quote what a model raised."""
    if isinstance(error, RepositoryError):
        text = without_paths(str(error), *roots)
        return error if text == str(error) else retold(error, text)
    return InferenceFailedError(in_words(error, *roots))


def is_fatal(error: BaseException) -> bool:
    """After a fault on a GPU (torch says so by its type) nothing that this process asks of it is
    answered any more: only a new process helps."""
    return any(kind.__name__ == "AcceleratorError" for kind in type(error).__mro__)


def to_wire(error: RepositoryError) -> Failure:
    retryable = isinstance(error, (UnavailableError, WorkerDiedError))
    return Failure(error.code, str(error)[:TEXT_LIMIT], retryable)


def from_wire(failure: Failure) -> RepositoryError:
    """A code that this side does not know still is a failure of ours."""
    return _classes().get(failure.code, FailedError)(failure.text)


@cache
def _classes() -> dict[str, type[RepositoryError]]:
    """Only those of `repository.errors`: a face may have kinds of its own under the same code."""
    ours = (k for k in _leaves(RepositoryError) if k.__module__ == RepositoryError.__module__)
    return {kind.code: kind for kind in ours}


def _leaves(kind: type[RepositoryError]) -> Iterator[type[RepositoryError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _leaves(child)


__all__ = [
    "Failure",
    "from_wire",
    "in_words",
    "is_fatal",
    "of_infer",
    "of_load",
    "to_wire",
    "without_paths",
]
