"""What a framework must offer: plain blocking calls. The host brings the concurrency."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from repository.config import ModelConfig
from repository.messages import InferRequest, InferResponse, Loaded


@dataclass(frozen=True, slots=True)
class Order:
    """What a backend is told to load, on whichever side of a process border it runs.

    path        the version's folder, or the private snapshot of it that is safe to map
    model_file  relative to `path`; "" for a whole folder
    device      one device, already chosen: "cpu" or "cuda:N"
    threads     how many compute threads this instance may use (>= 1)
    """

    model: str
    version: int
    path: Path
    model_file: str
    config: ModelConfig
    device: str = "cpu"
    threads: int = 1
    instance: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


class Backend(Protocol):
    """All calls come from one thread: load, infer ..., unload (also after a failed load).

    `load` raises LoadFailedError (or a leaf of it) with what to do; anything else it raises is
    shown with its type. `infer` raises InvalidTensorError for a request that does not fit, and
    anything else for a model that broke; it may use the request's buffers only until it returns.
    """

    def load(self, order: Order) -> Loaded: ...

    def infer(self, request: InferRequest) -> InferResponse: ...

    def unload(self) -> None: ...
