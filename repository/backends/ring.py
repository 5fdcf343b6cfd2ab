"""Bytes of files to a device: threads read into a ring of host memory, copies run beside them.

A place of the ring is read into again once the copies out of it have ended. What is pinned memory,
an asynchronous copy and an event on a GPU is behind `Lane`, so that all of this runs without one.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

PLACES = 4
READERS = 2


def memory_of(tensor: torch.Tensor) -> memoryview:
    """Its bytes (a flat uint8 tensor of the CPU), to be written to."""
    array: Any = tensor.numpy()
    return memoryview(array)


class Lane(Protocol):
    """How bytes of this process reach a device. All but `memory` and `Mark`s are called by one
    thread."""

    def memory(self, size: int) -> torch.Tensor:
        """`size` bytes (uint8) of host memory that copies may be taken from."""
        ...

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Begins a copy; `source` lies in `memory`."""
        ...

    def mark(self) -> Callable[[], None]:
        """To be called by any thread: returns when all copies that began before this have ended."""
        ...


class CudaLane:
    """Pinned memory, and a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's
        # What was allocated a moment ago may be memory that queued work still writes to.
        self._stream.wait_stream(torch.cuda.current_stream(device))

    def memory(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def mark(self) -> Callable[[], None]:
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's
        event.record(self._stream)

        def wait() -> None:
            # A new thread's own device is the first one, and a context there would cost memory.
            torch.cuda.set_device(self._device)
            event.synchronize()  # without the GIL

        return wait


class Piece(NamedTuple):
    """What becomes of a part of a chunk: `target` takes as many bytes as it has, from `at` on."""

    target: torch.Tensor
    at: int


class Chunk(NamedTuple):
    """`read(into, offset)` fills `into` from the file."""

    read: Callable[[memoryview, int], None]
    offset: int
    size: int
    pieces: tuple[Piece, ...]


def chunks_of(
    read: Callable[[memoryview, int], None],
    begin: int,
    places: Sequence[tuple[int, torch.Tensor]],
    size: int,
) -> Iterator[Chunk]:
    """The file from `begin` on, in chunks of at most `size`. `places`: where each tensor's bytes
    begin after `begin`, and the tensor as flat uint8; in order, without gaps."""
    pieces: list[Piece] = []
    start = at = 0  # of the chunk, and where in the file we are, after `begin`
    for first, target in places:
        at = first
        done, total = 0, target.numel()
        while done < total:
            count = min(total - done, start + size - at)
            pieces.append(Piece(target[done : done + count], at - start))
            done += count
            at += count
            if at - start == size:
                yield Chunk(read, begin + start, size, tuple(pieces))
                pieces, start = [], at
    if pieces:
        yield Chunk(read, begin + start, at - start, tuple(pieces))


@dataclass(slots=True)
class _Place:
    memory: torch.Tensor
    free: Callable[[], None] = field(default=lambda: None)


def carry(chunks: Sequence[Chunk], lane: Lane, *, size: int) -> None:
    """Every chunk to where its pieces belong; everything has arrived when it returns. No chunk is
    longer than `size`. Raises what a read raises; then nothing of ours runs any more."""
    if not chunks:
        return
    largest = min(size, max(chunk.size for chunk in chunks))
    places = [_Place(lane.memory(largest)) for _ in range(min(PLACES, len(chunks)))]
    _Carrying(chunks, lane, places).run()


class _Carrying:
    def __init__(self, chunks: Sequence[Chunk], lane: Lane, places: Sequence[_Place]) -> None:
        self._lane = lane
        self._places = places
        self._left = iter(chunks)
        self._count = len(chunks)
        self._lock = threading.Lock()
        self._stopped = False
        self._free: queue.SimpleQueue[_Place] = queue.SimpleQueue()
        self._read: queue.SimpleQueue[tuple[Chunk, _Place] | BaseException] = queue.SimpleQueue()
        for place in places:
            self._free.put(place)

    def run(self) -> None:
        readers = [
            threading.Thread(target=self._reads, name=f"reads weights {i}", daemon=True)
            for i in range(min(READERS, self._count))
        ]
        for reader in readers:
            reader.start()
        try:
            for _ in range(self._count):
                item = self._read.get()
                if isinstance(item, BaseException):
                    raise item
                self._copies(*item)
        finally:
            self._stopped = True
            for _ in readers:  # one that waits for a place gets one, sees that, and ends
                self._free.put(self._places[0])
            for reader in readers:
                reader.join()
            # Memory that copies are still taken from must not be given back.
            self._lane.mark()()

    def _copies(self, chunk: Chunk, place: _Place) -> None:
        for target, at in chunk.pieces:
            self._lane.copy(target, place.memory[at : at + target.numel()])
        place.free = self._lane.mark()
        self._free.put(place)

    def _reads(self) -> None:
        """In each reader: a free place, the next chunk, read it there."""
        try:
            while True:
                place = self._free.get()
                with self._lock:
                    chunk = None if self._stopped else next(self._left, None)
                if chunk is None:
                    self._free.put(place)
                    return
                place.free()
                chunk.read(memory_of(place.memory)[: chunk.size], chunk.offset)
                self._read.put((chunk, place))
        except BaseException as error:  # noqa: BLE001 - raised again where `run` was called
            self._read.put(error)
