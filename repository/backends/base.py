"""What a framework must offer: plain blocking calls. The host brings the concurrency."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from repository.config import ModelConfig
from repository.messages import InferRequest, InferResponse, Loaded
from repository.tensors import ALIGN, Buffer, address


@dataclass(frozen=True, slots=True)
class Order:
    """What a backend is told to load, on whichever side of a process border it runs.

    path        the version's folder, or the private snapshot of it that is safe to map
    model_file  relative to `path`; "" for a whole folder
    private     `path` is a copy that nobody writes to: its files may be mapped
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
    private: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


class Room:
    """Memory that large outputs may be written to: what lies there needs no copy to the server."""

    __slots__ = ("_begin", "_memory", "_used")

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._begin = address(memory)
        self._used = 0

    def take(self, size: int) -> memoryview | None:
        """`size` bytes of it (> 0), aligned, with anything in them. None: so much is not left."""
        begin = self._used
        end = begin + size
        if end > len(self._memory):
            return None
        self._used = end + -end % ALIGN
        return self._memory[begin:end]

    def bring(self, data: Buffer) -> int | None:
        """Where `data` (not empty) lies in the room; copied there if it does not and still fits.
        None: it does not fit."""
        at = address(data) - self._begin
        if 0 <= at <= len(self._memory) - len(data):
            return at
        begin = self._used
        place = self.take(len(data))
        if place is None:
            return None
        place[:] = data
        return begin

    def reset(self) -> None:
        """What was taken is not used after all."""
        self._used = 0


class Backend(Protocol):
    """All calls come from one thread: load, infer ..., unload (also after a failed load).

    `load` raises LoadFailedError (or a leaf of it) with what to do; anything else it raises is
    shown with its type. `infer` raises InvalidTensorError for a request that does not fit, and
    anything else for a model that broke; it may use the request's buffers only until it returns:
    the next request's data may lie in the same memory.
    """

    def load(self, order: Order) -> Loaded: ...

    def infer(self, request: InferRequest) -> InferResponse: ...

    def unload(self) -> None: ...


class RoomyBackend(Backend, Protocol):
    """One that can write outputs where they are wanted. Any other's are copied there."""

    def infer_into(self, request: InferRequest, room: Room) -> InferResponse:
        """As `infer`; outputs may lie in `room`. Only whole outputs may: nobody wipes a room first,
        so whatever the model has not written is another request's."""
        ...
