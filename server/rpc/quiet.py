"""gRPC has a log of its own, on stderr: a line for every client that knocks without TLS. It is off
unless somebody has said GRPC_VERBOSITY."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

VERBOSITY = "GRPC_VERBOSITY"


@contextmanager
def quiet() -> Iterator[None]:
    """gRPC is to be imported in this block: that is when it reads the variable, which the models' own
    processes are not to inherit."""
    said = os.environ.get(VERBOSITY)
    os.environ[VERBOSITY] = said or "NONE"
    try:
        yield
    finally:
        if said is None:
            del os.environ[VERBOSITY]
