"""Panics of libraries that are written in Rust.

They are no `Exception`: unhandled, one text that a tokenizer chokes on would end the worker, and with
it all that it is doing for others. The library's own state is what it was: nothing was half written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

NAME = "PanicException"  # of `pyo3_runtime`, which cannot be imported


@contextmanager
def refused(error: Exception) -> Iterator[None]:
    """Raises `error` in place of a panic."""
    try:
        yield
    except Exception:
        raise
    except BaseException as panic:
        if type(panic).__name__ != NAME:
            raise
        raise error from panic
